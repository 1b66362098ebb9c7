"""Seven styles as filters: a picture and what it covers in, the same in the style out. All of them are ours to know."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from scipy import ndimage

BRICK, PIXEL = 8, 4  # pixels, sides of lego's and of pixel-art's squares
_PAPER = np.array((0.97, 0.955, 0.915), np.float32)
_LUMA = np.array((0.299, 0.587, 0.114), np.float32)

Styled = tuple[np.ndarray, np.ndarray]  # colours float [h, w, 3] and cover float [h, w], both in [0, 1]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], cells: int) -> np.ndarray:
    """Soft noise of deviation 1 whose spots are about ``cells`` pixels wide: ``float [h, w]``."""
    h, w = shape
    coarse = rng.standard_normal((h // cells + 4, w // cells + 4)).astype(np.float32)
    y, x = np.meshgrid(np.arange(h) / cells + 1, np.arange(w) / cells + 1, indexing="ij")
    return ndimage.map_coordinates(coarse, (y, x), order=3, mode="nearest") * 1.4


def _warp(picture: np.ndarray, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """Look each pixel up a few pixels away."""
    h, w = dy.shape
    y, x = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    rows, columns = (y + dy).round().astype(int).clip(0, h - 1), (x + dx).round().astype(int).clip(0, w - 1)
    return picture[rows, columns]


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(picture, (sigma, sigma, 0)[: picture.ndim], mode="nearest")


def _edges(rgb: np.ndarray, sigma: float) -> np.ndarray:
    """Strength of the steepest colour channel's edge: ``float [h, w]``."""
    soft = _blur(rgb, sigma)
    down, right = ndimage.sobel(soft, axis=0, mode="nearest"), ndimage.sobel(soft, axis=1, mode="nearest")
    return np.sqrt(down**2 + right**2).max(axis=-1)


def _saturate(rgb: np.ndarray, by: float) -> np.ndarray:
    grey = (rgb @ _LUMA)[..., None]
    return (grey + (rgb - grey) * by).clip(0, 1)


