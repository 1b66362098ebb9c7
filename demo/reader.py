"""A reader of pictures of the world of shapes: which things are where, and does the picture show what a caption says.

One small convolutional net looks at a picture on a grid of 4-pixel cells. Per cell it says whether a thing is centred
there, which noun, colour and pattern it has, where exactly its centre is and how large it is; per pixel it says
whether a thing covers it; over the whole picture it names the background. It is trained on freshly drawn scenes,
among them spoiled ones (half things, mixtures of two shapes, blobs, things run together), whose noun is "none": the
confidence of a found thing is the probability of its noun against all other nouns and "none".

    python -m attune.demo.evaluator            measure the shipped reader on held-out scenes
    python -m attune.demo.evaluator --train    train it again
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from . import world

WEIGHTS = Path(__file__).parent / "weights" / "reader.safetensors"
CELL = 4  # pixels per cell of the grid
CHUNK = 64  # pictures read at once
THERE = 0.3  # a thing is found where the heat is above this
SURE = 0.5  # a thing counts as its noun at this confidence
REACH = 1.3  # a thing's region ends at this many radii from its centre
RADIUS = 20.0  # pixels, the radius that log radius 0 stands for
NOUNS = (*world.NOUNS, "none")
COLOURS = (*world.COLOURS, "unclear")
PATTERNS = (*world.PATTERNS, "unclear")
BACKGROUNDS = tuple(world.BACKGROUNDS)


# --- what is read ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A thing in a picture: words, centre and radius in pixels, probability of the noun. Two-tone things are "unclear"."""

    noun: str
    colour: str
    pattern: str
    x: float
    y: float
    radius: float
    confidence: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows: things, surest first (unsure ones too), and the background's colour and pattern."""

    things: tuple[Found, ...]
    background: str
    background_pattern: str


@dataclass(frozen=True)
class Verdict:
    """What of a caption a picture shows: one entry per stated thing; ``None`` where the caption says nothing.

    ``bound`` is noun, colour and pattern all right on the same thing. What is unsaid of a thing counts as right.
    """

    present: tuple[bool, ...]
    colour: tuple[bool, ...]
    pattern: tuple[bool, ...]
    bound: tuple[bool, ...]
    relation: bool | None
    background: bool | None

    @property
    def all_present(self) -> bool:
        return all(self.present)

    @property
    def all_bound(self) -> bool:
        return all(self.bound)


def _verdict(matched: Sequence[Found | None], reading: Reading, caption: world.Caption) -> Verdict:
    pairs = list(zip(caption.things, matched, strict=True))
    present = tuple(f is not None for _, f in pairs)
    colour = tuple(s.colour is None or (f is not None and f.colour == s.colour) for s, f in pairs)
    pattern = tuple(s.pattern is None or (f is not None and f.pattern == s.pattern) for s, f in pairs)
    bound = tuple(all(right) for right in zip(present, colour, pattern, strict=True))
    relation = background = None
    if caption.relation is not None:
        first, second = matched[:2]
        axis = {"left": "x", "above": "y"}[caption.relation]
        relation = first is not None and second is not None and getattr(first, axis) < getattr(second, axis)
    if caption.background != (None, None):
        shown = (reading.background, reading.background_pattern)
        background = all(said is None or said == seen for said, seen in zip(caption.background, shown, strict=True))
    return Verdict(present, colour, pattern, bound, relation, background)


def judge(reading: Reading, caption: world.Caption) -> Verdict:
    """Hold a reading against a caption, giving every stated thing its own found one in the caption's best favour."""
    sure = [t for t in reading.things if t.confidence >= SURE]
    choices = [[None, *(t for t in sure if t.noun == stated.noun)] for stated in caption.things]

    def favour(verdict: Verdict) -> tuple[int, int, int, bool]:
        attributes = sum(verdict.colour) + sum(verdict.pattern)
        return sum(verdict.present), sum(verdict.bound), attributes, bool(verdict.relation)

    verdicts = []
    for matched in itertools.product(*choices):
        taken = [id(t) for t in matched if t is not None]
        if len(set(taken)) == len(taken):
            verdicts.append(_verdict(matched, reading, caption))
    return max(verdicts, key=favour)


# --- the net --------------------------------------------------------------------------------------------------------


