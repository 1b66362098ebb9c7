"""Places: forest, space, desert, city and ruins, put together from drawings and simple shapes; and plain walls."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw

from ....demo.stickers.world import SIZE, WALLS
from .drawings import icon
from .styles import smooth_noise

HORIZON = 140  # pixels from the top


def _gradient(top: tuple[int, int, int], bottom: tuple[int, int, int], height: int = SIZE) -> np.ndarray:
    share = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    both = np.asarray(top, np.float32), np.asarray(bottom, np.float32)
    return np.broadcast_to(both[0] * (1 - share) + both[1] * share, (height, SIZE, 3))


Colour = tuple[int, int, int]


def _sky_and_ground(high: Colour, low: Colour, far: Colour, near: Colour) -> Image.Image:
    """Sky's colours from the top down to the horizon, then the ground's."""
    both = _gradient(high, low, HORIZON), _gradient(far, near, SIZE - HORIZON)
    return Image.fromarray(np.concatenate(both).astype(np.uint8))


@functools.cache
def _sized(name: str, which: int, width: int, haze: int) -> Image.Image:
    """A piece of scenery, ``haze`` tenths towards a pale sky."""
    picture = icon(name, which)
    picture = picture.crop(picture.getbbox())
    picture = picture.resize((width, max(1, round(width * picture.height / picture.width))), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, np.float32).copy()
    pixels[..., :3] += (np.array((216, 226, 232)) - pixels[..., :3]) * haze / 10
    return Image.fromarray(pixels.astype(np.uint8), "RGBA")


def _stand(canvas: Image.Image, name: str, which: int, width: float, x: float, foot: float, haze: int = 0) -> None:
    """Put scenery with the middle of its foot at a place, which may lie outside the picture."""
    what = _sized(name, which, 4 * round(width / 4), haze)
    canvas.paste(what, (round(x - what.width / 2), round(foot - what.height)), what)


def _forest(rng: np.random.Generator) -> Image.Image:
    canvas = _sky_and_ground((196, 228, 236), (226, 240, 206), (136, 190, 92), (88, 150, 70))
    for haze, number, widths, foot in ((5, 7, (44, 60), 6), (2, 6, (56, 76), 22)):
        for x in np.linspace(-10, SIZE + 10, number) + rng.uniform(-12, 12, number):
            kind = str(rng.choice(("fir", "fir", "tree")))
            width = rng.uniform(*widths) * (0.8 if kind == "fir" else 1.0)
            _stand(canvas, kind, int(rng.integers(2)), width, x, HORIZON + foot + rng.uniform(-3, 6), haze)
    for _ in range(rng.integers(4, 8)):
        _stand(canvas, "herb", int(rng.integers(2)), rng.uniform(14, 24), rng.uniform(0, SIZE), rng.uniform(185, 252), 1)
    return canvas


def _space(rng: np.random.Generator) -> Image.Image:
    cloud = smooth_noise(rng, (SIZE, SIZE), 64)[..., None].clip(0, 2)
    picture = _gradient((14, 12, 40), (40, 20, 78)) + cloud * np.asarray((46, 10, 52), np.float32)
    canvas = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(90):
        x, y, r = rng.uniform(0, SIZE), rng.uniform(0, SIZE), rng.choice((0.6, 0.6, 1.0, 1.5))
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(255, 250, 224))
    places = rng.permutation(((0.16, 0.3), (0.84, 0.28), (0.5, 0.24), (0.12, 0.98), (0.9, 0.98)))
    for name, width, (x, y) in zip(("planet", "moon", "comet"), (74, 44, 40), places, strict=False):
        place = SIZE * x + rng.uniform(-14, 14), SIZE * y + rng.uniform(-10, 10)
        _stand(canvas, name, int(rng.integers(2)), width * rng.uniform(0.85, 1.2), *place)
    return canvas


def _desert(rng: np.random.Generator) -> Image.Image:
    canvas = Image.fromarray(_gradient((255, 196, 120), (255, 236, 196)).astype(np.uint8))
    _stand(canvas, "sun", int(rng.integers(2)), rng.uniform(40, 56), rng.uniform(30, SIZE - 30), rng.uniform(56, 80), 2)
    pen = ImageDraw.Draw(canvas)
    x = np.arange(-2, SIZE + 3)
    for level, colour in ((HORIZON - 14, (240, 190, 120)), (HORIZON + 14, (228, 168, 94)), (HORIZON + 62, (214, 148, 78))):
        height = level + 12 * np.sin(x / rng.uniform(26, 52) + rng.uniform(0, 6.3)) + 5 * np.sin(x / 17 + rng.uniform(0, 6.3))
        pen.polygon([(-2, SIZE), *zip(x.tolist(), height.tolist(), strict=True), (SIZE + 2, SIZE)], fill=colour)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, len(x)))
            _stand(
                canvas, "cactus", int(rng.integers(2)), rng.uniform(24, 40), x[at], height[at] + 6, 3 if level < HORIZON else 1
            )
    return canvas


_WINDOWS = ((0.65, np.array((255, 236, 150))), (0.38, np.array((50, 74, 110))))  # share and colour of light and of glass


def _city(rng: np.random.Generator) -> Image.Image:
    canvas = Image.fromarray(_gradient((150, 200, 240), (232, 238, 240)).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(3):
        _stand(canvas, "cloud", 1, rng.uniform(34, 56), rng.uniform(0, SIZE), rng.uniform(24, 70), 3)
    walls = ((176, 190, 206), (148, 164, 190), (204, 176, 160), (186, 160, 176), (160, 182, 178))
    for haze, top in ((0.45, 46), (0.0, 84)):
        left = rng.uniform(-24, 0)
        while left < SIZE:
            width, height = rng.integers(4, 7) * 8.0, top + rng.uniform(0, 60)
            wall = np.asarray(walls[rng.integers(len(walls))]) * (1 - haze) + np.asarray((214, 224, 234)) * haze
            pen.rectangle((left, height, left + width - 2, 210), fill=tuple(wall.astype(int).tolist()))
            lit, glass = (tuple((wall + (c - wall) * k).astype(int).tolist()) for k, c in _WINDOWS)
            for u in np.arange(left + 5, left + width - 9, 12):
                for v in np.arange(height + 7, 200, 16):
                    pen.rectangle((u, v, u + 6, v + 8), fill=lit if rng.random() < 0.4 else glass)
            left += width
    pen.rectangle((0, 206, SIZE, SIZE), fill=(112, 116, 126))
    pen.rectangle((0, 200, SIZE, 206), fill=(196, 196, 196))
    for left in np.arange(rng.uniform(-30, 0), SIZE, 44):
        pen.rectangle((left, 230, left + 22, 234), fill=(240, 232, 190))
    return canvas


def _ruins(rng: np.random.Generator) -> Image.Image:
    canvas = _sky_and_ground((142, 174, 218), (240, 226, 206), (190, 176, 120), (138, 126, 82))
    pen = ImageDraw.Draw(canvas)
    stone, dark, pale = (206, 184, 148), (150, 126, 94), (228, 212, 182)
    places = np.arange(6) * 48 + rng.uniform(-6, 6, 6) + 8
    tops = rng.choice((30, 34, 62, 96, 110), size=6) + rng.uniform(-6, 6, 6)
    for x, top in zip(places, tops, strict=True):
        foot, r = HORIZON + rng.uniform(14, 26), 11
        broken = [(x - r, top + 4), (x - 4, top - 4), (x + 2, top + 5), (x + r, top - 2)]
        if top < 45:
            broken = [(x - r, top), (x + r, top)]
            pen.rectangle((x - r - 5, top - 9, x + r + 5, top), fill=pale, outline=dark)
        pen.polygon([(x - r, foot), *broken, (x + r, foot)], fill=stone, outline=dark)
        for u in (-5, 1, 7):
            pen.line((x + u, top + 8, x + u, foot), fill=dark, width=2)
        pen.rectangle((x - r - 4, foot, x + r + 4, foot + 7), fill=pale, outline=dark)
    for left, right, a, b in zip(places[:-1], places[1:], tops[:-1], tops[1:], strict=True):
        if a < 45 and b < 45:  # a beam where two neighbours still stand
            pen.rectangle((left - 18, min(a, b) - 20, right + 18, min(a, b) - 8), fill=stone, outline=dark)
    for _ in range(rng.integers(5, 9)):
        _stand(canvas, "rock", int(rng.integers(2)), rng.uniform(16, 34), rng.uniform(0, SIZE), rng.uniform(176, 250), 3)
    return canvas


_PAINTERS = {"forest": _forest, "space": _space, "desert": _desert, "city": _city, "ruins": _ruins}


def paint_place(place: str, rng: np.random.Generator) -> np.ndarray:
    """The place without things: ``float32 [SIZE, SIZE, 3]`` in [0, 1]."""
    if place in WALLS:
        middle = np.asarray(WALLS[place], np.float32) / 255
        light = np.linspace(rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03), SIZE, dtype=np.float32)[:, None, None]
        return np.broadcast_to((middle + light).clip(0, 1), (SIZE, SIZE, 3)).copy()
    return np.asarray(_PAINTERS[place](rng), np.float32) / 255
