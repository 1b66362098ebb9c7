"""The world of stickers: what a picture can hold, and how people say it.

A picture shows one to three things in a place. A thing has a noun and a drawing style; objects have a colour as well,
and faces may wear an accessory. A place is a scene (forest, city, ...) or a plain wall, and scenes have a style too.
Everything is drawn from a ``numpy`` generator, so a seed names a picture for ever. Pictures are split by a hash of
their contents into ``train``, ``tune`` and ``test``, and some pairs of a noun and a detail (`HELD_OUT_PAIRS`) never
appear in training at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

DATA_VERSION = "stickers 1"
SIZE = 256  # pixels, pictures are square

FACES = ("dog", "cat", "robot", "fox", "panda", "bear", "lion", "frog", "monkey", "rabbit", "pig", "koala")
OBJECTS = (
    "car", "bus", "unicorn", "scooter", "house", "umbrella", "backpack", "teapot", "chair", "mushroom", "guitar", "fish",
)  # fmt: skip
NOUNS = (*FACES, *OBJECTS)
COLOURS = {
    "red": (226, 42, 48),
    "yellow": (252, 206, 40),
    "green": (40, 166, 72),
    "blue": (40, 108, 224),
    "purple": (134, 64, 190),
    "pink": (248, 118, 178),
}
ACCESSORIES = ("sunglasses", "hat", "crown", "bow tie", "scarf")
STYLES = ("lego", "oil-painting", "cyberpunk", "sketch", "pixel-art", "watercolor", "graffiti")
COLOURLESS = frozenset(("cyberpunk", "sketch"))  # styles that do not show a thing's colour: it is never said with them
SCENES = ("forest", "space", "desert", "city", "ruins")
WALLS = {"white": (244, 244, 242), "beige": (232, 208, 170), "mint": (168, 222, 200), "navy": (38, 48, 84)}
PLACES = (*SCENES, *WALLS)
WIDTHS = {1: (104.0, 140.0), 2: (84.0, 116.0), 3: (68.0, 84.0)}  # a thing's longer side in pixels, by number of things

HELD_OUT_PAIRS = frozenset(
    {(noun, ACCESSORIES[i % 5]) for i, noun in enumerate(FACES)}
    | {(noun, list(COLOURS)[i % 6]) for i, noun in enumerate(OBJECTS)}
    | {(noun, STYLES[(2 * i + 1) % 7]) for i, noun in enumerate(NOUNS)}
)
SPLITS = ("train", "tune", "test")


@dataclass(frozen=True)
class Thing:
    """One object: words (empty: none), centre and longer side in pixels (y grows downwards), which drawing, mirrored or not."""

    noun: str
    colour: str
    accessory: str
    style: str
    x: float
    y: float
    width: float
    drawing: int
    mirrored: bool

    @property
    def details(self) -> tuple[str, ...]:
        return tuple(word for word in (self.colour, self.accessory, self.style) if word)


@dataclass(frozen=True)
class Scene:
    """Things in a place, from left to right; ``seed`` decides everything that has no name (where trees stand, and so on)."""

    things: tuple[Thing, ...]
    place: str
    style: str
    seed: int

    @property
    def key(self) -> str:
        """Contents without positions, in a fixed order: what the splits are made from."""
        things = sorted(" ".join((*t.details, t.noun)) for t in self.things)
        return "; ".join((*things, f"{self.style} {self.place}"))

    @property
    def split(self) -> str:
        """``test``, ``tune`` or ``train``: a tenth, a tenth and the rest; unseen pairs are never in ``train``."""
        bucket = hashlib.sha256(self.key.encode()).digest()[0] % 10
        if bucket < 2:
            return ("test", "tune")[bucket]
        unseen = any((t.noun, d) in HELD_OUT_PAIRS for t in self.things for d in t.details)
        return ("test", "tune")[bucket % 2] if unseen else "train"


@dataclass(frozen=True)
class Stated:
    """What a caption says of one thing; ``None`` is unsaid."""

    noun: str
    colour: str | None = None
    accessory: str | None = None
    style: str | None = None


@dataclass(frozen=True)
class Caption:
    """A sentence and what it states: things in order of mention, the place and the place's style."""

    text: str
    things: tuple[Stated, ...]
    place: str | None = None
    style: str | None = None
    relation: str | None = None  # "left": the first thing is left of the second


# --- scenes ---------------------------------------------------------------------------------------------------------


def sample_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """Draw a scene of ``count`` things (1 to 3, default mixed); no noun, colour, accessory or style is there twice."""
    count = int(rng.choice((1, 2, 3), p=(0.3, 0.5, 0.2))) if count is None else count
    nouns, colours, accessories, styles = (
        [str(word) for word in rng.choice(words, size=count, replace=False)]
        for words in (NOUNS, list(COLOURS), ACCESSORIES, STYLES)
    )
    widths = rng.uniform(*WIDTHS[count], size=count)
    free = SIZE - widths.sum() - 8
    gaps = rng.dirichlet(np.full(count + 1, 3.0)) * free
    lefts = 4 + np.cumsum(gaps[:-1]) + np.concatenate(([0.0], np.cumsum(widths)[:-1]))
    things = []
    for i, (noun, width) in enumerate(zip(nouns, widths, strict=True)):
        face = noun in FACES
        things.append(
            Thing(
                noun=noun,
                colour="" if face else colours[i],
                accessory=accessories[i] if face and rng.random() < 0.6 else "",
                style=styles[i] if rng.random() < 0.25 else "",
                x=float(lefts[i] + width / 2),
                y=float(np.clip(rng.normal(158, 26), 8 + width / 2, SIZE - 8 - width / 2)),
                width=float(width),
                drawing=int(rng.integers(2)),
                mirrored=bool(rng.random() < 0.5),
            )
        )
    place = str(rng.choice(SCENES)) if rng.random() < 0.6 else str(rng.choice(list(WALLS)))
    style = str(rng.choice(STYLES)) if place in SCENES and rng.random() < 0.5 else ""
    return Scene(tuple(things), place, style, int(rng.integers(2**31)))


