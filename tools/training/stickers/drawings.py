"""Emoji drawings as pictures: rasterised, recoloured, and with accessories on faces."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image

from ....demo.stickers.world import COLOURS, FACES
from .sources import SOURCES, fetch

FULL = 224  # pixels, side of a rasterised drawing
MARGIN = 80  # pixels around a face, for hats and scarves

# Icon of each noun, and of scenery, in the two sets (fluent-emoji-flat, noto); one name where they agree.
ICONS: dict[str, tuple[str, ...]] = {
    "dog": ("dog-face",), "cat": ("cat-face",), "monkey": ("monkey-face",), "rabbit": ("rabbit-face",), "pig": ("pig-face",),
    "car": ("automobile",), "scooter": ("motor-scooter",), "hat": ("top-hat",), "tree": ("deciduous-tree",),
    "fir": ("evergreen-tree",), "planet": ("ringed-planet",), "moon": ("full-moon",),
}  # fmt: skip

MAIN_HUES = {("bus", 0): 45}  # degrees, where the commonest hue (here the windows') is not the thing's own

# Where a face wears things, as shares of the drawing's side, in each of the two sets:
# height of the eyes, width of sunglasses, height of the top of the head, width of a hat, height of the chin.
ANCHORS: dict[str, tuple[tuple[float, float, float, float, float], ...]] = {
    "dog": ((0.42, 0.50, 0.17, 0.54, 0.86), (0.55, 0.64, 0.17, 0.52, 0.92)),
    "cat": ((0.57, 0.60, 0.33, 0.52, 0.93), (0.52, 0.70, 0.23, 0.52, 0.90)),
    "robot": ((0.45, 0.72, 0.20, 0.60, 0.94), (0.52, 0.68, 0.31, 0.62, 0.97)),
    "fox": ((0.57, 0.54, 0.28, 0.50, 0.94), (0.56, 0.56, 0.29, 0.46, 0.94)),
    "panda": ((0.52, 0.66, 0.19, 0.58, 0.94), (0.50, 0.74, 0.13, 0.58, 0.94)),
    "bear": ((0.51, 0.60, 0.19, 0.56, 0.93), (0.47, 0.68, 0.10, 0.60, 0.94)),
    "lion": ((0.46, 0.58, 0.15, 0.56, 0.90), (0.38, 0.54, 0.11, 0.52, 0.88)),
    "frog": ((0.26, 0.74, 0.17, 0.52, 0.92), (0.33, 0.78, 0.24, 0.52, 0.94)),
    "monkey": ((0.48, 0.54, 0.20, 0.54, 0.94), (0.47, 0.56, 0.15, 0.54, 0.88)),
    "rabbit": ((0.57, 0.60, 0.34, 0.44, 0.94), (0.60, 0.54, 0.45, 0.38, 0.96)),
    "pig": ((0.48, 0.58, 0.17, 0.56, 0.94), (0.54, 0.68, 0.16, 0.58, 0.94)),
    "koala": ((0.54, 0.64, 0.19, 0.56, 0.88), (0.46, 0.66, 0.12, 0.56, 0.94)),
}

_BOW_TIE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 56"><g stroke="#8c0f2c" stroke-width="4" stroke-linejoin="round">
<path fill="#e8274b" d="M50 28 L8 5 Q2 28 8 51 Z"/><path fill="#e8274b" d="M50 28 L92 5 Q98 28 92 51 Z"/>
<rect fill="#ff5470" x="39" y="16" width="22" height="24" rx="7"/></g></svg>"""
_SCARF = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 70"><g stroke="#0b6f7d" stroke-width="3" stroke-linejoin="round">
<path fill="#19b5c4" d="M62 18 L86 16 L90 62 L66 64 Z"/><path fill="#fff" d="M64.500 44 L88 42.500 L88.700 51 L65.200 52.500 Z"/>
<path fill="#22c7d6" d="M4 6 Q50 26 96 6 Q100 16 95 26 Q50 46 5 26 Q0 16 4 6 Z"/>
<path fill="#fff" d="M24 13.500 L36 16 L35 37 L23 34 Z"/><path fill="#fff" d="M66 16 L77 13.500 L78 33.500 L67 36.500 Z"/></g></svg>"""


@functools.cache
def _icons(which: int) -> dict[str, Any]:
    return fetch(SOURCES[which])


def _raster(svg: str, width: int) -> Image.Image:
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing stickers needs resvg: pip install -r tools/training/requirements.txt") from error
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=width)))).convert("RGBA")


@functools.cache
def icon(name: str, which: int) -> Image.Image:
    """A drawing by noun, ``FULL`` pixels wide, with transparency; ``which`` chooses the set."""
    names, icons = ICONS.get(name, (name,)), _icons(which)
    found = icons["icons"][names[which % len(names)]]
    width, height = (found.get(k, icons.get(k, 16)) for k in ("width", "height"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}">'
    return _raster(f"{head}{found['body']}</svg>", FULL)


def _recoloured(picture: Image.Image, rgb: tuple[int, int, int], main: int | None) -> Image.Image:
    """The drawing with its main hue (default: the commonest) changed to a colour, light and shade kept."""
    pixels = np.asarray(picture, np.float32)
    hsv = np.asarray(picture.convert("RGB").convert("HSV"), np.float32)
    hue, saturation, value = hsv[..., 0] / 256 * 360, hsv[..., 1] / 255, hsv[..., 2] / 255
    weight = saturation**2 * value * pixels[..., 3]
    histogram = np.histogram(hue, bins=36, range=(0, 360), weights=weight)[0]
    smooth = histogram + np.roll(histogram, 1) + np.roll(histogram, -1)
    main = 10 * int(smooth.argmax()) + 5 if main is None else main
    distance = np.abs((hue - main + 180) % 360 - 180)
    share = np.clip((50 - distance) / 12, 0, 1) * np.clip((saturation - 0.12) / 0.15, 0, 1)
    light = pixels[..., :3] @ np.array((0.299, 0.587, 0.114), np.float32)
    middle = np.average(light, weights=weight * share + 1e-6)
    target = np.asarray(rgb, np.float32)
    up = np.clip((light - middle) / max(255 - middle, 1), 0, 1)[..., None] * 0.8
    new = np.where(up > 0, target + (255 - target) * up, target * (light / middle)[..., None] ** 0.8)
    pixels[..., :3] = pixels[..., :3] * (1 - share[..., None]) + new * share[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGBA")


def _put(canvas: Image.Image, what: Image.Image, width: float, x: float, y: float, anchor: float) -> None:
    """Paste with its horizontal middle at ``x`` and the share ``anchor`` of its height at ``y``; all in pixels."""
    what = what.crop(what.getbbox())
    size = (round(width), round(width * what.height / what.width))
    what = what.resize(size, Image.Resampling.LANCZOS)
    canvas.alpha_composite(what, (round(x - size[0] / 2), round(y - anchor * size[1])))


def _dressed(noun: str, which: int, accessory: str) -> Image.Image:
    """A face with its accessory."""
    canvas = Image.new("RGBA", (FULL + 2 * MARGIN, FULL + 2 * MARGIN))
    canvas.alpha_composite(icon(noun, which), (MARGIN, MARGIN))
    eyes, glasses, top, hat, chin = (FULL * share for share in ANCHORS[noun][which])
    middle = MARGIN + FULL / 2
    if accessory == "sunglasses":
        _put(canvas, icon("sunglasses", which), glasses * 1.1, middle, MARGIN + eyes, 0.45)
    elif accessory == "hat":
        _put(canvas, icon("hat", which), hat * 1.1, middle, MARGIN + top, 0.82)
    elif accessory == "crown":
        _put(canvas, icon("crown", which), hat * 0.95, middle, MARGIN + top, 0.85)
    elif accessory == "bow tie":
        _put(canvas, _raster(_BOW_TIE, FULL), FULL * 0.5, middle, MARGIN + chin, 0.42)
    elif accessory == "scarf":
        _put(canvas, _raster(_SCARF, FULL), FULL * 0.74, middle, MARGIN + chin, 0.3)
    return canvas


@functools.cache
def drawing(noun: str, which: int, colour: str = "", accessory: str = "") -> Image.Image:
    """A thing's drawing, cropped to what is visible."""
    picture = _dressed(noun, which, accessory) if noun in FACES else icon(noun, which)
    if colour:
        picture = _recoloured(picture, COLOURS[colour], MAIN_HUES.get((noun, which)))
    return picture.crop(picture.getbbox())