class Maps(NamedTuple):
    """What the net says of ``B`` pictures of ``H x W`` pixels, that is ``h x w`` cells. All but offset and size are logits."""

    heat: Tensor  # [B, h, w], a thing is centred here
    noun: Tensor  # [B, 9, h, w]
    colour: Tensor  # [B, 9, h, w]
    pattern: Tensor  # [B, 5, h, w]
    offset: Tensor  # [B, 2, h, w], x and y from the cell's centre to the thing's, in cells
    size: Tensor  # [B, h, w], log of radius / RADIUS
    foreground: Tensor  # [B, H, W], a thing covers this pixel
    background: Tensor  # [B, 4], colour
    background_pattern: Tensor  # [B, 4]


def _layer(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 if stride == 1 else 0, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = _layer(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class Evaluator(nn.Module):
    """Pictures ``[B, 3, H, W]`` in [0, 1], sides divisible by 8, to `Maps`."""

    PARTS = (1, len(NOUNS), len(COLOURS), len(PATTERNS), 2, 1, len(BACKGROUNDS), len(world.PATTERNS), CELL * CELL)

    def __init__(self, fine: int = 48, coarse: int = 80):
        super().__init__()
        self.cells = nn.Sequential(_layer(3, fine, CELL, CELL), _layer(fine, fine))
        self.wide = nn.Sequential(_layer(fine, coarse, 2, 2), *(_Residual(coarse) for _ in range(3)))
        self.merge = _layer(coarse + fine, 64)
        self.heads = nn.Conv2d(64, sum(self.PARTS), 1)
        nn.init.constant_(self.heads.bias[:1], -3.0)  # things are rare

    def forward(self, images: Tensor) -> Maps:
        cells = self.cells(images * 2 - 1)
        wide = F.interpolate(self.wide(cells), scale_factor=2.0, mode="nearest")
        maps = self.heads(self.merge(torch.cat((wide, cells), dim=1))).float()
        heat, noun, colour, pattern, offset, size, ground, surface, pixels = maps.split(self.PARTS, dim=1)
        foreground = F.pixel_shuffle(pixels, CELL)
        free = F.avg_pool2d(torch.sigmoid(-foreground.detach()), CELL) + 1e-3  # share of each cell that is background
        free = free / free.sum(dim=(2, 3), keepdim=True)
        background, background_pattern = ((x * free).sum(dim=(2, 3)) for x in (ground, surface))
        return Maps(heat[:, 0], noun, colour, pattern, offset, size[:, 0], foreground[:, 0], background, background_pattern)


def load_evaluator(path: str | Path | None = None) -> Evaluator:
    """The trained reader, ready to read (default: the shipped weights)."""
    evaluator = Evaluator()
    with safe_open(str(path or WEIGHTS), framework="pt") as file:
        version = (file.metadata() or {}).get("data_version")
        if version != world.DATA_VERSION:
            raise ValueError(f"{path or WEIGHTS} reads version {version} of the world, which is now {world.DATA_VERSION}")
        evaluator.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return evaluator.to(memory_format=torch.channels_last).eval().requires_grad_(False)


# --- reading --------------------------------------------------------------------------------------------------------


def _channels_first(images: Tensor) -> Tensor:
    """``float [B, 3, H, W]`` in [0, 1] from that or from ComfyUI's ``[B, H, W, 3]``."""
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % 8 or images.shape[3] % 8:
        raise ValueError(f"pictures must be [B, 3, H, W] or [B, H, W, 3] with sides divisible by 8, not {list(images.shape)}")
    return images.float().clamp(0, 1)


def _look(evaluator: Evaluator, images: Tensor) -> Iterator[tuple[Reading, Tensor]]:
    """Each picture's reading and its foreground logits ``[H, W]``."""
    parameter = next(evaluator.parameters())
    for chunk in _channels_first(images).split(CHUNK):
        with torch.no_grad():
            maps = evaluator(chunk.to(parameter.device).contiguous(memory_format=torch.channels_last))
        heat = maps.heat
        peaks = (heat == F.max_pool2d(heat[:, None], 7, 1, 3)[:, 0]) & (heat > math.log(THERE / (1 - THERE)))
        for i in range(len(chunk)):
            rows, columns = peaks[i].nonzero(as_tuple=True)
            share, noun = maps.noun[i, :, rows, columns].softmax(dim=0)[:-1].max(dim=0)
            colour, pattern = (m[i, :, rows, columns].argmax(dim=0).tolist() for m in (maps.colour, maps.pattern))
            offset, size = maps.offset[i, :, rows, columns], maps.size[i, rows, columns]
            x, y = (columns + 0.5 + offset[0]) * CELL, (rows + 0.5 + offset[1]) * CELL
            numbers = torch.stack((x, y, size.exp() * RADIUS, share), dim=1).tolist()
            words = zip(noun.tolist(), colour, pattern, strict=True)
            things = [Found(NOUNS[n], COLOURS[c], PATTERNS[p], *v) for (n, c, p), v in zip(words, numbers, strict=True)]
            things.sort(key=lambda t: -t.confidence)
            ground, surface = maps.background[i].argmax().item(), maps.background_pattern[i].argmax().item()
            yield Reading(tuple(things), BACKGROUNDS[ground], world.PATTERNS[surface]), maps.foreground[i]


def _split_foreground(reading: Reading, foreground: Tensor) -> Tensor:
    """Foreground pixels ``[H, W]`` (logits) shared out to the nearest thing, measured in its radii: ``bool [n, H, W]``."""
    if not reading.things:
        return torch.zeros((0, *foreground.shape), dtype=torch.bool)
    x, y, radius = (torch.tensor([getattr(t, k) for t in reading.things])[:, None, None] for k in ("x", "y", "radius"))
    height, width = foreground.shape
    columns, rows = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    distance = torch.hypot(columns[None, None, :] - x, rows[None, :, None] - y) / radius
    nearest = torch.zeros_like(distance, dtype=torch.bool).scatter_(0, distance.argmin(dim=0, keepdim=True), True)
    return nearest & (distance < REACH) & (foreground.cpu() > 0)


def read(evaluator: Evaluator, images: Tensor) -> list[Reading]:
    """Read pictures ``[B, 3, H, W]`` or ``[B, H, W, 3]`` in [0, 1], sides divisible by 8."""
    return [reading for reading, _ in _look(evaluator, images)]


def regions(evaluator: Evaluator, images: Tensor) -> list[Tensor]:
    """Per picture the pixels of each thing, ``bool [n_things, H, W]``, in the order of the reading's things."""
    return [_split_foreground(*seen) for seen in _look(evaluator, images)]


# --- worse pictures -------------------------------------------------------------------------------------------------


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of ``[B, C, H, W]`` by ``sigma [B]`` pixels each."""
    steps = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-0.5 * (steps / sigma.clamp(min=0.05)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(images.shape[1], dim=0)[:, None]
    flat = F.pad(images.flatten(0, 1)[None], (4, 4, 4, 4), mode="replicate")
    flat = F.conv2d(flat, kernel[:, :, None, :], groups=len(kernel))
    return F.conv2d(flat, kernel[:, :, :, None], groups=len(kernel))[0].view_as(images)


def compress(images: Tensor, step: Tensor) -> Tensor:
    """What JPEG does to ``[B, C, H, W]``: 8x8 cosine coefficients rounded to ``step [B]``, coarser at high frequencies."""
    k = torch.arange(8.0)
    basis = torch.cos(math.pi / 8 * k[:, None] * (k + 0.5)) * torch.where(k == 0, 0.125, 0.25).sqrt()[:, None]
    b, c, h, w = images.shape
    coefficients = torch.einsum("ua,bcyaxd,vd->bcyxuv", basis, images.reshape(b, c, h // 8, 8, w // 8, 8), basis)
    steps = step.clamp(min=1e-4).view(b, 1, 1, 1, 1, 1) * (1 + 0.5 * (k[:, None] + k))
    rounded = (coefficients / steps).round() * steps
    return torch.einsum("ua,bcyxuv,vd->bcyaxd", basis, rounded, basis).reshape(b, c, h, w)


def degrade(images: Tensor) -> Tensor:
    """The fixed bad treatment of the accuracy table: blur of 1 pixel, then coarse compression."""
    every = torch.ones(len(images))
    return compress(blur(images, every), 0.06 * every).clamp(0, 1)


def _wear(images: Tensor, rng: torch.Generator) -> Tensor:
    """Random wear of training pictures ``[B, 3, H, W]``: blur, lost detail, compression, noise, light and colour shifts."""
    b, _, h, w = images.shape

    def some(share: float, *shape: int) -> Tensor:
        """Uniform in [0, 1) for a share of the pictures, else 0: ``[B, *shape]``."""
        chosen = torch.rand((b, *(1 for _ in shape)), generator=rng) < share
        return torch.rand((b, *shape), generator=rng) * chosen

    images = blur(images, 1.8 * some(0.4))
    images = torch.where(some(0.3, 1, 1, 1) > 0, _resample(images, 0.4 + 0.5 * torch.rand((), generator=rng).item()), images)
    images = compress(images, 0.12 * some(0.4))
    blotches = F.interpolate(torch.randn((b, 3, 12, 12), generator=rng), size=(h, w), mode="bilinear")
    grain = torch.randn(images.shape, generator=rng)
    images = images + 0.08 * some(0.4, 1, 1, 1) * grain + 0.07 * some(0.4, 1, 1, 1) * blotches
    contrast = 1 + 0.15 * (some(0.5, 1, 1, 1) - some(0.5, 1, 1, 1))
    light = 0.08 * (some(0.5, 1, 1, 1) - some(0.5, 1, 1, 1)) + 0.05 * (some(0.5, 3, 1, 1) - some(0.5, 3, 1, 1))
    return ((images - 0.5) * contrast + 0.5 + light).clamp(0, 1)


def _resample(images: Tensor, scale: float) -> Tensor:
    """Shrink and enlarge again."""
    small = F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
    return F.interpolate(small, size=images.shape[2:], mode="bilinear")


def _warp(images: Tensor, centres: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Push half of the pictures ``[B, C, H, W]`` about by a few pixels, and the centres ``[B, n, 2]`` (x, y) with them."""
    b, _, h, w = images.shape
    strength = 2.2 * torch.rand((b, 1, 1, 1), generator=rng) * (torch.rand((b, 1, 1, 1), generator=rng) < 0.5)
    coarse = torch.randn((b, 2, 5, 5), generator=rng) + torch.randn((b, 2, 1, 1), generator=rng)
    push = F.interpolate(coarse * strength, size=(h, w), mode="bicubic")
    scale = torch.tensor([2 / w, 2 / h])
    columns, rows = torch.meshgrid(torch.arange(w) + 0.5, torch.arange(h) + 0.5, indexing="xy")
    places = torch.stack((columns, rows), dim=-1) + push.permute(0, 2, 3, 1)
    moved = F.grid_sample(images, places * scale - 1, padding_mode="border", align_corners=False)
    new = centres
    for _ in range(3):  # the new place p of a centre c solves p + push(p) = c
        pushed = F.grid_sample(push, (new * scale - 1)[:, None], padding_mode="border", align_corners=False)
        new = centres - pushed[:, :, 0].transpose(1, 2)
    return moved, new


# --- training pictures ----------------------------------------------------------------------------------------------


def _distance(thing: world.Thing, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance, in pixels, to a thing at pixel places ``x``, ``y``."""
    return world._signed_distance(thing.noun, x - thing.x, y - thing.y, thing.radius)


def _pixels(thing: world.Thing) -> Tensor:
    """The pixels of a clean thing: ``bool [SIZE, SIZE]``."""
    return torch.from_numpy(_distance(thing, *np.meshgrid(world._GRID, world._GRID)) < 0)


def _spoil(thing: world.Thing, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance, in pixels, to something that was a thing: half of it, a mixture, a blob or two run together."""
    clean = _distance(thing, x, y)
    other = replace(thing, noun=str(rng.choice([n for n in world.NOUNS if n != thing.noun])))
    kind = rng.choice(("mixture", "half", "blob", "pair"))
    if kind == "mixture":
        share = rng.uniform(0.35, 0.65)
        return (1 - share) * clean + share * _distance(other, x, y)
    if kind == "half":
        for _ in range(20):
            angle, off = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3) * thing.radius
            cut = np.maximum(clean, (x - thing.x) * np.cos(angle) + (y - thing.y) * np.sin(angle) - off)
            if 0.3 < (cut < 0).sum() / (clean < 0).sum() < 0.7:
                break
        return cut
    if kind == "blob":
        turn = np.arctan2(y - thing.y, x - thing.x)
        waves = [rng.uniform(0.05, 0.18) * np.cos(k * turn + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3, 4, 5)]
        softness = np.exp(rng.uniform(0, 2))
        return (np.hypot(x - thing.x, y - thing.y) - thing.radius * (0.75 + sum(waves))) / softness
    towards = np.arctan2(world.SIZE / 2 - thing.y, world.SIZE / 2 - thing.x) + rng.uniform(-0.8, 0.8)
    step = rng.uniform(0.5, 1.0) * thing.radius
    beside = replace(other, x=thing.x + step * np.cos(towards), y=thing.y + step * np.sin(towards))
    return np.minimum(clean, _distance(beside, x, y))


def draw_training_picture(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, world.Scene, list[Found]]:
    """A scene of the splits ``train`` and ``tune`` with some things left out, spoiled or in two surfaces.

    Gives the picture ``float32 [SIZE, SIZE, 3]`` in [0, 1], what things cover of it ``[SIZE, SIZE]``, the scene whose
    background it has, and the things as they should be read (confidence 0 for spoiled ones).
    """
    while (scene := world.sample_scene(rng)).split == "test":
        pass
    picture = world.render(replace(scene, things=())).astype(np.float32)
    covered, truth = np.zeros((world.SIZE, world.SIZE), np.float32), []
    for thing in scene.things:
        if rng.random() < 0.05:
            continue
        x0, y0 = (max(int(v - 2 * thing.radius), 0) for v in (thing.x, thing.y))
        x1, y1 = (min(int(v + 2 * thing.radius) + 1, world.SIZE) for v in (thing.x, thing.y))
        x, y = np.meshgrid(world._GRID[x0:x1], world._GRID[y0:y1])
        read_as = Found(thing.noun, thing.colour, thing.pattern, thing.x, thing.y, thing.radius, 1.0)
        fate = rng.random()
        distance = _spoil(thing, rng, x, y) if fate < 0.2 else _distance(thing, x, y)
        if 0.2 <= fate < 0.3:  # still what it was, with a touch of something else
            share = rng.uniform(0, 0.15)
            distance = (1 - share) * distance + share * _distance(replace(thing, noun=str(rng.choice(world.NOUNS))), x, y)
        alpha = np.clip(0.5 - distance, 0, 1)
        if fate < 0.2:
            u, w = (float((alpha * axis).sum() / max(alpha.sum(), 1)) for axis in (x, y))
            read_as = Found("none", thing.colour, thing.pattern, u, w, thing.radius, 0.0)
        surface = world._surface(thing.colour, world.COLOURS[thing.colour], thing.pattern, x, y)
        if rng.random() < 0.08:  # two surfaces side by side
            colour = thing.colour if rng.random() < 0.4 else str(rng.choice(list(world.COLOURS)))
            pattern = thing.pattern if rng.random() < 0.4 else str(rng.choice(world.PATTERNS))
            angle = rng.uniform(0, 2 * np.pi)
            side = ((x - thing.x) * np.cos(angle) + (y - thing.y) * np.sin(angle) > 0)[..., None]
            surface = np.where(side, world._surface(colour, world.COLOURS[colour], pattern, x, y), surface)
            if colour != thing.colour:
                read_as = replace(read_as, colour="unclear")
            if pattern != thing.pattern:
                read_as = replace(read_as, pattern="unclear")
        box = picture[y0:y1, x0:x1]
        box[:] = box * (1 - alpha[..., None]) + (surface + scene.tint).clip(0, 255) * alpha[..., None]
        covered[y0:y1, x0:x1] = np.maximum(covered[y0:y1, x0:x1], alpha)
        truth.append(read_as)
    return picture / 255, covered, scene, truth


def _loss(evaluator: Evaluator, count: int, seed: int) -> tuple[Tensor, dict[str, float]]:
    """The loss on ``count`` fresh pictures, and its parts."""
    images, covered, things, backgrounds = training_batch(count, seed)
    with torch.autocast("cpu", torch.bfloat16):
        maps = evaluator(images.contiguous(memory_format=torch.channels_last))
    real, x, y, radius, *words = things.unbind(dim=2)  # each [B, 3]
    h, w = maps.heat.shape[1:]
    columns, rows = torch.arange(w) + 0.5, torch.arange(h) + 0.5
    dx = x[:, :, None, None] / CELL - columns[None, None, None, :]  # [B, 3, 1, w], in cells
    dy = y[:, :, None, None] / CELL - rows[None, None, :, None]
    far = (real[:, :, None, None] == 0) * 1e6
    square = dx**2 + dy**2 + far  # [B, 3, h, w]
    heat = torch.exp(-square / (2 * (0.3 * radius[:, :, None, None].clamp(min=8) / CELL) ** 2)).amax(dim=1)
    nearest = square.min(dim=1)
    owner, mine = nearest.indices, nearest.values < 1.5**2
    centre = nearest.values < 0.5

    chance = torch.sigmoid(maps.heat)
    hit = (1 - chance) ** 2 * F.logsigmoid(maps.heat) * centre
    miss = (1 - heat) ** 4 * chance**2 * F.logsigmoid(-maps.heat) * ~centre
    parts = {"heat": -(hit + miss).sum() / centre.sum()}
    cells = mine.nonzero(as_tuple=True)
    index = (cells[0], owner[cells])
    for name, scores, word in zip(("noun", "colour", "pattern"), (maps.noun, maps.colour, maps.pattern), words, strict=True):
        parts[name] = F.cross_entropy(scores.permute(0, 2, 3, 1)[cells], word[index].long())
    empty = (heat < 0.05).nonzero(as_tuple=True)
    parts["empty"] = 0.1 * F.cross_entropy(maps.noun.permute(0, 2, 3, 1)[empty], torch.full_like(empty[0], NOUNS.index("none")))
    place = torch.stack((x[index] / CELL - columns[cells[2]], y[index] / CELL - rows[cells[1]]), dim=1)
    parts["place"] = F.l1_loss(maps.offset.permute(0, 2, 3, 1)[cells], place)
    parts["size"] = F.l1_loss(maps.size[cells], (radius[index] / RADIUS).log())
    parts["cover"] = 2 * F.binary_cross_entropy_with_logits(maps.foreground, covered)
    parts["ground"] = F.cross_entropy(maps.background, backgrounds[:, 0])
    parts["surface"] = F.cross_entropy(maps.background_pattern, backgrounds[:, 1])
    return torch.stack(list(parts.values())).sum(), {name: part.item() for name, part in parts.items()}


def training_batch(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Worn pictures ``[B, 3, S, S]``, what things cover of them ``[B, S, S]``, things and backgrounds.

    Things are ``[B, 3, 7]``: is real, x, y, radius, noun, colour, pattern; backgrounds ``int [B, 2]``: colour, pattern.
    """
    rng, generator = np.random.default_rng([7, seed]), torch.Generator().manual_seed(seed)
    pictures, ignores_output, backgrounds, things = [], [], [], torch.zeros(count, 3, 7)
    for i in range(count):
        picture, covered, scene, truth = draw_training_picture(rng)
        pictures.append(picture)
        ignores_output.append(covered[..., None])
        backgrounds.append((BACKGROUNDS.index(scene.background), world.PATTERNS.index(scene.background_pattern)))
        for j, t in enumerate(truth):
            words = NOUNS.index(t.noun), COLOURS.index(t.colour), PATTERNS.index(t.pattern)
            things[i, j] = torch.tensor((1.0, t.x, t.y, t.radius, *words))
    both = torch.from_numpy(np.concatenate((np.stack(pictures), np.stack(ignores_output)), axis=-1)).permute(0, 3, 1, 2)
    both, centres = _warp(both.contiguous(), things[:, :, 1:3], generator)
    things[:, :, 1:3] = centres
    return _wear(both[:, :3], generator), both[:, 3], things, torch.tensor(backgrounds)


def train(minutes: float, batch: int = 32) -> Evaluator:
    """Train for that long in all, going on from the last checkpoint; gives the average of the weights over the last steps."""
    from ..tools.training.shapes import Stage

    torch.manual_seed(0)
    reader = Evaluator().to(memory_format=torch.channels_last)
    stage = Stage("evaluator", {"evaluator": reader}, minutes, 4e-3)
    stage.run(lambda step: _loss(reader, batch, step), batch)
    averaged: Any = stage.average["evaluator"]
    torch.optim.swa_utils.update_bn((training_batch(batch, 1_000_000 + i)[0] for i in range(60)), averaged)
    return averaged.eval()


# --- measuring ------------------------------------------------------------------------------------------------------

SHARES = ("recall", "precision", "noun", "colour", "pattern", "background colour", "background pattern")


def measure(evaluator: Evaluator, scenes: Sequence[world.Scene], worse: bool = False) -> dict[str, float]:
    """Accuracies, shares in [0, 1] but for ``centre error`` (pixels). A thing is found within half its radius."""
    tally: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(scenes), CHUNK):
        part = scenes[start : start + CHUNK]
        images = torch.from_numpy(np.stack([world.render(s) for s in part])).permute(0, 3, 1, 2).float() / 255
        seen = _look(evaluator, degrade(images) if worse else images)
        for scene, (reading, foreground) in zip(part, seen, strict=True):
            masks = _split_foreground(reading, foreground)
            sure = [i for i, t in enumerate(reading.things) if t.confidence >= SURE]
            for thing in scene.things:
                gaps = {i: math.hypot(reading.things[i].x - thing.x, reading.things[i].y - thing.y) for i in sure}
                best = min(gaps, key=gaps.__getitem__, default=-1)
                tally["recall"].append(best >= 0 and gaps[best] < thing.radius / 2)
                if not tally["recall"][-1]:
                    continue
                sure.remove(best)
                tally["precision"].append(True)
                for word in ("noun", "colour", "pattern"):
                    tally[word].append(getattr(reading.things[best], word) == getattr(thing, word))
                tally["centre error"].append(gaps[best])
                mask, true = masks[best], _pixels(thing)
                tally["region IoU"].append(((mask & true).sum() / (mask | true).sum()).item())
            tally["precision"] += [False] * len(sure)
            tally["background colour"].append(reading.background == scene.background)
            tally["background pattern"].append(reading.background_pattern == scene.background_pattern)
    return {name: float(np.mean(values)) for name, values in tally.items()}


def spoiled_named(evaluator: Evaluator, count: int, seed: int = 5) -> float:
    """The share of spoiled things that the reader takes for a shape: lower is better."""
    rng = np.random.default_rng([11, seed])
    named: list[bool] = []
    while len(named) < count:
        picture, _, _, truth = draw_training_picture(rng)
        (reading,) = read(evaluator, torch.from_numpy(picture)[None])
        for spoiled in (t for t in truth if t.noun == "none"):
            near = [f for f in reading.things if math.hypot(f.x - spoiled.x, f.y - spoiled.y) < spoiled.radius / 2]
            named.append(any(f.confidence >= SURE for f in near))
    return float(np.mean(named))


def report(evaluator: Evaluator, count: int) -> tuple[str, dict[str, dict[str, float]]]:
    """The accuracy table on ``count`` held-out scenes, as text and as numbers."""
    held_out = list(itertools.islice(world.scenes("test", 0), count))
    unseen = [s for s in held_out if any((t.colour, t.noun) in world.HELD_OUT_PAIRS for t in s.things)]
    columns = {
        "clean": measure(evaluator, held_out),
        "unseen pairs": measure(evaluator, unseen),
        "degraded": measure(evaluator, held_out, worse=True),
    }
    lines = [f"{count} held-out scenes, {len(unseen)} with a colour-noun pair that the bundled model never saw"]
    lines.append(f"{'':20}" + "".join(f"{name:>14}" for name in columns))
    for row in (*SHARES, "region IoU", "centre error"):
        cells = (f"{c[row]:.2f} px" if row == "centre error" else f"{100 * c[row]:.2f} %" for c in columns.values())
        lines.append(f"{row:20}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines), columns


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="attune.demo.evaluator", description="Train or measure the reader of pictures.")
    parser.add_argument("--train", action="store_true", help="train it (goes on from a checkpoint) and save the weights")
    parser.add_argument("--minutes", type=float, default=12, help="training time in all")
    parser.add_argument("--scenes", type=int, default=2000, help="held-out scenes to measure on")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    args = parser.parse_args(argv)
    evaluator = train(args.minutes).half().float() if args.train else load_evaluator(args.weights)  # rounded as it is kept
    table, metrics = report(evaluator, args.scenes)
    print(table)
    print(f"spoiled shapes taken for a shape: {100 * spoiled_named(evaluator, args.scenes // 4):.1f} %")
    if args.train:
        state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in evaluator.state_dict().items()}
        command = f"attune.demo.evaluator --train --minutes {args.minutes:g}"
        metadata = {"data_version": world.DATA_VERSION, "command": command, "metrics": json.dumps(metrics)}
        args.weights.parent.mkdir(parents=True, exist_ok=True)
        args.weights.write_bytes(save(state, metadata))
    return 1 if min(metrics["clean"][row] for row in SHARES) < 0.98 else 0


if __name__ == "__main__":
    sys.exit(main())
