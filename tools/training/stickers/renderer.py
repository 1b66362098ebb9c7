"""Pictures of scenes: a place in its style, and on it die-cut stickers with a white rim and a soft shadow."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from ....demo.stickers.world import SIZE, Scene, Thing
from .drawings import drawing
from .scenery import paint_place
from .styles import FILTERS

PAD = 16  # pixels around a thing in its crop, a multiple of the styles' squares
RIM = 3.0  # pixels of white around a sticker


class Sticker(NamedTuple):
    """A thing ready to be put down: where its crop starts, its colours and its cover, rim and shadow included or not."""

    top: int
    left: int
    rgb: np.ndarray  # float [h, w, 3]
    cover: np.ndarray  # float [h, w], the thing alone
    rim: np.ndarray  # float [h, w], the thing and its rim
    rim_colour: np.ndarray  # float [3]


def sticker(thing: Thing, rng: np.random.Generator, picture: Image.Image | None = None) -> Sticker:
    """Draw one thing in its style, or another drawing in its place."""
    if picture is None:
        picture = drawing(thing.noun, thing.drawing, thing.colour, thing.accessory)
    if thing.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = thing.width / max(picture.size)
    w, h = (max(1, round(side * scale)) for side in picture.size)
    pixels = np.asarray(picture.resize((w, h), Image.Resampling.LANCZOS), np.float32) / 255
    x, y = round(thing.x - w / 2), round(thing.y - h / 2)
    left, top = (8 * ((v - PAD) // 8) for v in (x, y))
    right, bottom = (8 * -((-v - PAD) // 8) for v in (x + w, y + h))
    rgb, cover = np.ones((bottom - top, right - left, 3), np.float32), np.zeros((bottom - top, right - left), np.float32)
    box = slice(y - top, y - top + h), slice(x - left, x - left + w)
    cover[box] = pixels[..., 3]
    # Beyond the contour the nearest colour goes on, so that no filter sees a rim that is not the thing's own.
    rgb[box] = pixels[..., :3]
    nearest = ndimage.distance_transform_edt(cover < 0.9, return_distances=False, return_indices=True)
    rgb = rgb[tuple(nearest)]
    rim_colour = np.ones(3, np.float32)
    if thing.style:
        rgb, cover = FILTERS[thing.style](rgb, cover, rng)
        if thing.style == "cyberpunk":
            rim_colour = np.array((0.05, 0.9, 1.0), np.float32)
    rim = (RIM + 1 - ndimage.distance_transform_edt(cover < 0.5)).clip(0, 1).astype(np.float32)
    return Sticker(top, left, rgb, cover, np.maximum(rim, cover), rim_colour)


def _window(s: Sticker) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of the picture that a sticker covers, and the part of the sticker that is inside the picture."""
    h, w = s.cover.shape
    top, left, bottom, right = max(s.top, 0), max(s.left, 0), min(s.top + h, SIZE), min(s.left + w, SIZE)
    inside = slice(top - s.top, bottom - s.top), slice(left - s.left, right - s.left)
    return (slice(top, bottom), slice(left, right)), inside


def render(scene: Scene, instead: dict[int, Image.Image] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene: the picture ``uint8 [SIZE, SIZE, 3]``, and each pixel's thing ``uint8 [SIZE, SIZE]`` (0: the place).

    ``instead`` gives other drawings for some things, by their index.
    """
    rng = np.random.default_rng(scene.seed)
    picture = paint_place(scene.place, rng)
    if scene.style:
        picture = FILTERS[scene.style](picture, np.ones((SIZE, SIZE), np.float32), rng)[0].astype(np.float32)
    owner = np.zeros((SIZE, SIZE), np.uint8)
    for i, thing in enumerate(scene.things, 1):
        s = sticker(thing, rng, (instead or {}).get(i - 1))
        at, inside = _window(s)
        shadow = 0.3 * ndimage.gaussian_filter(ndimage.shift(s.rim, (3, 2), order=0), 2.5)[inside][..., None]
        rim, cover = s.rim[inside][..., None], s.cover[inside][..., None]
        ground = picture[at] * (1 - shadow)
        rimmed = ground * (1 - rim) + s.rim_colour * rim
        picture[at] = rimmed * (1 - cover) + s.rgb[inside] * cover
        owner[at][s.cover[inside] > 0.5] = i
    return (picture.clip(0, 1) * 255).round().astype(np.uint8), owner
