"""Stage four: the denoiser, on latents of the pictures drawn ahead and with the frozen text encoder."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ....demo import checkpoint
from ....demo.stickers import model, world
from ..stage import DEVICE, Stage, initialise, mixed, plain_attention, together
from ..text import Words
from . import dataset
from .autoencoder import latents

WEIGHTS = model.WEIGHTS / "denoiser.safetensors"
DROPPED = 0.1  # share of captions left empty, for guidance
WARM_UP = 0.3  # share of the training that the auxiliary reading head helps for
# Up to which share of the training windows of which height and width are learned, in latent pixels. A thing is learned
# in a window around it, at a seventh of the cost of a picture; two things side by side in a strip; then whole pictures.
WINDOWS = ((0.4, 16, 16), (0.6, 20, 32), (1.0, 32, 32))
INSIDE = 0.75  # a thing is said of a window that holds this much of it

NAMED = (  # what the reading head names at each latent pixel, and how many there are
    ("noun or place", len(world.NOUNS) + len(world.PLACES)),
    ("colour", len(world.COLOURS)),
    ("accessory", len(world.ACCESSORIES) + 1),
    ("style", len(world.STYLES) + 1),
)


class Reading(nn.Module):
    """What is where, read from the denoiser's features at half and at full size: a help at the start that does not ship.

    It makes the denoiser look words up early. It is gone before the end, because it teaches binding that large models lack.
    """

    def __init__(self, coarse: int, fine: int):
        super().__init__()
        total = sum(count for _, count in NAMED)
        self.coarse, self.fine = nn.Conv2d(coarse, 4 * total, 1), nn.Conv2d(fine, total, 1)

    def forward(self, coarse: Tensor, fine: Tensor, truth: Tensor) -> Tensor:
        """Mean cross-entropy against ``truth [B, 4, h, w]`` (class numbers, -100 where there is none or a cell is mixed)."""
        losses = [
            F.cross_entropy(part.float(), truth[:, i], ignore_index=-100, reduction="sum") / truth[:, 0].numel()
            for read in (F.pixel_shuffle(self.coarse(coarse), 2), self.fine(fine))
            for i, part in enumerate(read.split([count for _, count in NAMED], dim=1))
        ]
        return torch.stack(losses).mean()


class Pool:
    """The drawn pictures' latents, scenes, and who is where, on `DEVICE` what is large."""

    def __init__(self) -> None:
        shards = dataset.shards("train")
        self.latents = latents("train").to(DEVICE)
        self.scenes = [scene for shard in shards for scene in dataset.scenes_of("train", shard)]
        owners = np.concatenate([dataset.load("train", shard)[1] for shard in shards]).astype(np.int8)
        corners = [owners[:, a::2, b::2] for a in (0, 1) for b in (0, 1)]
        same = np.all([c == corners[0] for c in corners], axis=0)
        self.owners = corners[0]  # [N, 32, 32]: 0 the place, else which thing
        self.known = torch.from_numpy(np.where(same, corners[0], -1)).to(DEVICE)  # -1: mixed
        names = torch.full((len(self.scenes), 5, len(NAMED)), -100, dtype=torch.int16)  # place, things, mixed
        colours, accessories, styles = [*world.COLOURS], ("", *world.ACCESSORIES), ("", *world.STYLES)
        for row, scene in zip(names, self.scenes, strict=True):
            row[0, 0], row[0, 3] = len(world.NOUNS) + world.PLACES.index(scene.place), styles.index(scene.style)
            for k, t in enumerate(scene.things, 1):
                seen = t.colour and t.style not in world.COLOURLESS
                row[k, 0], row[k, 1] = world.NOUNS.index(t.noun), colours.index(t.colour) if seen else -100
                row[k, 2], row[k, 3] = accessories.index(t.accessory), styles.index(t.style)
        self.names = names.to(DEVICE)

    def window(self, row: int, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, str]:
        """Top and left of a window of a picture that holds one of its things, where one fits; and a caption of it."""
        owner, scene = self.owners[row], self.scenes[row]
        k = int(rng.integers(len(scene.things)))
        corner = []
        for size, there in ((height, (owner == k + 1).any(1)), (width, (owner == k + 1).any(0))):
            first, last = (int(n) for n in np.flatnonzero(there)[[0, -1]]) if there.any() else (0, len(there) - 1)
            low, high = sorted((last + 1 - size, first))
            low, high = max(low, 0), min(high, len(there) - size)
            corner.append(int(rng.integers(low, high + 1)))
        top, left = corner
        inside = np.bincount(owner[top : top + height, left : left + width].ravel(), minlength=4)
        share = inside[1:] / np.maximum(np.bincount(owner.ravel(), minlength=4)[1:], 1)
        said = tuple(t for i, t in enumerate(scene.things) if i == k or share[i] >= INSIDE)
        return top, left, world.describe(replace(scene, things=said), rng).text

    def truth(self, known: Tensor, chosen: Tensor) -> Tensor:
        """What the reading head should say of windows ``known [B, h, w]`` of pictures, ``int64 [B, 4, h, w]``."""
        where = known.long().flatten(1)[:, :, None].expand(-1, -1, len(NAMED))  # -1 takes the last row
        return self.names[chosen].long().gather(1, where % 5).transpose(1, 2).unflatten(2, known.shape[1:])


