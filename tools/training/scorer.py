"""Training of the dual encoder: texts that are true and texts that are nearly true of a scene, and which is which.

Everything is drawn from the splits ``train`` and ``tune``, as for the reader of pictures: a judge must know every pair of colour and
noun. What a changed scene would be is thrown away when it belongs to the split ``test``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ...demo import model, world
from ...demo.scorer import WEIGHTS, WIDTH, DualEncoder, PictureTower, Vocabulary
from .layouts import LayoutReading
from .pool import make_pool
from .stage import Stage

# --- texts ----------------------------------------------------------------------------------------------------------


def swapped(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """Two things exchange their colours; the same scene where no two differ."""
    pairs = [(i, j) for i, j in itertools.combinations(range(len(scene.things)), 2)]
    pairs = [
        (i, j)
        for i, j in pairs
        if scene.things[i].colour != scene.things[j].colour and scene.things[i].noun != scene.things[j].noun
    ]
    if not pairs:
        return scene
    i, j = pairs[rng.integers(len(pairs))]
    things = list(scene.things)
    things[i], things[j] = replace(things[i], colour=things[j].colour), replace(things[j], colour=things[i].colour)
    return replace(scene, things=tuple(things))


def other(scene: world.Scene, rng: np.random.Generator, what: str) -> world.Scene:
    """One thing's ``noun``, ``colour`` or ``pattern`` is another."""
    i = int(rng.integers(len(scene.things)))
    choices = {"noun": world.NOUNS, "colour": tuple(world.COLOURS), "pattern": world.PATTERNS}[what]
    used = {getattr(t, what) for t in scene.things} if what == "noun" else {getattr(scene.things[i], what)}
    word = str(rng.choice([c for c in choices if c not in used]))
    changed_to: dict[str, Any] = {what: word}
    return replace(scene, things=tuple(replace(t, **changed_to) if n == i else t for n, t in enumerate(scene.things)))


