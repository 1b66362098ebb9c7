"""What Word Weights costs on an SD1.5-shaped UNet, and what it does on the bundled model: curves of weights, and words in places.

Pictures of held-out prompts of several things are read by the reader. A thing's phrase, or its colour, weighs from −2 to 5: is the thing there,
does it have the colour, and what of the others? "colour's area" is the share of pixels within 60 of 255 of the colour. Then a thing's phrase
has a quarter of the picture as its mask: is its centre there?
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from ...demo import model, world
from ...demo.reader import SURE, Reading, load_reader, read
from ...language.phrases import fusable
from ...language.weights import Weighted
from ...language.words import Phrase, Words, prompt_words
from ...patches import weights
from ...patches.weights import ATTENTION, VALUE, Settings
from ...prove.statistics import shown_change, shown_share
from .shared import speed
from .shared.pictures import generate
from .shared.records import recorded
from .shared.speed import PLAIN
from .toolbox import PHRASES

BATCH = 20  # prompts drawn at once
NEAR = 60 / 255  # of a colour, in each channel's units
GRID = (-2.0, -1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
TWO = "two phrases"
LIMITS = dict.fromkeys((f"{TWO}, {mode}" for mode in weights.MODES), 1.03)


def variants(plain: comfy.model_patcher.ModelPatcher) -> dict[str, comfy.model_patcher.ModelPatcher]:
    """The plain model, and two phrases at every layer and step."""

    def two(mode: str, number: float, mask: Tensor | None = None) -> comfy.model_patcher.ModelPatcher:
        chosen = [Weighted(p, number) for p in PHRASES.phrases]
        return weights.apply(plain, PHRASES, chosen, mask, Settings(mode))

    return {
        PLAIN: plain,
        **{f"{TWO}, {mode}": two(mode, 1.5) for mode in weights.MODES},
        f"{TWO}, a mask each": two(ATTENTION, 1.5, torch.eye(8).repeat(2, 1, 1)),
        "weights of 1": two(ATTENTION, 1.0),
    }


@dataclass(frozen=True)
class Case:
    """A prompt, the thing of it whose words are weighed, its whole phrase and its colour."""

    caption: world.Caption
    thing: world.Stated
    words: Words
    phrase: Phrase
    colour: Phrase


def cases(clip: Any, split: str, count: int, things: int) -> list[Case]:
    """Prompts, each with one of its things."""
    out = []
    for i, caption in enumerate(world.prompts(split, count, things)):
        thing = caption.things[i % things]
        assert thing.colour is not None
        whole = fusable(prompt_words(clip, caption.text))
        words = prompt_words(clip, caption.text, thing.colour)
        phrase = next(p for p in whole.phrases if thing.noun in p.text.split())
        out.append(Case(caption, thing, words, phrase, words.phrases[0]))
    return out


@dataclass(frozen=True)
class Seen:
    """What a picture shows: the weighed thing, its colour on it, the other things, the area of the colour, and the thing's centre."""

    present: bool
    coloured: bool
    others: bool
    area: float
    centre: tuple[float, float] | None


def seen(case: Case, picture: Tensor, reading: Reading) -> Seen:
    """Of a picture ``[H, W, 3]`` and what the reader sees in it."""
    sure = [t for t in reading.things if t.confidence >= SURE]
    own = [t for t in sure if t.noun == case.thing.noun]
    nouns = {t.noun for t in sure}
    others = [t.noun in nouns for t in case.caption.things if t is not case.thing]
    rgb = torch.tensor(world.COLOURS[case.thing.colour or ""]) / 255
    area = float(((picture - rgb).square().mean(-1).sqrt() < NEAR).float().mean())
    best = max(own, key=lambda t: t.confidence, default=None)
    centre = None if best is None else (best.x / world.SIZE, best.y / world.SIZE)
    return Seen(bool(own), any(t.colour == case.thing.colour for t in own), all(others), area, centre)


Patch = Callable[[Any, Sequence[Case], int], Any]


def draw(given: Sequence[Case], patch: Patch, args: argparse.Namespace) -> list[Seen]:
    """A picture for each case, read. ``patch(model, cases, number of the first)`` is of one batch."""
    base, clip, vae = model.load()
    pictures = []
    for start in range(0, len(given), BATCH):
        part = given[start : start + BATCH]
        texts = [case.caption.text for case in part]
        pictures.append(generate(patch(base, part, start), clip, vae, texts, args.cfg, args.seed + start, args.steps))
    found = read(load_reader(), torch.cat(pictures))
    return [seen(*parts) for parts in zip(given, torch.cat(pictures), found, strict=True)]


def weighed(
    base: Any, part: Sequence[Case], phrases: Sequence[Phrase], number: float, masks: Sequence[Tensor] | None, chosen: Settings
) -> Any:
    """A model that draws several prompts at once, each with its own phrase: every phrase has a mask for every picture.

    In the pictures that it is not of, its mask makes its gain 1.
    """
    chosen = chosen if masks is not None else replace(chosen, outside=1.0)
    mine = [torch.ones(2, 2)] * len(part) if masks is None else masks
    elsewhere = torch.full((2, 2), (1 - chosen.outside) / (number - chosen.outside) if number != chosen.outside else 0.0)
    sets = torch.stack([mine[i] if i == p else elsewhere for i in range(len(part)) for p in range(len(part))])
    return weights.apply(base, part[0].words, [Weighted(phrase, number) for phrase in phrases], sets, chosen)