def text_encoder() -> nn.Module:
    """The text encoder as it ships."""
    tower = checkpoint.text_tower().eval().requires_grad_(False)
    tower.load_state_dict(model.stored("text"))
    return tower


def train(minutes: float, words: Words, batch: int, rank: int) -> tuple[nn.Module, dict[str, float]]:
    """Noise prediction, min-SNR-5 weights, a tenth of the captions dropped; goes on from checkpoint or stored weights."""
    pool = Pool()
    unet = model.ARCHITECTURE.unet()
    initialise(unet, 3)
    with torch.no_grad():  # residual branches start as nothing
        for name, parameter in unet.named_parameters():
            if name.startswith("out.2") or ".out_layers.3." in name or ".proj_out." in name:
                parameter.zero_()
    if WEIGHTS.exists():  # without the optimiser's state, should no checkpoint be there
        unet.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS).items()})
    unet = unet.to(DEVICE, memory_format=torch.channels_last)
    channels = model.ARCHITECTURE.unet_config["model_channels"]
    reading = Reading(channels * 3, channels * 2)
    stage = Stage("stickers_denoiser", {"denoiser": unet, "reading": reading}, minutes, 1e-3, decay=0.9995, device=DEVICE)
    text, nothing = text_encoder().to(DEVICE), np.array(words.ids(""))
    torch.manual_seed(3 + 1000 * rank + stage.step)
    rng = np.random.default_rng([3, stage.step, rank])
    kept = (1 / (1 + model.noise_levels() ** 2)).to(DEVICE)

    def forward(x: Tensor, t: Tensor, context: Tensor, truth: Tensor | None) -> tuple[Tensor, Tensor]:
        taps = []

        def tap(h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
            taps.append(h)
            return h, skip

        options = {"optimized_attention_override": plain_attention, "patches": {"output_block_patch": [tap]}}
        guess = unet._forward(x, t, context, None, None, options)
        return guess, reading(taps[2], taps[4], truth) if truth is not None else guess.new_zeros(())

    compiled = torch.compile(forward, dynamic=False)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        progress = stage.spent / stage.seconds
        help_ = max(0.0, 1 - progress / WARM_UP)
        height, width = next((h, w) for share, h, w in WINDOWS if progress < share or share == 1)
        rows = rng.integers(0, len(pool.scenes), batch)
        tops, lefts, captions = zip(*(pool.window(row, height, width, rng) for row in rows), strict=True)
        tokens = np.array([words.ids(text) for text in captions])
        tokens[rng.random(batch) < DROPPED] = nothing
        t = torch.from_numpy((rng.permutation(batch) + rng.random(batch)) / batch * 1000).long().to(DEVICE)
        chosen, down, across = (torch.tensor(n, device=DEVICE) for n in (rows, tops, lefts))
        down = (down[:, None] + torch.arange(height, device=DEVICE))[:, :, None]
        across = (across[:, None] + torch.arange(width, device=DEVICE))[:, None, :]
        x = pool.latents[chosen[:, None, None], :, down, across].permute(0, 3, 1, 2).float()
        truth = pool.truth(pool.known[chosen[:, None, None], down, across], chosen) if help_ else None
        noise, a = torch.randn_like(x), kept[t][:, None, None, None]
        noisy = (a.sqrt() * x + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with mixed():
            with torch.no_grad():
                context = text(torch.from_numpy(tokens).to(DEVICE))[0]
            guess, read = compiled(noisy, t.float(), context.float(), truth)
        snr = a / (1 - a)
        error = ((guess.float() - noise) ** 2).mean((1, 2, 3))
        own = (error * (snr.clamp(max=5) / snr).flatten()).mean()
        return 4 * own + 0.3 * help_ * read, {"error": error.detach().mean(), "weighted": own.detach(), "read": read.detach()}

    stage.run(loss, batch)
    return stage.kept("denoiser"), {"minutes": round(stage.spent / 60, 1), "pictures": stage.step * batch}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=300, help="training time in all, over any number of runs")
    parser.add_argument("--batch", type=int, default=32, help="pictures of a step and process")
    parser.add_argument("--processes", type=int, default=1, help="of one thread each: OMP_NUM_THREADS=1")
    args = parser.parse_args(argv)
    rank = together(args.processes)
    denoiser, spent = train(args.minutes, Words(), args.batch, rank)
    if rank:
        return 0
    command = f"run.py train stickers denoiser --minutes {args.minutes:g} --batch {args.batch} --processes {args.processes}"
    metadata = {"data_version": world.DATA_VERSION, "command": command, "trained": json.dumps(spent)}
    save_file({k: v.half().contiguous() for k, v in denoiser.state_dict().items()}, WEIGHTS, metadata=metadata)
    print(f"saved {WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.1f} MB", flush=True)
    return 0
