"""The world of shapes: scenes, their captions and their pictures.

A scene holds one to three things on a background. A thing has a noun (shape), a colour, a surface pattern, a size and
a place; a background has a colour and a pattern. Everything is drawn from a ``numpy`` generator, so a seed names a
scene for ever. Scenes are split by a hash of their contents into ``train``, ``tune`` and ``test``, and some
colour-noun pairs (`HELD_OUT_PAIRS`) never appear in training at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

DATA_VERSION = "1"
SIZE = 128  # pixels, pictures are square
PERIOD = 8  # pixels, of every surface pattern

NOUNS = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
PATTERNS = ("plain", "striped", "dotted", "checkered")
COLOURS = {
    "red": (218, 36, 40),
    "orange": (248, 138, 24),
    "yellow": (250, 222, 48),
    "green": (36, 156, 60),
    "cyan": (64, 214, 222),
    "blue": (36, 72, 212),
    "purple": (140, 44, 176),
    "white": (246, 246, 246),
}
BACKGROUNDS = {"grey": (128, 128, 128), "brown": (122, 80, 48), "black": (22, 22, 28), "pink": (242, 172, 194)}
SIZES = {"small": (16.0, 18.0), "": (20.0, 24.0), "large": (26.0, 29.0)}  # radius range in pixels
DARK_SECOND = {"yellow", "white", "cyan"}  # light colours get a dark second tone, the others a light one

HELD_OUT_PAIRS = frozenset((c, NOUNS[(3 * i + 1) % len(NOUNS)]) for i, c in enumerate(COLOURS))
SPLITS = ("train", "tune", "test")


@dataclass(frozen=True)
class Thing:
    """One object: words, centre and radius in pixels (y grows downwards)."""

    noun: str
    colour: str
    pattern: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Things on a background; ``tint`` is a small brightness shift that keeps pictures from being identical."""

    things: tuple[Thing, ...]
    background: str
    background_pattern: str
    tint: int

    @property
    def key(self) -> str:
        """Contents without places, in a fixed order: what the splits are made from."""
        things = sorted(f"{t.colour} {t.pattern} {t.noun}" for t in self.things)
        return "; ".join([*things, f"{self.background_pattern} {self.background}"])

    @property
    def split(self) -> str:
        """``test``, ``tune`` or ``train``: a tenth, a tenth and the rest; unseen pairs are never in ``train``."""
        bucket = hashlib.sha256(self.key.encode()).digest()[0] % 10
        if bucket < 2:
            return ("test", "tune")[bucket]
        unseen = any((t.colour, t.noun) in HELD_OUT_PAIRS for t in self.things)
        return ("test", "tune")[bucket % 2] if unseen else "train"


@dataclass(frozen=True)
class Stated:
    """What a caption says of one thing; ``None`` is unsaid."""

    noun: str
    colour: str | None
    pattern: str | None


@dataclass(frozen=True)
class Caption:
    """A sentence and what it states: things in order, relation of the first to the second, background."""

    text: str
    things: tuple[Stated, ...]
    relation: str | None = None  # "left" or "above": the first thing is left of / above the second
    background: tuple[str | None, str | None] = (None, None)  # colour, pattern


# --- scenes ---------------------------------------------------------------------------------------------------------


def sample_scene(rng: np.random.Generator, count: int | None = None, distinct: bool = False) -> Scene:
    """Draw a scene of ``count`` things (1 to 3, default mixed); ``distinct`` forbids repeated nouns and colours."""
    count = int(rng.choice((1, 2, 3), p=(0.25, 0.5, 0.25))) if count is None else count
    nouns = rng.choice(NOUNS, size=count, replace=not distinct and rng.random() < 0.2)
    colours = rng.choice(list(COLOURS), size=count, replace=not distinct)
    patterns = rng.choice(PATTERNS, size=count, p=(0.4, 0.2, 0.2, 0.2))
    sizes = rng.choice(list(SIZES), size=count, p=(0.2, 0.6, 0.2))
    while True:  # radii and places that do not touch
        radii = [rng.uniform(*SIZES[s]) for s in sizes]
        places: list[tuple[float, float]] = []
        for r in radii:
            for _ in range(40):
                x, y = rng.uniform(r + 2, SIZE - r - 2, size=2)
                if all(np.hypot(x - u, y - v) > r + s + 4 for (u, v), s in zip(places, radii, strict=False)):
                    places.append((x, y))
                    break
            else:
                break
        if len(places) == count:
            break
    things = tuple(
        Thing(str(n), str(c), str(p), str(s), float(x), float(y), float(r))
        for n, c, p, s, (x, y), r in zip(nouns, colours, patterns, sizes, places, radii, strict=True)
    )
    return Scene(
        things,
        str(rng.choice(list(BACKGROUNDS))),
        str(rng.choice(PATTERNS, p=(0.55, 0.15, 0.15, 0.15))),
        int(rng.integers(-8, 9)),
    )


