"""A reader of pictures of stickers: which things are where, with which details, in which place; and does that fit a caption.

One small convolutional net looks at a picture on a grid of 8-pixel cells. Per cell it says whether a thing is centred
there, its noun, colour, accessory and style, where exactly its centre is and how large it is, and which of its 4-pixel
quarters a thing covers; over the whole picture it names the place and the place's style. It is trained on drawn pictures,
among them spoiled ones (halves, chimeras, mixtures, melted things), whose noun is "none": the confidence of a found thing
is the probability of its noun against all other nouns and "none".
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

from ..reading import channels_first, trained
from . import world

WEIGHTS = Path(__file__).parent / "weights" / "reader.safetensors"
CELL = 8  # pixels per cell of the grid
QUARTER = 4  # pixels per square of the map of what things cover
CHUNK = 32  # pictures read at once
THERE = 0.3  # a thing is found where the heat is above this
SURE = 0.5  # a thing counts as its noun at this confidence
WIDTH = 96.0  # pixels, the width that log width 0 stands for
INNER = 0.35 * WIDTH / CELL  # cells; a thing's inner cells are nearer to its centre than this, for width `WIDTH`
REACH = 0.75  # a thing's region ends at this many widths from its centre
NOUNS = (*world.NOUNS, "none")
COLOURS = (*world.COLOURS, "unclear")
ACCESSORIES = ("", *world.ACCESSORIES)
STYLES = ("", *world.STYLES)
PLACES = world.PLACES


# --- what is read ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A thing in a picture: words (empty: none), centre and longer side in pixels, probability of the noun."""

    noun: str
    colour: str
    accessory: str
    style: str
    x: float
    y: float
    width: float
    confidence: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows: things, surest first (unsure ones too), the place, and the place's style."""

    things: tuple[Found, ...]
    place: str
    style: str


@dataclass(frozen=True)
class Verdict:
    """What of a caption a picture shows: one entry per stated thing; ``None`` where the caption says nothing.

    ``bound`` is noun and every stated detail right on the same thing. What is unsaid of a thing counts as right.
    """

    present: tuple[bool, ...]
    colour: tuple[bool, ...]
    accessory: tuple[bool, ...]
    style: tuple[bool, ...]
    bound: tuple[bool, ...]
    relation: bool | None
    place: bool | None
    place_style: bool | None

    @property
    def all_present(self) -> bool:
        return all(self.present)

    @property
    def all_bound(self) -> bool:
        return all(self.bound)


def _verdict(matched: Sequence[Found | None], reading: Reading, caption: world.Caption) -> Verdict:
    pairs = list(zip(caption.things, matched, strict=True))
    right = {
        word: tuple(getattr(s, word) is None or (f is not None and getattr(f, word) == getattr(s, word)) for s, f in pairs)
        for word in ("colour", "accessory", "style")
    }
    present = tuple(f is not None for _, f in pairs)
    bound = tuple(all(each) for each in zip(present, *right.values(), strict=True))
    relation = None
    if caption.relation is not None:
        first, second = matched[:2]
        relation = first is not None and second is not None and first.x < second.x
    place = None if caption.place is None else reading.place == caption.place
    style = None if caption.style is None else reading.style == caption.style
    return Verdict(present, **right, bound=bound, relation=relation, place=place, place_style=style)


def judge(reading: Reading, caption: world.Caption) -> Verdict:
    """Hold a reading against a caption, giving every stated thing its own found one in the caption's best favour."""
    sure = [t for t in reading.things if t.confidence >= SURE]
    choices = [[None, *(t for t in sure if t.noun == stated.noun)] for stated in caption.things]

    def favour(verdict: Verdict) -> tuple[int, int, int, bool]:
        details = sum(verdict.colour) + sum(verdict.accessory) + sum(verdict.style)
        return sum(verdict.present), sum(verdict.bound), details, bool(verdict.relation)

    verdicts = []
    for matched in itertools.product(*choices):
        taken = [id(t) for t in matched if t is not None]
        if len(set(taken)) == len(taken):
            verdicts.append(_verdict(matched, reading, caption))
    return max(verdicts, key=favour)


