"""Drawings as a bad generator would make them, so that the reader learns what is not a thing, or not of one colour."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image
from scipy import ndimage

from ....demo.stickers.world import COLOURS, NOUNS, OBJECTS, Thing
from .drawings import drawing
from .styles import smooth_noise

SIDE = 256
KINDS = ("half", "chimera", "mixture", "melted", "blob")


def _square(thing: Thing) -> np.ndarray:
    """The drawing in the middle of a square: ``float [SIDE, SIDE, 4]`` in [0, 255]."""
    picture = drawing(thing.noun, thing.drawing, thing.colour, thing.accessory)
    scale = SIDE / max(picture.size)
    picture = picture.resize([max(1, round(s * scale)) for s in picture.size], Image.Resampling.BILINEAR)
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return np.asarray(canvas, np.float32)


def _side(rng: np.random.Generator, off: float) -> np.ndarray:
    """One side of a random line near the middle: ``bool [SIDE, SIDE, 1]``."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    return ((x * np.cos(angle) + y * np.sin(angle)) / SIDE > rng.uniform(-off, off))[..., None]


def _over(picture: np.ndarray, other: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """Both in one, ``share`` of the first; colours weigh by how much each covers."""
    first, second = share * picture[..., 3:], (1 - share) * other[..., 3:]
    cover = first + second
    colours = (picture[..., :3] * first + other[..., :3] * second) / np.maximum(cover, 1e-3)
    return np.concatenate((colours, cover), axis=-1)


def spoil(thing: Thing, rng: np.random.Generator) -> tuple[Image.Image, str]:
    """A spoiled drawing of a thing, and how: one of `KINDS`, or "two colours" (which leaves the noun)."""
    picture = _square(thing)
    if thing.colour and rng.random() < 0.3:
        other = replace(thing, colour=str(rng.choice([c for c in COLOURS if c != thing.colour])))
        return _image(np.where(_side(rng, 0.1), picture, _square(other))), "two colours"
    noun = str(rng.choice([n for n in NOUNS if n != thing.noun]))
    kind = str(rng.choice(KINDS))
    if kind == "half":
        picture = picture * np.concatenate((np.ones((SIDE, SIDE, 3)), _side(rng, 0.12)), axis=-1)
    elif kind in ("chimera", "mixture"):
        colour = thing.colour or str(rng.choice(list(COLOURS)))
        other = replace(thing, noun=noun, colour=colour if noun in OBJECTS else "", accessory="")
        share = _side(rng, 0.1).astype(np.float32) if kind == "chimera" else rng.uniform(0.4, 0.6)
        picture = _over(picture, _square(other), share)
    else:
        blurred = kind == "blob"
        strength, cells = (26, 40) if blurred else (rng.uniform(13, 18), 22)
        y, x = np.mgrid[:SIDE, :SIDE] + strength * np.stack([smooth_noise(rng, (SIDE, SIDE), cells) for _ in range(2)])
        picture = np.stack([ndimage.map_coordinates(picture[..., k], (y, x), order=1) for k in range(4)], axis=-1)
        if blurred:
            colours = ndimage.gaussian_filter(picture[..., :3] * picture[..., 3:], (24, 24, 0))
            cover = ndimage.gaussian_filter(picture[..., 3], 10)[..., None]
            weight = ndimage.gaussian_filter(picture[..., 3:], (24, 24, 0))
            picture = np.concatenate((colours / np.maximum(weight, 1), ((cover - 110) * 4).clip(0, 255)), axis=-1)
    return _image(picture), kind


def _image(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8), "RGBA")
    box = image.getbbox()
    return image.crop(box) if box else image
