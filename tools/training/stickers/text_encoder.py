"""Stage three: a text encoder trained as CLIP's is (captions against pictures, random batches), then frozen."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ....demo import checkpoint
from ....demo.stickers import model, world
from ..stage import DEVICE, Stage, initialise, mixed
from ..text import Words, encode
from . import dataset

WEIGHTS = model.WEIGHTS / "text.safetensors"


THUMBNAIL = 64  # pixels, side of the pictures that captions are held against


class PictureTower(nn.Module):
    """Small pictures ``[B, 3, 64, 64]`` in [0, 1] to one vector: only needed to train the text encoder against, as CLIP's is."""

    def __init__(self, width: int = 128):
        super().__init__()
        plan = ((48, 128, 1), (128, 128, 1), (128, 192, 2), (192, 192, 1), (192, 256, 2))
        self.body = nn.Sequential(
            nn.PixelUnshuffle(4),
            *(layer for i, o, stride in plan for layer in (nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU())),
        )
        self.out = nn.Linear(512, width, bias=False)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.body(pictures * 2 - 1)
        return self.out(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))


def pool(split: str) -> tuple[Tensor, list[world.Scene]]:
    """Every drawn picture of a split, small (``uint8 [N, 3, 64, 64]``), and the scenes, in the same order."""
    small, scenes = [], []
    for shard in dataset.shards(split):
        pictures, _ = dataset.load(split, shard)
        for part in np.array_split(pictures, 20):
            whole = torch.from_numpy(np.array(part, order="C")).permute(0, 3, 1, 2).float()
            small.append(F.avg_pool2d(whole, world.SIZE // THUMBNAIL).round().to(torch.uint8))
        scenes += dataset.scenes_of(split, shard)
    return torch.cat(small), scenes


def shortened(tokens: Tensor) -> Tensor:
    """Without most of the padding (the encoder is causal: what follows the end changes nothing); few lengths, compiled once."""
    return tokens[:, : -(-(int((tokens != Words.END).sum(1).max()) + 1) // 8) * 8]


def train(minutes: float, words: Words) -> tuple[nn.Module, nn.Module]:
    """Contrastive: a caption finds its own picture in a random batch, and the other way round."""
    tower, picture = checkpoint.text_tower(), PictureTower().to(memory_format=torch.channels_last)
    initialise(tower, 2)
    torch.manual_seed(2)
    say, see = torch.compile(encode, dynamic=False), torch.compile(picture, dynamic=False)
    scale = nn.ParameterDict({"log_scale": nn.Parameter(torch.tensor(2.65))})
    stage = Stage("stickers_text", {"text": tower, "picture": picture, "scale": scale}, minutes, 1e-3, device=DEVICE)
    if not stage.done:
        seen, scenes = pool("train")
        seen = seen.to(DEVICE)
        rng, batch = np.random.default_rng([2, stage.step]), 192

        def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
            chosen = rng.choice(len(scenes), batch, replace=False)
            tokens = shortened(words.batch([world.describe(scenes[i], rng).text for i in chosen])).to(DEVICE)
            x = seen[chosen].float() / 255
            with mixed():
                a = F.normalize(say(tower, tokens).float(), dim=-1)
                b = F.normalize(see(x + 0.03 * torch.randn_like(x)).float(), dim=-1)
            logits = a @ b.T * scale["log_scale"].exp().clamp(max=100)
            target = torch.arange(batch, device=DEVICE)
            right = (logits.argmax(1) == target).float().mean().detach()
            return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)), {"right": right}

        stage.run(loss, batch)
    return stage.kept("text"), stage.kept("picture")


def join(things: Iterable[world.Stated], caption: world.Caption) -> str:
    """Things in a caption's place, in words."""
    end = f" {world.place_phrase(caption.place, caption.style)}" if caption.place else ""
    return " and ".join(world.phrase(thing) for thing in things) + end


def swapped(caption: world.Caption) -> str | None:
    """The caption of two things with one kind of detail exchanged between them; ``None`` if there is none to exchange."""
    a, b = caption.things
    for word in ("colour", "accessory", "style"):
        mine, theirs = getattr(a, word), getattr(b, word)
        if mine and theirs and mine != theirs:
            return join((replace(a, **{word: theirs}), replace(b, **{word: mine})), caption)
    return None


def bag_of_words(tower: nn.Module, picture: nn.Module, words: Words, split: str = "tune") -> tuple[float, int]:
    """Premise P5: how often a picture prefers its caption to the same with details exchanged, and of how many pictures."""
    seen, scenes = pool(split)
    rng, right = np.random.default_rng(6), []
    picture.eval()
    for small, scene in zip(seen, scenes, strict=True):
        if len(scene.things) != 2:
            continue
        caption = world.describe(scene, rng, full=True)
        other = swapped(caption)
        if other is None:
            continue
        own = join(caption.things, caption)
        with torch.no_grad():
            a = F.normalize(encode(tower, words.batch([own, other])), dim=-1)
            b = F.normalize(picture(small[None].float() / 255), dim=-1)
        right.append(bool((a @ b[0]).argmax() == 0))
    return float(np.mean(right)), len(right)


def vocabulary(words: Words) -> list[int]:
    """The tokens that the grammar can say."""
    rng = np.random.default_rng(4)
    source = world.scenes("train", 4)
    for _ in range(6000):
        words.ids(world.describe(next(source), rng).text)
    for noun in (*world.NOUNS, *world.COLOURS, *world.STYLES, *world.PLACES, "bow tie", "a an style wearing in on wall"):
        words.ids(noun)
    return sorted({words.START, words.END, *(n for ids in words.known.values() for n in ids)})


def export(tower: nn.Module, words: Words, command: str, found: str) -> None:
    """Write the weights as fp16 safetensors; of the token table only the rows that the grammar can say."""
    numbers, state = vocabulary(words), tower.state_dict()
    parts = {k: v.half().contiguous() for k, v in state.items() if k != checkpoint.TOKEN_ROWS}
    parts |= {
        "token_rows": state[checkpoint.TOKEN_ROWS][numbers].half(),
        "token_numbers": torch.tensor(numbers, dtype=torch.int32),
    }
    save_file(parts, WEIGHTS, metadata={"data_version": world.DATA_VERSION, "command": command, "bag_of_words": found})
    print(f"saved {WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.1f} MB", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=12, help="how long it is trained decides how much of a bag of words it is"
    )
    args = parser.parse_args(argv)
    words = Words()
    tower, picture = train(args.minutes, words)
    share, count = bag_of_words(tower, picture, words)
    found = f"a picture prefers its caption to one with details exchanged: {100 * share:.1f} % of {count}"
    print(found, flush=True)
    export(tower, words, f"run.py train stickers text_encoder --minutes {args.minutes:g}", found)
    return 0
