"""Maps of a run to labelled pictures and masks: what Show Attention Maps and Attention Segmentation give back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...methods import maps as maths
from ..prompts import compare_words
from .reading import attention, token_maps
from .record import Record

if TYPE_CHECKING:
    from ...language.words import Words

VIEWS = ("mean", "per layer", "per head", "per step")
MOST_ROWS = 128  # of pictures in a grid
# What a browser is given to look at: names, pictures, pixels of a map's and of a picture's longer side, and values of all maps together.
MOST_NAMES, MOST_PICTURES, SIDE, SMALL, MOST_VALUES = 48, 16, 64, 320, 2**18
COMPLETION, SMOOTHING = 4, 0.5  # S-CFG's


def _fits(record: Record, image: Tensor) -> Tensor:
    """The picture as three channels, after making sure that it can be the record's."""
    if len(image) != record.pictures:
        raise ValueError(
            f"the maps are of {record.pictures} pictures and the image input has {len(image)}: connect the decoded batch itself."
        )
    height, width = record.latent
    if abs(image.shape[1] * width - image.shape[2] * height) > max(image.shape[1:3]) * 0.05 * max(height, width):
        raise ValueError(
            "the image has another shape than the picture that the maps belong to: connect it before cropping or padding."
        )
    return image[..., :3].float().cpu()