def leaked(reading: Reading, caption: world.Caption) -> bool:
    """Whether something that the caption says of one thing is seen on another of its things, of which it does not say so."""
    sure = [t for t in reading.things if t.confidence >= SURE]
    for word in ("colour", "accessory", "style"):
        said = {getattr(stated, word) for stated in caption.things} - {None}
        own = {stated.noun: getattr(stated, word) for stated in caption.things}
        if any(t.noun in own and getattr(t, word) in said - {own[t.noun]} for t in sure):
            return True
    return False


# --- the net --------------------------------------------------------------------------------------------------------


class Maps(NamedTuple):
    """What the net says of ``B`` pictures on ``h x w`` cells. All but offset and size are logits."""

    heat: Tensor  # [B, h, w], a thing is centred here
    noun: Tensor  # [B, nouns, h, w]
    colour: Tensor  # [B, colours, h, w]
    accessory: Tensor  # [B, accessories, h, w]
    style: Tensor  # [B, styles, h, w]
    offset: Tensor  # [B, 2, h, w], x and y from the cell's centre to the thing's, in cells
    size: Tensor  # [B, h, w], log of width / WIDTH
    cover: Tensor  # [B, 2h, 2w], a thing covers this quarter
    place: Tensor  # [B, places]
    place_style: Tensor  # [B, styles]


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
    """Pictures ``[B, 3, H, W]`` in [0, 1], sides divisible by 16, to `Maps`."""

    PARTS = (1, len(NOUNS), len(COLOURS), len(ACCESSORIES), len(STYLES), 2, 1, 4, len(PLACES), len(STYLES))

    def __init__(self, fine: int = 32, middle: int = 64, coarse: int = 128):
        super().__init__()
        self.fine = nn.Sequential(_layer(3, fine, 4, 4), _layer(fine, fine), _layer(fine, middle, 2, 2))
        self.cells = nn.Sequential(_Residual(middle), _Residual(middle))
        self.wide = nn.Sequential(_layer(middle, coarse, 2, 2), *(_Residual(coarse) for _ in range(4)))
        self.merge = nn.Sequential(_layer(middle + coarse, middle), _Residual(middle))
        self.heads = nn.Conv2d(middle, sum(self.PARTS), 1)
        assert self.heads.bias is not None
        nn.init.constant_(self.heads.bias[:1], -3.0)  # things are rare

    def forward(self, images: Tensor) -> Maps:
        cells = self.cells(self.fine(images * 2 - 1))
        wide = F.interpolate(self.wide(cells), scale_factor=2.0, mode="nearest")
        maps = self.heads(self.merge(torch.cat((wide, cells), dim=1))).float()
        heat, noun, colour, accessory, style, offset, size, quarters, place, place_style = maps.split(self.PARTS, dim=1)
        cover = F.pixel_shuffle(quarters, 2)
        free = F.avg_pool2d(torch.sigmoid(-cover.detach()), 2) + 1e-3  # share of each cell that is the place's
        free = free / free.sum(dim=(2, 3), keepdim=True)
        place, place_style = ((x * free).sum(dim=(2, 3)) for x in (place, place_style))
        return Maps(heat[:, 0], noun, colour, accessory, style, offset, size[:, 0], cover[:, 0], place, place_style)


def load_reader(path: str | Path | None = None) -> Reader:
    """The trained reader, ready to read (default: the shipped weights)."""
    return trained(Reader(), path or WEIGHTS, world.DATA_VERSION)


# --- reading --------------------------------------------------------------------------------------------------------


