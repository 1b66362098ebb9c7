"""Suites: prompts, and what each of them asks for, thing by thing. Written here by published rules, or read from a user's file."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..demo import world
from ..demo.stickers import world as stickers
from ..hunt.prompts import lines_of, products
from ..language import scb
from ..language.grammar.reading import read
from ..language.writing import article

SMOKE = 4  # prompts of a suite in small
# The grammar and the words of Attend-and-Excite (arXiv 2301.13826; its code is under MIT), as its list of prompts has them: “a” before every
# noun, and no colours for what an animal wears.
ANIMALS = ("cat", "dog", "bird", "bear", "lion", "horse", "elephant", "monkey", "frog", "turtle", "rabbit", "mouse")
OBJECTS = (
    "backpack", "glasses", "crown", "suitcase", "chair", "balloon", "bow", "car", "bowl", "bench", "clock", "apple",
)  # fmt: skip
WORN = ("glasses", "crown", "bow")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black", "white")
NUMBERS = ("one", "two", "three", "four")
PLACES = ("left of", "right of", "above", "below")
# HeadHunter (arXiv 2506.10978, section 4.1.2) multiplies styles by contents; these lists are ours.
STYLES = ("oil painting", "watercolor", "pencil sketch", "pixel art", "claymation", "low poly")
CONTENTS = ("a lighthouse at the sea", "a fox in the snow", "a street at night", "a bowl of fruit", "a castle on a hill")


@dataclass(frozen=True)
class Thing:
    """Something that a prompt asks for: its noun, its whole phrase, what it is said to be, and how many there are."""

    noun: str
    phrase: str
    details: tuple[str, ...] = ()
    count: int = 1


@dataclass(frozen=True)
class Item:
    """A prompt, what it asks for, and the part of its suite that it belongs to."""

    text: str
    things: tuple[Thing, ...] = ()
    group: str = ""


def _thing(noun: str, colour: str = "") -> Thing:
    phrase = f"{colour} {noun}".strip()
    return Thing(noun, f"{article(phrase)} {phrase}", (colour,) if colour else ())


def _shapes(options: Mapping[str, Any]) -> list[Item]:
    """The bundled model's world: `world.prompts`, held out (``split`` test) or for choosing settings (tune)."""
    found = world.prompts(options.get("split", "test"), int(options.get("prompts", 500)), int(options.get("things", 2)))
    items = []
    for caption in found:
        things = []
        for t in caption.things:
            details = tuple(d for d in (t.colour, t.pattern) if d)
            things.append(Thing(t.noun, " ".join([*details, t.noun]), details))
        items.append(Item(caption.text, tuple(things), f"{len(things)} things"))
    return items


def _stickers(options: Mapping[str, Any]) -> list[Item]:
    """The second bundled model's world; ``having`` colour, accessory or style: every thing has one. ``things`` 1 is a part of SCB's."""
    having = str(options.get("having", ""))
    if having not in ("", "colour", "accessory", "style"):
        raise ValueError(f"prove: having is colour, accessory or style, and not “{having}”.")
    number, things = int(options.get("prompts", 500)), int(options.get("things", 2))
    items = []
    for caption in stickers.prompts(options.get("split", "test"), number, things, having=having):
        found = [
            Thing(t.noun, stickers.phrase(t), tuple(d for d in (t.style, t.colour, t.accessory) if d)) for t in caption.things
        ]
        items.append(Item(caption.text, tuple(found), having or f"{len(found)} things"))
    return items


def _two_objects(options: Mapping[str, Any]) -> list[Item]:
    """Attend-and-Excite's three kinds: 66 of two animals, 144 of an animal and an object, 66 of two coloured objects."""
    rng = random.Random(int(options.get("draw", 0)))

    def thing(noun: str, colour: str = "") -> Thing:
        return Thing(noun, " ".join(filter(None, ("a", colour, noun))), (colour,) if colour else ())

    def pair(first: Thing, second: Thing, group: str, link: str = "and") -> Item:
        return Item(f"{first.phrase} {link} {second.phrase}", (first, second), group)

    animals = [pair(thing(a), thing(b), "animals") for a, b in itertools.combinations(ANIMALS, 2)]
    mixed = []
    for a, o in itertools.product(ANIMALS, OBJECTS):
        second = thing(o) if o in WORN else thing(o, rng.choice(COLOURS))
        mixed.append(pair(thing(a), second, "animal-object", "with" if o in WORN else "and"))
    objects = []
    for a, b in itertools.combinations(OBJECTS, 2):
        objects.append(pair(thing(a, rng.choice(COLOURS)), thing(b, rng.choice(COLOURS)), "objects"))
    return _mixed([animals, mixed, objects])


def _mixed(groups: list[list[Item]]) -> list[Item]:
    """Groups in turn, so that the first items of a suite are of all of them."""
    return [item for row in itertools.zip_longest(*groups) for item in row if item is not None]