def _squares(rgb: np.ndarray, cover: np.ndarray, side: int) -> Styled:
    """Means of squares that start at the corner; a square is there when two fifths of it are covered."""
    h, w = cover.shape
    weight = cover + 1e-4
    total = weight.reshape(h // side, side, w // side, side).sum((1, 3))
    means = (rgb * weight[..., None]).reshape(h // side, side, w // side, side, 3).sum((1, 3)) / total[..., None]
    return means, (total / side**2 > 0.4).astype(np.float32)


def _enlarge(picture: np.ndarray, side: int) -> np.ndarray:
    return picture.repeat(side, axis=0).repeat(side, axis=1)


@functools.cache
def _stud() -> np.ndarray:
    """Light and shade of one brick seen from above: ``float [BRICK, BRICK]`` around 0."""
    fine = 8
    x = (np.arange(BRICK * fine) + 0.5) / fine - BRICK / 2
    dx, dy = np.meshgrid(x, x)
    r = np.hypot(dx, dy)
    ring = np.exp(-(((r - 2.4) / 0.5) ** 2)) * (-(dx + dy) / np.maximum(r, 0.1)) * 0.42
    top = np.where(r < 2.3, 0.07, 0.0)
    shadow = -0.28 * np.exp(-(((r - 3.0) / 0.6) ** 2)) * np.clip((dx + dy) / np.maximum(r, 0.1), 0, 2) / 1.4
    rim = np.where((dx > 3.4) | (dy > 3.4), -0.22, 0.0) + np.where((dx < -3.5) | (dy < -3.5), 0.12, 0.0)
    return (ring + top + shadow + rim).reshape(BRICK, fine, BRICK, fine).mean((1, 3)).astype(np.float32)


def lego(rgb: np.ndarray, cover: np.ndarray, rng: np.random.Generator) -> Styled:
    """Studded bricks, one colour each."""
    means, there = _squares(_saturate(rgb, 1.25), cover, BRICK)
    colours = _enlarge((means * 9).round() / 9, BRICK)
    light = np.tile(_stud(), (there.shape[0], there.shape[1]))[..., None]
    shaded = np.where(light > 0, colours + (1 - colours) * light, colours * (1 + light)) + 0.12 * light
    return shaded.clip(0, 1), _enlarge(there, BRICK)


def pixel_art(rgb: np.ndarray, cover: np.ndarray, rng: np.random.Generator) -> Styled:
    """Large pixels of few colours."""
    means, there = _squares(_saturate(rgb, 1.15), cover, PIXEL)
    return _enlarge(((means * 5).round() / 5).clip(0, 1), PIXEL), _enlarge(there, PIXEL)


@functools.cache
def _strokes() -> np.ndarray:
    """Relief of brush strokes that follow a winding direction: ``float [512, 512]`` of deviation 1."""
    rng = np.random.default_rng(8)
    side = 512
    noise = ndimage.gaussian_filter(rng.standard_normal((side, side)).astype(np.float32), 1.1, mode="wrap")
    angle = 1.3 * ndimage.gaussian_filter(rng.standard_normal((side, side)), 30, mode="wrap") * 60
    y, x = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    total = np.zeros_like(noise)
    for step in np.arange(-7, 8):
        places = (y + step * np.sin(angle), x + step * np.cos(angle))
        total += ndimage.map_coordinates(noise, places, order=1, mode="wrap")
    return total / total.std()


def _stroke_patch(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    strokes = _strokes()
    y, x = rng.integers(0, 512 - max(shape), size=2)
    return strokes[y : y + shape[0], x : x + shape[1]]


def oil_painting(rgb: np.ndarray, cover: np.ndarray, rng: np.random.Generator) -> Styled:
    """Kuwahara's filter (the mean of the calmest of four quarters around a pixel), and the relief of brush strokes."""
    strokes = _stroke_patch(cover.shape, rng)
    across = np.roll(strokes, 9, axis=0)
    rgb, cover = _warp(rgb, 1.3 * strokes, 1.3 * across), _warp(cover, 0.8 * strokes, 0.8 * across)
    r = 3
    mean = ndimage.uniform_filter(rgb, (r + 1, r + 1, 0), mode="nearest")
    light = rgb @ _LUMA
    variance = ndimage.uniform_filter(light**2, r + 1) - ndimage.uniform_filter(light, r + 1) ** 2
    shifts = [(a, b) for a in (-2, 2) for b in (-2, 2)]
    means = np.stack([np.roll(mean, s, (0, 1)) for s in shifts])
    calmest = np.stack([np.roll(variance, s, (0, 1)) for s in shifts]).argmin(axis=0)
    painted = np.take_along_axis(means, calmest[None, ..., None], axis=0)[0]
    relief = strokes - np.roll(strokes, (1, 1), (0, 1))
    painted = _saturate(painted, 1.15) * (1 + 0.07 * strokes[..., None]) + 0.075 * relief[..., None]
    return painted.clip(0, 1), cover


def watercolor(rgb: np.ndarray, cover: np.ndarray, rng: np.random.Generator) -> Styled:
    """Thin colour that bleeds and gathers at rims, on grained paper."""
    dy, dx = (1.3 * smooth_noise(rng, cover.shape, 12) for _ in range(2))
    both = _warp(np.concatenate((rgb, cover[..., None]), axis=-1), dy, dx)
    rgb, cover = _blur(both[..., :3], 0.8), ((_blur(both[..., 3], 1.5) - 0.5) * 3 + 0.5).clip(0, 1)
    rims = _edges(rgb, 1.0).clip(0, 0.7)
    grain = rng.standard_normal(cover.shape).astype(np.float32)
    thickness = 0.62 + 0.1 * smooth_noise(rng, cover.shape, 26) + 0.05 * smooth_noise(rng, cover.shape, 9) + 0.2 * rims
    inside = ndimage.gaussian_filter(cover, 5)
    thickness += 0.45 * (0.9 - inside).clip(0, 0.6) * (inside > 0.2)  # pigment gathers where the wet part ends
    painted = _PAPER - (_PAPER - rgb) * thickness.clip(0.4, 1.05)[..., None]
    return (painted + 0.022 * _blur(grain, 0.6)[..., None] * 2).clip(0, 1), cover


def sketch(rgb: np.ndarray, cover: np.ndarray, rng: np.random.Generator) -> Styled:
    """Pencil on paper: contours, and hatching where it is dark."""
    h, w = cover.shape
    light = _blur(rgb @ _LUMA, 0.8)
    lines = (_edges(rgb, 0.8) * 0.8).clip(0, 1) ** 0.8
    y, x = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    wobble = 1.2 * smooth_noise(rng, cover.shape, 16)
    one = 0.5 + 0.5 * np.cos((x + y + wobble) * (2 * np.pi / 6))
    two = 0.5 + 0.5 * np.cos((x - y + wobble) * (2 * np.pi / 6))
    hatch = one**2 * (1.5 * (0.68 - light)).clip(0, 0.6) + two**2 * (2 * (0.42 - light)).clip(0, 0.7)
    grain = 1 + 0.25 * _blur(rng.standard_normal(cover.shape).astype(np.float32), 0.7)
    graphite = ((0.85 * lines + hatch) * grain).clip(0, 0.9)[..., None]
    return (_PAPER * (1 - graphite) + 0.12 * graphite).clip(0, 1).astype(np.float32), cover


def cyberpunk(rgb: np.ndarray, cover: np.ndarray, rng: np.random.Generator) -> Styled:
    """Dark, with contours that glow in magenta and cyan, and a screen's lines."""
    light = rgb @ _LUMA
    hue = (0.5 + 0.6 * smooth_noise(rng, cover.shape, 60)).clip(0, 1)[..., None]
    neon = hue * np.array((1.0, 0.12, 0.78), np.float32) + (1 - hue) * np.array((0.08, 0.92, 1.0), np.float32)
    lines = (_edges(rgb, 0.8) * 1.4 - 0.08).clip(0, 1)[..., None]
    glow = _blur(lines, 3.0)
    dark = np.array((0.07, 0.03, 0.17), np.float32) + light[..., None] * np.array((0.26, 0.12, 0.46), np.float32)
    screen = np.where(np.arange(cover.shape[0]) % 4 < 2, 1.0, 0.82)[:, None, None]
    return ((dark * (1 - lines) + lines * neon + 0.5 * glow * neon) * screen).clip(0, 1).astype(np.float32), cover


def graffiti(rgb: np.ndarray, cover: np.ndarray, rng: np.random.Generator) -> Styled:
    """Loud flat colours in thick black contours, speckled with spray, on a brick wall."""
    h, w = cover.shape
    flat = (_saturate(_blur(rgb, 0.7), 1.6) * 4).round() / 4
    y, x = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    row = y // 10
    mortar = ((y % 10 < 1.2) | ((x + 10 * (row % 2)) % 20 < 1.2)).astype(np.float32)
    flat = flat.clip(0, 1) * (1 - 0.3 * _blur(mortar, 0.5)[..., None])
    spray = rng.random((h, w)) < 0.012
    drops = (ndimage.gaussian_filter(spray.astype(np.float32), 0.9) * 5).clip(0, 1)[..., None]
    colours = np.array(((1, 0.1, 0.6), (0.1, 0.9, 1), (1, 0.95, 0.1), (1, 1, 1)), np.float32)
    tint = colours[(smooth_noise(rng, (h, w), 24) * 1.5 + 2).astype(int).clip(0, 3)]
    lines = ((_edges(rgb, 1.0) - 0.6) * 3).clip(0, 1)
    contour = ((0.72 - ndimage.gaussian_filter(cover, 1.5, mode="nearest")) * 4).clip(0, 1)
    lines = np.maximum(ndimage.grey_dilation(lines, size=(2, 2)), contour)[..., None]
    out = (flat * (1 - drops) + tint * drops) * (1 - lines) + 0.04 * lines
    return out.clip(0, 1).astype(np.float32), cover


FILTERS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], Styled]] = {
    "lego": lego,
    "oil-painting": oil_painting,
    "cyberpunk": cyberpunk,
    "sketch": sketch,
    "pixel-art": pixel_art,
    "watercolor": watercolor,
    "graffiti": graffiti,
}