def _look(reader: Reader, images: Tensor) -> Iterator[tuple[Reading, Tensor]]:
    """Each picture's reading and its cover logits ``[H / 4, W / 4]``."""
    parameter = next(reader.parameters())
    for chunk in channels_first(images, 16).split(CHUNK):
        with torch.no_grad():
            maps = reader(chunk.to(parameter.device).contiguous(memory_format=torch.channels_last))
        heat = maps.heat
        peaks = (heat == F.max_pool2d(heat[:, None], 5, 1, 2)[:, 0]) & (heat > math.log(THERE / (1 - THERE)))
        covered = F.avg_pool2d(maps.cover, 2) > 0
        down, across = torch.meshgrid(*(torch.arange(n, device=heat.device) for n in heat.shape[1:]), indexing="ij")
        for i in range(len(chunk)):
            rows, columns = peaks[i].nonzero(as_tuple=True)
            share, noun = maps.noun[i, :, rows, columns].softmax(dim=0)[:-1].max(dim=0)
            colour, accessory = (m[i, :, rows, columns].argmax(dim=0).tolist() for m in (maps.colour, maps.accessory))
            offset, size = maps.offset[i, :, rows, columns], maps.size[i, rows, columns]
            x, y = columns + 0.5 + offset[0], rows + 0.5 + offset[1]
            # A style is everywhere on a thing, so that all of its inner cells have a say.
            near = (
                torch.hypot(across + 0.5 - x[:, None, None], down + 0.5 - y[:, None, None]) < INNER * size.exp()[:, None, None]
            )
            inner = (near & covered[i]).float() + 1e-6 * near
            styles = torch.einsum("nhw,shw->ns", inner, maps.style[i]).argmax(dim=1).tolist()
            numbers = torch.stack((x * CELL, y * CELL, size.exp() * WIDTH, share), dim=1).tolist()
            words = zip(noun.tolist(), colour, accessory, styles, strict=True)
            things = [
                Found(NOUNS[n], COLOURS[c] if NOUNS[n] in world.OBJECTS else "", ACCESSORIES[a], STYLES[s], *v)
                for (n, c, a, s), v in zip(words, numbers, strict=True)
            ]
            things.sort(key=lambda t: -t.confidence)
            place = PLACES[int(maps.place[i].argmax())]
            style = STYLES[int(maps.place_style[i].argmax())] if place in world.SCENES else ""
            yield Reading(tuple(things), place, style), maps.cover[i]


def _split_cover(reading: Reading, cover: Tensor) -> Tensor:
    """Covered quarters (logits ``[h, w]``) shared out to the nearest thing, measured in its widths: ``bool [n, 4h, 4w]``."""
    height, width = (QUARTER * side for side in cover.shape)
    if not reading.things:
        return torch.zeros((0, height, width), dtype=torch.bool)
    x, y, size = (torch.tensor([getattr(t, k) for t in reading.things])[:, None, None] for k in ("x", "y", "width"))
    columns, rows = ((torch.arange(n) + 0.5) * QUARTER for n in (cover.shape[1], cover.shape[0]))
    distance = torch.hypot(columns[None, None, :] - x, rows[None, :, None] - y) / size
    nearest = torch.zeros_like(distance, dtype=torch.bool).scatter_(0, distance.argmin(dim=0, keepdim=True), True)
    mine = nearest & (distance < REACH) & (cover.cpu() > 0)
    return mine.repeat_interleave(QUARTER, dim=1).repeat_interleave(QUARTER, dim=2)


def read(reader: Reader, images: Tensor) -> list[Reading]:
    """Read pictures ``[B, 3, H, W]`` or ``[B, H, W, 3]`` in [0, 1], sides divisible by 16."""
    return [reading for reading, _ in _look(reader, images)]


def regions(reader: Reader, images: Tensor) -> list[Tensor]:
    """Per picture the pixels of each thing, ``bool [n_things, H, W]``, in the order of the reading's things."""
    return [_split_cover(*seen) for seen in _look(reader, images)]