def curve(given: Sequence[Case], what: str, args: argparse.Namespace) -> None:
    """Print how much there is of a thing or a colour as its words weigh more."""
    plain = draw(given, lambda base, part, first: base, args)
    print(
        f"| mode | weight of the {what} | {what} there | against plain | other things there | against plain | colour's area |"
    )
    print("|---|---|---|---|---|---|---|")
    for mode in args.modes:
        for number in args.weights:

            def patch(base: Any, part: Sequence[Case], first: int, mode: str = mode, number: float = number) -> Any:
                phrases = [case.phrase if what == "thing" else case.colour for case in part]
                return weighed(base, part, phrases, number, None, Settings(mode))

            found = plain if number == 1 else draw(given, patch, args)
            cells = [f"{mode}", f"{number:g}"]
            for of in (lambda s: s.present if what == "thing" else s.coloured, lambda s: s.others):
                before, now = [of(s) for s in plain], [of(s) for s in found]
                cells += [shown_share(now), "" if found is plain else shown_change(before, now)]
            print(f"| {' | '.join(cells)} | {100 * statistics.mean(s.area for s in found):.1f} % |", flush=True)


def quarter(i: int) -> tuple[int, int]:
    """Row and column of the quarter of the picture that a prompt's thing is sent to."""
    return i // 2 % 2, i % 2


def inside(s: Seen, i: int) -> bool:
    return s.centre is not None and (int(s.centre[1] >= 0.5), int(s.centre[0] >= 0.5)) == quarter(i)


def places(given: Sequence[Case], args: argparse.Namespace) -> None:
    """Print where things are drawn whose phrase has a quarter of the picture as its mask."""

    def patch(mode: str, number: float, outside: float, end: float) -> Patch:
        def masked(base: Any, part: Sequence[Case], first: int) -> Any:
            masks = [torch.zeros(2, 2) for _ in part]
            for i, mask in enumerate(masks, first):
                mask[quarter(i)] = 1
            return weighed(base, part, [case.phrase for case in part], number, masks, Settings(mode, 0.0, end, outside))

        return masked

    rows: list[tuple[str, Patch]] = [("plain", lambda base, part, first: base)]
    for mode in args.modes:
        for number in args.inside:
            for outside in args.outside:
                for end in args.end:
                    rows.append(
                        (f"{mode}, weight {number:g}, outside {outside:g}, until {end:g}", patch(mode, number, outside, end))
                    )
    print("| mask | thing there | of these in its quarter | other things there |")
    print("|---|---|---|---|")
    for name, change in rows:
        found = draw(given, change, args)
        there = [inside(s, i) for i, s in enumerate(found) if s.present]
        cells = [shown_share([s.present for s in found]), shown_share(there), shown_share([s.others for s in found])]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def settings(parser: argparse.ArgumentParser) -> None:
    """Options of the effect."""
    parser.add_argument("--only", nargs="*", default=[], choices=("cost", "thing", "colour", "places"))
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--things", type=int, default=2, help="objects in a prompt, 1 to 3")
    parser.add_argument("--split", choices=("test", "tune"), default="test", help="tune is for choosing settings")
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--sampling-steps", dest="steps_of_picture", type=int, default=20)
    parser.add_argument("--weights", type=float, nargs="+", default=list(GRID))
    parser.add_argument("--modes", nargs="+", default=[ATTENTION, VALUE], help="of the effect")
    parser.add_argument("--inside", type=float, nargs="+", default=[1.0], help="weights where the mask is white")
    parser.add_argument("--outside", type=float, nargs="+", default=[0.0], help="weights where it is black")
    parser.add_argument("--end", type=float, nargs="+", default=[1.0], help="end_percent of the places")


@recorded
def main(argv: list[str]) -> int:
    """Print the cost at SD1.5's size, then the effect on the bundled model's pictures."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    settings(parser)
    own, rest = parser.parse_known_args(argv)
    own.steps = own.steps_of_picture
    if not own.only or "cost" in own.only:
        about = f"{__doc__} Also: --only cost, thing, colour or places; of the effect --prompts, --things, --split, --cfg, --seed, --weights, …"
        speed.main("weights", about, variants, LIMITS, rest)
    given = cases(model.load()[1], own.split, own.prompts, own.things)
    about = f"{own.prompts} prompts of {own.things} things ({own.split}), {own.steps} steps, cfg {own.cfg:g}, the same seeds"
    for what in ("thing", "colour"):
        if not own.only or what in own.only:
            print(f"\nThe weight of a {what}; {about}:")
            curve(given, what, own)
    if not own.only or "places" in own.only:
        print(f"\nA thing's phrase with a quarter of the picture as its mask; {about}:")
        places(given, own)
    return 0