def changed(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """A scene that is nearly this one."""
    kind = rng.choice(("swap", "swap", "pattern", "noun", "colour", "background"))
    if kind == "swap" and len(scene.things) > 1:
        return swapped(scene, rng)
    if kind == "background":
        return replace(scene, background=str(rng.choice([b for b in world.BACKGROUNDS if b != scene.background])))
    return other(scene, rng, str(kind) if kind != "swap" else "colour")


def phrase(scene: world.Scene, rng: np.random.Generator) -> world.Caption:
    """A part of a scene as a prompt's words come: “red star”, “a star”, “a dotted grey wall”."""
    ground = rng.random() < 0.12
    if ground:
        pattern = scene.background_pattern if rng.random() < 0.6 else None
        words = [pattern, scene.background, str(rng.choice(("wall", "background", "floor", "cloth")))]
        caption = world.Caption("", (), None, (scene.background, pattern))
    else:
        thing = scene.things[rng.integers(len(scene.things))]
        colour = thing.colour if rng.random() < 0.8 else None
        pattern = thing.pattern if rng.random() < (0.15 if thing.pattern == "plain" else 0.5) else None
        words = [colour, pattern] if rng.random() < 0.6 else [pattern, colour]
        words.append(thing.noun)
        caption = world.Caption("", (world.Stated(thing.noun, colour, pattern),))
    text = " ".join(w for w in words if w)
    return replace(caption, text=world.article(text) if rng.random() < 0.5 else text)


def part(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """Some of the things, at least one, and never all of several."""
    count = len(scene.things)
    keep = rng.permutation(count)[: int(rng.integers(1, max(count, 2)))]
    return replace(scene, things=tuple(scene.things[i] for i in sorted(keep)))


def _within(
    scene: world.Scene, rng: np.random.Generator, alter: Callable[[world.Scene, np.random.Generator], world.Scene]
) -> world.Scene:
    """``alter(scene, rng)`` that is not of the split ``test``; the scene itself if there is none soon."""
    for _ in range(6):
        new = alter(scene, rng)
        if new.split != "test":
            return new
    return scene


def texts(scenes: Sequence[world.Scene], rng: np.random.Generator) -> list[world.Caption]:
    """Three for every scene, in blocks: its caption, something that is only a part of it, and something nearly true."""
    whole = [world.describe(s, rng) for s in scenes]
    parts, near = [], []
    for s in scenes:
        parts.append(phrase(s, rng) if rng.random() < 0.6 else world.describe(_within(s, rng, part), rng))
        other_scene = _within(s, rng, changed)
        near.append(phrase(other_scene, rng) if rng.random() < 0.3 else world.describe(other_scene, rng))
    return whole + parts + near


# --- what is true of what -------------------------------------------------------------------------------------------


def _number(words: Sequence[str], word: str | None) -> int:
    return -1 if word is None else words.index(word)


_COLOURS, _GROUNDS = tuple(world.COLOURS), tuple(world.BACKGROUNDS)


def scene_table(scenes: Sequence[world.Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Things ``int [P, 3, 3]`` (noun, colour, pattern; -2 where there is none), backgrounds ``[P, 2]``, places ``[P, 3, 2]``."""
    things, places = torch.full((len(scenes), 3, 3), -2), torch.zeros(len(scenes), 3, 2)
    for row, place, s in zip(things, places, scenes, strict=True):
        for i, t in enumerate(s.things):
            row[i] = torch.tensor((world.NOUNS.index(t.noun), _COLOURS.index(t.colour), world.PATTERNS.index(t.pattern)))
            place[i] = torch.tensor((t.x, t.y))
    grounds = torch.tensor([(_GROUNDS.index(s.background), world.PATTERNS.index(s.background_pattern)) for s in scenes])
    return things, grounds, places


def caption_table(captions: Sequence[world.Caption]) -> tuple[Tensor, Tensor]:
    """Stated things ``int [T, 3, 3]`` (noun, colour, pattern) and backgrounds ``[T, 2]``; -1 is unsaid."""
    stated, said = torch.full((len(captions), 3, 3), -1), torch.full((len(captions), 2), -1)
    for row, ground, c in zip(stated, said, captions, strict=True):
        for i, t in enumerate(c.things):
            row[i] = torch.tensor((world.NOUNS.index(t.noun), _number(_COLOURS, t.colour), _number(world.PATTERNS, t.pattern)))
        ground[:] = torch.tensor((_number(_GROUNDS, c.background[0]), _number(world.PATTERNS, c.background[1])))
    return stated, said


def true(captions: Sequence[world.Caption], scenes: Sequence[world.Scene]) -> Tensor:
    """Does a caption hold of a scene: ``bool [T, P]``. Every stated thing must be a different one; what is unsaid is free."""
    things, grounds, places = scene_table(scenes)
    stated, said = caption_table(captions)
    fits = ((stated[:, None, :, None] == -1) | (stated[:, None, :, None] == things[None, :, None])).all(-1)  # [T, P, 3, 3]
    axis = torch.tensor([{None: -1, "left": 0, "above": 1}[c.relation] for c in captions])
    gap = places[None, :, None, :] - places[None, :, :, None]  # [1, P, first, second, axis]
    ordered = torch.where((axis == 1)[:, None, None, None], gap[..., 1], gap[..., 0]) > 0
    ordered |= (axis == -1)[:, None, None, None]  # [T, P, 3, 3]
    holds = torch.zeros(fits.shape[:2], dtype=torch.bool)
    for i, j, k in itertools.permutations(range(3)):
        holds |= fits[:, :, 0, i] & fits[:, :, 1, j] & fits[:, :, 2, k] & ordered[:, :, i, j]
    return holds & ((said[:, None] == -1) | (said[:, None] == grounds[None])).all(-1)


class Together(nn.Module):
    """What goes with what, read from the vectors of pictures and of texts alike: a help in training that does not ship.

    One linear map names nouns, and pairs of noun and colour, noun and pattern, colour and pattern, and the background. Without it,
    both towers long see only which words there are, and not which belong together.
    """

    SIZES = (len(world.NOUNS), len(_COLOURS), len(world.PATTERNS))
    PAIRS = ((0, 1), (0, 2), (1, 2))
    PLACED = tuple(a * b + 1 for a, b in ((SIZES[0], SIZES[1]), (SIZES[0], SIZES[2])))  # the last is the background

    def __init__(self) -> None:
        super().__init__()
        grounds = len(_GROUNDS) * (1 + len(world.PATTERNS))
        count = self.SIZES[0] + sum(self.SIZES[a] * self.SIZES[b] for a, b in self.PAIRS) + grounds
        self.read = nn.Linear(WIDTH, count)
        self.where = nn.Conv2d(PictureTower.MIXED, sum(self.PLACED), 1)

    def forward(self, vectors: Tensor, there: Tensor) -> Tensor:
        """Mean cross-entropy of unit vectors ``[N, WIDTH]`` against ``there [N, count]``; what is there weighs ten times more."""
        logits = self.read(vectors * WIDTH**0.5)
        return F.binary_cross_entropy_with_logits(logits, there, pos_weight=there.new_tensor(10.0))

    def at(self, mixed: Tensor, scenes: Sequence[world.Scene], things: Tensor) -> Tensor:
        """Mean cross-entropy of what is at each place, noun with colour and noun with pattern, from features ``[N, MIXED, h, h]``."""
        side = mixed.shape[-1]
        layout = torch.from_numpy(np.stack([world.layout(s, side) for s in scenes])).long().flatten(1)
        noun, colour, pattern = things.gather(1, (layout - 1).clamp(0)[..., None].expand(-1, -1, 3)).unbind(-1)
        pairs = (noun * self.SIZES[1] + colour, noun * self.SIZES[2] + pattern)
        losses = []
        for logits, pair, size in zip(
            self.where(mixed).float().flatten(2).split(self.PLACED, dim=1), pairs, self.PLACED, strict=True
        ):
            truth = torch.where(layout > 0, pair, torch.where(layout == 0, size - 1, -100))  # mixed cells are left out
            losses.append(F.cross_entropy(logits, truth, ignore_index=-100))
        return torch.stack(losses).mean()

    @classmethod
    def there(cls, things: Tensor, grounds: Tensor) -> Tensor:
        """``float [N, count]`` from things ``[N, 3, 3]`` and backgrounds ``[N, 2]``; what is below 0 is not there or not said."""

        def marked(number: Tensor, known: Tensor, size: int) -> Tensor:
            out = torch.zeros(len(number), size + 1)
            return out.scatter_(1, torch.where(known, number, size), 1.0)[:, :size]

        parts = [marked(things[..., 0], things[..., 0] >= 0, cls.SIZES[0])]
        for a, b in cls.PAIRS:
            known = (things[..., a] >= 0) & (things[..., b] >= 0)
            parts.append(marked(things[..., a] * cls.SIZES[b] + things[..., b], known, cls.SIZES[a] * cls.SIZES[b]))
        colour, pattern, patterns = grounds[:, :1], grounds[:, 1:], len(world.PATTERNS)
        parts.append(marked(colour, colour >= 0, len(_GROUNDS)))
        parts.append(marked(colour * patterns + pattern, (colour >= 0) & (pattern >= 0), len(_GROUNDS) * patterns))
        return torch.cat(parts, dim=1)


# --- the loss -------------------------------------------------------------------------------------------------------


def contrast(cosines: Tensor, holds: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """What is wrong with ``cosines [T, P]``: texts of P pictures in blocks, the first two blocks true of their own picture.

    A text finds its picture among those of which it is false, a picture its two texts among those that are false; and the
    probability of every pair is right, where true, false and nearly true ones weigh the same.
    """
    count = cosines.shape[1]
    logits = scale * cosines
    own = torch.arange(len(cosines)) % count
    mine = F.one_hot(own, count).bool()
    fair = logits.masked_fill(holds & ~mine, -torch.inf)
    find_picture = F.cross_entropy(fair[: 2 * count], own[: 2 * count])
    find_text = torch.stack(
        [
            F.cross_entropy(
                torch.cat(
                    [logits[k * count : (k + 1) * count].diagonal()[:, None], logits.T.masked_fill(holds.T, -torch.inf)], 1
                ),
                torch.zeros(count, dtype=torch.long),
            )
            for k in (0, 1)
        ]
    ).mean()
    error = F.binary_cross_entropy_with_logits(logits + bias, holds.to(logits), reduction="none")
    near = mine & ~holds
    sure = error[holds].mean() + error[~holds & ~near].mean() + error[near].mean()
    return 0.5 * (find_picture + find_text) + sure


def worn(latents: Tensor) -> Tensor:
    """Latents as sampling leaves them: some noisy, some blurred as early estimates are, some faded."""
    b = len(latents)

    def some(share: float, most: float) -> Tensor:
        return most * torch.rand(b, 1, 1, 1) * (torch.rand(b, 1, 1, 1) < share)

    smooth = F.avg_pool2d(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3, 1)
    latents = latents.lerp(smooth, some(0.4, 0.9))
    return latents * (1 - some(0.4, 0.4)) + some(0.7, 0.5) * torch.randn_like(latents)


def vocabulary() -> Vocabulary:
    """Every word that the grammar can say."""
    rng = np.random.default_rng(4)
    source = world.scenes("train", 4)
    said = {w for _ in range(4000) for w in world.describe(next(source), rng).text.replace(",", " ").split()}
    return Vocabulary(sorted(said))


def train_scorer(latents: Tensor, scenes: Sequence[world.Scene], minutes: float, batch: int = 64) -> DualEncoder:
    """Both towers on the pool's latents ``[N, 4, 16, 16]``. The picture's features also learn what is where, as the denoiser's do."""
    torch.manual_seed(6)
    encoder = DualEncoder(vocabulary())
    encoder.picture = encoder.picture.to(memory_format=torch.channels_last)
    reading, together = LayoutReading(), Together()
    layouts, table = LayoutReading.truth(list(scenes))
    stage = Stage("scorer", {"scorer": encoder, "reading": reading, "together": together}, minutes, 1.5e-3)
    torch.manual_seed(6 + stage.step)
    rng = np.random.default_rng([6, stage.step])
    alike: dict[tuple[str, str, int], list[int]] = {}
    for i, s in enumerate(scenes):
        alike.setdefault((s.background, s.background_pattern, len(s.things)), []).append(i)
    groups = [g for g in alike.values() if len(g) >= batch]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        # Every other batch shares background and count, so that only the things tell pictures apart.
        chosen = rng.choice(groups[rng.integers(len(groups))] if groups and step % 2 else len(scenes), batch, replace=False)
        here = [scenes[i] for i in chosen]
        captions = texts(here, rng)
        holds = true(captions, here)
        x = worn(latents[chosen].float()).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            fine, coarse, mixed = encoder.picture.features(x)
            see = F.normalize(encoder.picture.pool(mixed).float(), dim=-1)
            say = F.normalize(encoder.text(encoder.vocabulary.batch([c.text for c in captions])).float(), dim=-1)
            where = layouts[chosen].long().flatten(1)[:, :, None].expand(-1, -1, 3)  # -1 takes the last row: mixed
            truth = table[chosen].long().gather(1, where % 5).transpose(1, 2).unflatten(2, layouts.shape[1:])
            read = reading(coarse, fine, truth) + together.at(mixed, here, scene_table(here)[0])
        cosines = say @ see.T
        value = contrast(cosines, holds, encoder.scale, encoder.bias)
        bound = together(see, Together.there(*scene_table(here)[:2])) + together(say, Together.there(*caption_table(captions)))
        rival = cosines[:batch].masked_fill(holds[:batch] & ~torch.eye(batch, dtype=torch.bool), -1)
        found = (rival.argmax(1) == torch.arange(batch)).float().mean()
        own = cosines[:batch].diagonal() - cosines[2 * batch :].diagonal()
        false = ~holds[2 * batch :].diagonal()
        notes = {
            "loss": value.item(),
            "read": read.item(),
            "found": found.item(),
            "bound": bound.item(),
            "near": (own[false] > 0).float().mean().item(),
        }
        return value + (1 - stage.spent / stage.seconds) * (read + 3 * bound), notes

    stage.run(loss, batch)
    averaged = stage.average["scorer"]
    assert isinstance(averaged, DualEncoder)
    return averaged.eval()


def store(encoder: DualEncoder, path: Path, command: str) -> None:
    """Write the weights in half precision, with the words and where they come from."""
    state = {k: v.half().contiguous() for k, v in encoder.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    words = json.dumps(encoder.vocabulary.words)
    metadata = {"data_version": world.DATA_VERSION, "command": command, "words": words}
    path.write_bytes(save(state, metadata))


def train_and_store(pool: int, minutes: float, command: str) -> None:
    """Train the scorer on latents of the shipped autoencoder, and write its file."""
    autoencoder = model.ARCHITECTURE.autoencoder().eval()
    autoencoder.load_state_dict(model.stored()["autoencoder"])
    pools = [make_pool(autoencoder, pool), make_pool(autoencoder, pool // 8, "tune")]
    latents, scenes = torch.cat([p[0] for p in pools]), [s for p in pools for s in p[1]]
    store(train_scorer(latents, scenes, minutes), WEIGHTS, command)
    print(f"saved {WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.1f} MB", flush=True)