def scenes(split: str, seed: int, count: int | None = None, distinct: bool = False) -> Iterator[Scene]:
    """Endless scenes of one split, the same for the same arguments."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    rng = np.random.default_rng([SPLITS.index(split), seed])
    while True:
        scene = sample_scene(rng, count, distinct)
        if scene.split == split:
            yield scene


# --- captions -------------------------------------------------------------------------------------------------------

_PATTERN_NOUN = {"striped": "stripes", "dotted": "dots", "checkered": "checks"}
_SURFACES = ("wall", "background", "floor", "cloth")


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _thing_phrase(t: Thing, rng: np.random.Generator, full: bool) -> tuple[str, Stated]:
    colour = t.colour if full or rng.random() > 0.06 else None
    pattern = t.pattern if t.pattern != "plain" or rng.random() < 0.25 else None
    size = t.size if rng.random() < 0.7 else ""
    stated = Stated(t.noun, colour, pattern or ("plain" if full else None))
    if pattern in _PATTERN_NOUN and rng.random() < 0.2:
        return article(" ".join(filter(None, (size, colour, t.noun)))) + f" with {_PATTERN_NOUN[pattern]}", stated
    words = [colour, pattern] if rng.random() < 0.6 else [pattern, colour]
    return article(" ".join(filter(None, (size, *words, t.noun)))), stated


def describe(scene: Scene, rng: np.random.Generator, full: bool = False) -> Caption:
    """Say a scene in one sentence. A pattern that is not said is plain; ``full`` also says every colour."""
    order = rng.permutation(len(scene.things))
    things = [scene.things[i] for i in order]
    relation = None
    if len(things) == 2:
        a, b = things
        kinds = [
            k for k, d in (("left", b.x - a.x), ("right", a.x - b.x), ("above", b.y - a.y), ("below", a.y - b.y)) if d > 24
        ]
        if kinds and rng.random() < 0.45:
            relation = str(rng.choice(kinds))
    phrases, stated = zip(*(_thing_phrase(t, rng, full) for t in things), strict=True)
    if relation in ("right", "below"):  # kept as said, stored from the other side
        stated = stated[::-1]
    if len(phrases) == 1:
        text = str(rng.choice(("{0}", "{0}", "a picture of {0}", "there is {0}"))).format(*phrases)
    elif relation:
        joins = {
            "left": ("left of", "to the left of"),
            "right": ("right of", "to the right of"),
            "above": ("above", "over"),
            "below": ("below", "under"),
        }
        text = f"{phrases[0]} {rng.choice(joins[relation])} {phrases[1]}"
    elif len(phrases) == 2:
        text = str(rng.choice(("{0} and {1}", "{0} and {1}", "{0} next to {1}", "a picture of {0} and {1}"))).format(*phrases)
    else:
        text = str(rng.choice(("{0}, {1} and {2}", "{0} and {1} and {2}", "{0} with {1} and {2}"))).format(*phrases)
    background: tuple[str | None, str | None] = (None, None)
    if rng.random() < 0.65:
        pattern = scene.background_pattern if scene.background_pattern != "plain" or rng.random() < 0.2 else None
        words = [pattern, scene.background] if rng.random() < 0.7 else [scene.background, pattern]
        text += " on " + article(" ".join(filter(None, (*words, str(rng.choice(_SURFACES))))))
        background = (scene.background, pattern or "plain")
    canonical = {"right": "left", "below": "above"}.get(relation or "", relation)
    return Caption(text, tuple(stated), canonical, background)


def prompts(split: str, number: int, count: int = 2, seed: int = 0) -> list[Caption]:
    """``number`` different evaluation captions of ``count`` things with distinct nouns and colours, all attributes said."""
    rng = np.random.default_rng([77, SPLITS.index(split), seed, count])
    out: dict[str, Caption] = {}
    for scene in scenes(split, seed + 1_000_003, count, distinct=True):
        caption = describe(scene, rng, full=True)
        out.setdefault(caption.text, caption)
        if len(out) == number:
            return list(out.values())
    raise AssertionError("unreachable: scenes() is endless")


# --- pictures -------------------------------------------------------------------------------------------------------

GRID = np.arange(SIZE, dtype=np.float32) + 0.5


def _second_tone(name: str, rgb: np.ndarray) -> np.ndarray:
    if name in BACKGROUNDS:  # soft, so that a background stays one
        return rgb * 0.72 if name in ("pink", "grey") else rgb * 0.7 + 255 * 0.3
    return rgb * 0.35 if name in DARK_SECOND else rgb * 0.2 + 255 * 0.8


def _pattern(pattern: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of the second tone, in [0, 1], at pixel centres; anchored to the picture, not to the object."""
    if pattern == "striped":
        return np.broadcast_to((x % PERIOD < PERIOD / 2).astype(np.float32), np.broadcast_shapes(x.shape, y.shape))
    if pattern == "dotted":
        distance = np.hypot(x % PERIOD - PERIOD / 2, y % PERIOD - PERIOD / 2)
        return np.clip(2.9 - distance, 0, 1)
    if pattern == "checkered":
        return ((x % PERIOD < PERIOD / 2) ^ (y % PERIOD < PERIOD / 2)).astype(np.float32)
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)