def _scb(options: Mapping[str, Any]) -> list[Item]:
    """Detail++'s style composition benchmark, 300 prompts by its rule (arXiv 2507.17853, appendix 8)."""
    items = []
    for i in range(scb.SIZE):
        found = scb.style_prompt(i, int(options.get("draw", 0)))
        things = []
        for phrase in (found.subject, found.background):
            style, _, noun = phrase.split(" ", 1)[1].partition(" style ")
            things.append(Thing(noun, phrase, (style,)))
        items.append(Item(found.prompt, tuple(things)))
    return items


def _styles(options: Mapping[str, Any]) -> list[Item]:
    return [Item(text) for text in products(options.get("styles", STYLES), options.get("contents", CONTENTS))]


def _counts(options: Mapping[str, Any]) -> list[Item]:
    """Counts and positions in the manner of GenEval (arXiv 2310.11513; its code is under MIT): words of our own."""
    things = (*ANIMALS, "apple", "balloon", "car", "chair", "clock", "suitcase")
    counted = []
    for noun in things:
        for number in (2, 3, 4):
            many = {"mouse": "mice"}.get(noun, f"{noun}s")
            counted.append(
                Item(
                    f"a photo of {NUMBERS[number - 1]} {many}",
                    (Thing(noun, f"{NUMBERS[number - 1]} {many}", (), number),),
                    "count",
                )
            )
    rng = random.Random(int(options.get("draw", 0)))
    placed = []
    for a, b in rng.sample(list(itertools.permutations(things, 2)), len(counted)):
        place = rng.choice(PLACES)
        first, second = _thing(a), _thing(b)
        placed.append(Item(f"a photo of {first.phrase} {place} {second.phrase}", (first, second), place))
    return _mixed([counted, placed])


def described(text: str, group: str = "") -> Item:
    """A prompt of unknown origin: its things by its grammar."""
    found = read(text)
    things = []
    for noun in found.nouns:
        head = " ".join(found.units[i].text for i in noun.name)
        details = tuple(" ".join(found.units[i].text for i in m) for m in noun.modifiers)
        phrase = " ".join([*details, head])
        things.append(Thing(head, f"{article(phrase)} {phrase}", details))
    return Item(text, tuple(things), group)


def _file(options: Mapping[str, Any]) -> list[Item]:
    """Prompts from a text file, one a line, as T2I-CompBench's colour, texture and shape lists are (a tab ends the prompt)."""
    path = _path(options)
    return [described(line.split("\t")[0].strip(), path.stem) for line in lines_of(path.read_text(encoding="utf-8"))]


def _coco(options: Mapping[str, Any]) -> list[Item]:
    """Captions of COCO (CC BY 4.0) from its ``captions_*.json``: the first caption of each picture, by the picture's number."""
    path = _path(options)
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        first: dict[int, str] = {}
        for note in sorted(notes, key=lambda n: int(n["id"])):
            first.setdefault(int(note["image_id"]), str(note["caption"]).strip())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"prove: {path} is not COCO's captions file ({error}); give captions_val2014.json or one like it."
        ) from None
    return [Item(first[number]) for number in sorted(first)]


def _path(options: Mapping[str, Any]) -> Path:
    path = Path(str(options.get("file", "")))
    if not options.get("file") or not path.is_file():
        raise ValueError(
            f"prove: the suite {options['name']} reads a file, and “{options.get('file', '')}” is none; write its path as file."
        )
    return path


def _own(options: Mapping[str, Any]) -> list[Item]:
    return [described(text) for text in options.get("texts", ())]


SUITES: Mapping[str, tuple[Callable[[Mapping[str, Any]], list[Item]], str]] = {
    "shapes": (_shapes, "the bundled model's world"),
    "stickers": (_stickers, "the second bundled model's world"),
    "scb": (_scb, "style composition benchmark of Detail++, by its published rule"),
    "two_objects": (_two_objects, "Attend-and-Excite's grammar; its code and lists are under MIT"),
    "styles": (_styles, "styles × contents, as in HeadHunter; our words"),
    "counts": (_counts, "counts and positions in the manner of GenEval; our words"),
    "file": (_file, "a file of yours, one prompt a line"),
    "coco": (_coco, "COCO captions (CC BY 4.0) from your copy"),
    "texts": (_own, "prompts of the config"),
}
OPTIONS = ("name", "prompts", "smoke", "split", "things", "having", "draw", "file", "texts", "styles", "contents")


def items(options: Mapping[str, Any]) -> list[Item]:
    """The prompts of a suite: all, the first ``prompts``, or a few (``smoke``).

    Raises:
        ValueError: for a suite or an option that nobody knows, or a file that is not there.
    """
    if options.get("name") not in SUITES:
        raise ValueError(f"prove: there is no suite “{options.get('name')}”; there are {', '.join(SUITES)}.")
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"prove: suite has “{unknown[0]}”, which is not known; there are {', '.join(OPTIONS)}.")
    found = SUITES[options["name"]][0](options)
    most = SMOKE if options.get("smoke") else int(options.get("prompts", len(found)))
    if not found or most < 1:
        raise ValueError(f"prove: the suite {options['name']} has no prompts.")
    return found[:most]