def scenes(split: str, seed: int, count: int | None = None) -> Iterator[Scene]:
    """Endless scenes of one split, the same for the same arguments."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    rng = np.random.default_rng([SPLITS.index(split), seed])
    while True:
        scene = sample_scene(rng, count)
        if scene.split == split:
            yield scene


# --- captions -------------------------------------------------------------------------------------------------------

_LEFT_OUT = 1 / 3  # how often a detail, or the place, is not said


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeio" or phrase.startswith("um") else "a ") + phrase


def _wearing(accessory: str) -> str:
    return accessory if accessory in ("sunglasses",) else _article(accessory)


def phrase(thing: Stated) -> str:
    """A thing in words: "a red car", "a sketch style dog wearing a bow tie"."""
    style = f"{thing.style} style" if thing.style else ""
    words = _article(" ".join(filter(None, (style, thing.colour, thing.noun))))
    return words + (f" wearing {_wearing(thing.accessory)}" if thing.accessory else "")


def place_phrase(place: str, style: str | None) -> str:
    """A place in words: "in an oil-painting style forest", "on a white wall"."""
    if place in WALLS:
        return f"on {_article(place)} wall"
    if style:
        return f"in {_article(f'{style} style {place}')}"
    return f"in {place if place in ('space', 'ruins') else _article(place)}"


def _state(thing: Thing, rng: np.random.Generator, full: bool) -> Stated:
    colour, accessory, style = (
        word if word and (full or rng.random() > _LEFT_OUT) else None for word in (thing.colour, thing.accessory, thing.style)
    )
    return Stated(thing.noun, None if thing.style in COLOURLESS else colour, accessory, style)


def describe(scene: Scene, rng: np.random.Generator, full: bool = False) -> Caption:
    """Say a scene in one sentence. Each detail is left out a third of the time, unless ``full`` asks for all of them."""
    order = rng.permutation(len(scene.things))
    stated = tuple(_state(scene.things[i], rng, full) for i in order)
    phrases = [phrase(s) for s in stated]
    relation = None
    if len(phrases) == 1:
        text = phrases[0]
    elif len(phrases) == 2 and rng.random() < 0.25:
        left = order[0] < order[1]
        text = f"{phrases[0]} to the {'left' if left else 'right'} of {phrases[1]}"
        relation, stated = "left", stated if left else stated[::-1]
    elif len(phrases) == 2:
        text = f"{phrases[0]} {rng.choice(('and', 'and', 'and', 'next to'))} {phrases[1]}"
    else:
        text = f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    if not full and rng.random() < _LEFT_OUT:
        return Caption(text, stated, relation=relation)
    style = scene.style if scene.style and (full or rng.random() > _LEFT_OUT) else None
    return Caption(f"{text} {place_phrase(scene.place, style)}", stated, scene.place, style, relation)


def prompts(split: str, number: int, count: int = 2, seed: int = 0, having: str = "") -> list[Caption]:
    """``number`` different evaluation captions of ``count`` things, every detail said; each thing ``having`` a detail of this kind."""
    rng = np.random.default_rng([77, SPLITS.index(split), seed, count])
    out: dict[str, Caption] = {}
    for scene in scenes(split, seed + 1_000_003, count):
        caption = describe(scene, rng, full=True)
        if having and not all(getattr(thing, having) for thing in caption.things):
            continue
        out.setdefault(caption.text, caption)
        if len(out) == number:
            return list(out.values())
    raise AssertionError("unreachable: scenes() is endless")


def parse(text: str) -> Caption:
    """Read a caption of this grammar back into what it states.

    Raises:
        ValueError: for a sentence that `describe` cannot write.
    """
    words = text.lower().replace(",", " and").replace("bow tie", "bow_tie").split()
    things: list[dict[str, str]] = []
    place = place_style = style = colour = None
    side, after = None, ""
    for word in words:
        word = word.replace("_", " ")
        if word in STYLES:
            style = word
        elif word in ("in", "on", "wearing"):
            after = word
        elif word in ("left", "right"):
            side = word
        elif after == "wearing" and word in ACCESSORIES:
            things[-1]["accessory"], after = word, ""
        elif after in ("in", "on") and word in PLACES:
            place, place_style, style = word, style, None
        elif word in COLOURS:
            colour = word
        elif word in NOUNS:
            found = {"noun": word, "colour": colour, "style": style}
            things.append({k: v for k, v in found.items() if v})
            colour = style = None
        elif word not in ("a", "an", "and", "style", "next", "to", "the", "of", "wall"):
            raise ValueError(f"not a word of the world of stickers: {word!r}")
    if not things or style or colour:
        raise ValueError(f"not a caption of the world of stickers: {text!r}")
    stated = tuple(Stated(**t) for t in things)
    relation = "left" if side else None
    return Caption(text, stated[::-1] if side == "right" else stated, place, place_style, relation)