def _polygon(x: np.ndarray, y: np.ndarray, points: list[tuple[float, float]]) -> np.ndarray:
    """Signed distance to a polygon (negative inside)."""
    distance = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = bx - ax, by - ay
        t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, np.hypot(x - ax - t * ex, y - ay - t * ey))
        crosses = (ay > y) != (by > y)
        if ey:
            inside ^= crosses & (x < (y - ay) * ex / ey + ax)
    return np.where(inside, -distance, distance)


def signed_distance(noun: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance, in pixels, to a shape of radius ``r`` around the origin (negative inside)."""
    d = np.hypot(x, y)
    if noun == "circle":
        return d - r * 0.95
    if noun == "ring":
        return np.abs(d - r * 0.74) - r * 0.26
    if noun == "moon":
        return np.maximum(d - r, r * 0.82 - np.hypot(x - r * 0.48, y))
    if noun == "square":
        return np.maximum(np.abs(x), np.abs(y)) - r * 0.82
    if noun == "cross":
        u, v = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(u - r * 0.95, v - r * 0.32)
    if noun == "heart":
        lobes = np.minimum(np.hypot(x - r * 0.45, y + r * 0.32), np.hypot(x + r * 0.45, y + r * 0.32)) - r * 0.52
        wedge = _polygon(x, y, [(-0.86 * r, 0.0), (0.0, -0.35 * r), (0.86 * r, 0.0), (0.0, 0.98 * r)])
        return np.minimum(lobes, wedge)
    corners = {"triangle": ((3, 1.0, 1.0),), "star": ((10, 1.0, 0.45),)}[noun][0]
    n, even, odd = corners
    angles = [-np.pi / 2 + 2 * np.pi * k / n for k in range(n)]
    radii = [r * (even if k % 2 == 0 else odd) for k in range(n)]
    shift = r * 0.15 if noun == "triangle" else 0.0
    return _polygon(x, y, [(float(np.cos(a) * s), float(np.sin(a) * s + shift)) for a, s in zip(angles, radii, strict=True)])


def surface(name: str, rgb: tuple[int, int, int], pattern: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    first = np.asarray(rgb, np.float32)
    share = _pattern(pattern, x, y)[..., None]
    return first * (1 - share) + _second_tone(name, first) * share


def coverage(thing: Thing) -> np.ndarray:
    """How much of each pixel a thing covers, ``[SIZE, SIZE]`` in [0, 1]."""
    x, y = np.broadcast_arrays(GRID[None, :] - thing.x, GRID[:, None] - thing.y)
    d = signed_distance(thing.noun, x, y, thing.radius)
    return np.clip(0.5 - d, 0, 1).astype(np.float32)


def layout(scene: Scene, cells: int = SIZE // 8) -> np.ndarray:
    """Which thing is at each cell's centre: ``int8 [cells, cells]``, 0 the background, 1 the first thing, -1 an edge."""
    side = SIZE / cells
    centres = (np.arange(cells, dtype=np.float32) + 0.5) * side
    out = np.zeros((cells, cells), np.int8)
    for i, t in enumerate(scene.things, 1):
        x, y = np.broadcast_arrays(centres[None, :] - t.x, centres[:, None] - t.y)
        d = signed_distance(t.noun, x, y, t.radius)
        out[d < side / 4] = -1
        out[d < -side / 4] = i
    return out


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: ``uint8 [SIZE, SIZE, 3]``, anti-aliased."""
    picture = surface(scene.background, BACKGROUNDS[scene.background], scene.background_pattern, GRID[None, :], GRID[:, None])
    picture = np.array(np.broadcast_to(picture, (SIZE, SIZE, 3)))
    for t in scene.things:
        x0, x1 = max(int(t.x - t.radius) - 2, 0), min(int(t.x + t.radius) + 3, SIZE)
        y0, y1 = max(int(t.y - t.radius) - 2, 0), min(int(t.y + t.radius) + 3, SIZE)
        x, y = GRID[None, x0:x1], GRID[y0:y1, None]
        u, v = np.broadcast_arrays(x - t.x, y - t.y)
        alpha = np.clip(0.5 - signed_distance(t.noun, u, v, t.radius), 0, 1)[..., None]
        box = picture[y0:y1, x0:x1]
        box[:] = box * (1 - alpha) + surface(t.colour, COLOURS[t.colour], t.pattern, x, y) * alpha
    return np.clip(picture + scene.tint, 0, 255).astype(np.uint8)