def _title(text: str, width: int, height: int = 28) -> Tensor:
    """Words on a dark strip, ``[height, width, 3]``."""
    strip = Image.new("RGB", (width, height), (24, 24, 24))
    size = 17
    while size > 7 and ImageFont.load_default(size).getlength(text) > width - 8:
        size -= 1
    ImageDraw.Draw(strip).text((4, height // 2), text, (240, 240, 240), ImageFont.load_default(size), anchor="lm")
    return torch.from_numpy(np.asarray(strip).astype(np.float32) / 255)


def grid(rows: list[list[tuple[str, Tensor]]]) -> Tensor:
    """Titled tiles ``[B, H, W, 3]`` in rows, for every picture of the batch: ``[B, height, width, 3]``; tiles of a row are of one height."""
    lines = []
    for row in rows:
        tiles = []
        for text, tile in row:
            head = _title(text, tile.shape[2]).expand(len(tile), -1, -1, -1)
            tiles.append(torch.cat([head, tile], dim=1))
        lines.append(torch.cat(tiles, dim=2))
    width = max(line.shape[2] for line in lines)
    return torch.cat([torch.nn.functional.pad(line, (0, 0, 0, width - line.shape[2])) for line in lines], dim=1)


def show(record: Record, words: Words, image: Tensor, view: str = "mean") -> tuple[Tensor, Tensor]:
    """Heat grids ``[B, height, width, 3]`` and soft masks ``[words · B, H, W]`` (all pictures of a word together).

    Raises:
        ValueError: when image, words and maps do not belong together, or the view needs what was not kept.
    """
    compare_words("Show Attention Maps", words, record.cond)
    image = _fits(record, image)
    size = (image.shape[1], image.shape[2])
    phrases = [p.columns for p in words.phrases]

    def soft(part: Record, step: int | None = None) -> Tensor:
        tokens = token_maps(part, words.total, step=step)
        return maths.minmax(maths.resize(maths.phrase_maps(tokens, phrases), size)).cpu()

    def row(name: str, maps: Tensor) -> list[tuple[str, Tensor]]:
        tiles = [(f"{name}{p.text}", maths.heat(image, maps[:, i])) for i, p in enumerate(words.phrases)]
        return tiles

    mean = soft(record)
    rows = [[("picture", image), *row("", mean)]]
    if view == "per layer":
        rows += [[(site, image), *row("", soft(record.only(site)))] for site in record.cross]
    elif view == "per head":
        heads = {site: next(iter(place.frames.values())).shape[1] for site, place in record.cross.items()}
        if set(heads.values()) == {1}:
            raise ValueError("these maps are averages over heads; connect Capture Attention Maps to see single heads.")
        if sum(heads.values()) > MOST_ROWS:
            raise ValueError(
                f"per head would be {sum(heads.values())} rows of pictures, and {MOST_ROWS} are the most: name fewer layers in Capture "
                "Attention Maps, for example “middle.*.*”."
            )
        rows += [
            [(f"{site}:{h}", image), *row("", soft(record.only(site, h)))]
            for site, count in heads.items()
            for h in range(count)
        ]
    elif view == "per step":
        if record.steps == [-1]:
            raise ValueError(
                "single steps were not kept: set steps to “every step” (or every 2nd, …) in Capture Attention Maps."
            )
        rows += [[(f"step {step + 1}", image), *row("", soft(record, step))] for step in record.steps]
    return grid(rows), mean.transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True)
class Explained:
    """What there is to know of every place of the pictures.

    Attributes:
        names: the chosen phrases, of which there are ``chosen``, then the prompt's other words.
        maps: ``[B, names, h, w]``, the part of its attention that each place gives to them.
        pictures: ``[B, H, W, 3]``, small.
        total: pictures that there are; ``B`` are the first of them.
    """

    names: tuple[str, ...]
    chosen: int
    maps: Tensor
    pictures: Tensor
    total: int


def explained(record: Record, words: Words, image: Tensor) -> Explained:
    """Every word's map and the pictures, small enough for a browser: at most `MOST_NAMES`, `MOST_PICTURES` and `MOST_VALUES`.

    Raises:
        ValueError: when image, words and maps do not belong together.
    """
    image = _fits(record, image)[:MOST_PICTURES]
    taken = {c for phrase in words.phrases for c in phrase.columns}
    others = {w.text: w for w in words.words if w.columns and taken.isdisjoint(w.columns)}
    every = (*words.phrases, *others.values())[:MOST_NAMES]
    given = attention(record, words.total)[: len(image)]
    maps = torch.stack([given[:, list(p.columns)].sum(dim=1) for p in every], dim=1).cpu()
    side = min(SIDE, int((MOST_VALUES / (maps.shape[0] * maps.shape[1])) ** 0.5))
    chosen = min(len(words.phrases), len(every))
    return Explained(tuple(p.text for p in every), chosen, _within(maps, side), _small(image), record.pictures)


def _small(image: Tensor) -> Tensor:
    return _within(image.movedim(3, 1), SMALL).movedim(1, 3)


def _within(tiles: Tensor, side: int) -> Tensor:
    """``[B, n, h, w]`` with no side longer than ``side``."""
    factor = side / max(tiles.shape[-2:])
    if factor >= 1:
        return tiles
    return torch.nn.functional.interpolate(tiles, size=[max(1, round(n * factor)) for n in tiles.shape[-2:]], mode="area")


def segmentation(record: Record, words: Words | None, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coloured regions ``[B, height, width, 3]``, hard masks ``[words · B, H, W]``, foreground masks ``[B, H, W]``.

    Without words, foreground against background.

    Raises:
        ValueError: when image, words and maps do not belong together.
    """
    if words is not None:
        compare_words("Attention Segmentation", words, record.cond)
    image = _fits(record, image)
    size = (image.shape[1], image.shape[2])
    if words is None:
        tokens, names = token_maps(record, None, COMPLETION, SMOOTHING, against_start=True), ["foreground"]
        labels = maths.foreground(tokens, size)
    else:
        tokens, names = token_maps(record, words.total, COMPLETION, SMOOTHING), [p.text for p in words.phrases]
        labels = maths.segment(tokens, [p.columns for p in words.phrases], size)
    labels = labels.cpu()
    masks = maths.masks(labels, len(names))
    painted = maths.paint(image, labels)
    legend = torch.cat([_swatch("background", 0, painted)] + [_swatch(n, i + 1, painted) for i, n in enumerate(names)], dim=0)
    legend = legend.expand(len(painted), -1, -1, -1)
    return torch.cat([painted, legend], dim=1), masks.flatten(0, 1), (labels > 0).float()


def _swatch(name: str, label: int, like: Tensor, height: int = 28) -> Tensor:
    """A line of the legend: a square of colour and a name, ``[height, width, 3]``."""
    strip = _title("      " + name, like.shape[2], height).clone()
    colour = maths.COLOURS[0 if label == 0 else (label - 1) % (len(maths.COLOURS) - 1) + 1]
    strip[6:-6, 6:22] = torch.tensor(colour)
    return strip
