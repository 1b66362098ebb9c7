"""A reader of pictures of the world of shapes: which things are where, and does the picture show what a caption says.

One small convolutional net looks at a picture on a grid of 4-pixel cells. Per cell it says whether a thing is centred
there, which noun, colour and pattern it has, where exactly its centre is and how large it is; per pixel it says
whether a thing covers it; over the whole picture it names the background. Its training shows it spoiled things too (half
things, mixtures of two shapes, blobs, things run together), whose noun is "none": the confidence of a found thing is the
probability of its noun against all other nouns and "none". ``python3 run.py reader`` measures and trains it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import world
from .reading import channels_first, trained

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


class Reader(nn.Module):
    """Pictures ``[B, 3, H, W]`` in [0, 1], sides divisible by 8, to `Maps`."""

    PARTS = (1, len(NOUNS), len(COLOURS), len(PATTERNS), 2, 1, len(BACKGROUNDS), len(world.PATTERNS), CELL * CELL)

    def __init__(self, fine: int = 48, coarse: int = 80):
        super().__init__()
        self.cells = nn.Sequential(_layer(3, fine, CELL, CELL), _layer(fine, fine))
        self.wide = nn.Sequential(_layer(fine, coarse, 2, 2), *(_Residual(coarse) for _ in range(3)))
        self.merge = _layer(coarse + fine, 64)
        self.heads = nn.Conv2d(64, sum(self.PARTS), 1)
        assert self.heads.bias is not None
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


def load_reader(path: str | Path | None = None) -> Reader:
    """The trained reader, ready to read (default: the shipped weights)."""
    return trained(Reader(), path or WEIGHTS, world.DATA_VERSION)


# --- reading --------------------------------------------------------------------------------------------------------


def look(reader: Reader, images: Tensor) -> Iterator[tuple[Reading, Tensor]]:
    """Each picture's reading and its foreground logits ``[H, W]``."""
    parameter = next(reader.parameters())
    for chunk in channels_first(images, 8).split(CHUNK):
        with torch.no_grad():
            maps = reader(chunk.to(parameter.device).contiguous(memory_format=torch.channels_last))
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


def split_foreground(reading: Reading, foreground: Tensor) -> Tensor:
    """Foreground pixels ``[H, W]`` (logits) shared out to the nearest thing, measured in its radii: ``bool [n, H, W]``."""
    if not reading.things:
        return torch.zeros((0, *foreground.shape), dtype=torch.bool)
    x, y, radius = (torch.tensor([getattr(t, k) for t in reading.things])[:, None, None] for k in ("x", "y", "radius"))
    height, width = foreground.shape
    columns, rows = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    distance = torch.hypot(columns[None, None, :] - x, rows[None, :, None] - y) / radius
    nearest = torch.zeros_like(distance, dtype=torch.bool).scatter_(0, distance.argmin(dim=0, keepdim=True), True)
    return nearest & (distance < REACH) & (foreground.cpu() > 0)


def read(reader: Reader, images: Tensor) -> list[Reading]:
    """Read pictures ``[B, 3, H, W]`` or ``[B, H, W, 3]`` in [0, 1], sides divisible by 8."""
    return [reading for reading, _ in look(reader, images)]


def regions(reader: Reader, images: Tensor) -> list[Tensor]:
    """Per picture the pixels of each thing, ``bool [n_things, H, W]``, in the order of the reading's things."""
    return [split_foreground(*seen) for seen in look(reader, images)]
