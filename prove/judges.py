"""Judges: what a picture gets from each scorer, as a whole and part by part. One that is not there is skipped, and the report says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..demo import scorer as demo
from ..demo.reader import WEIGHTS, judge, load_reader, read
from ..demo.stickers import reader as stickers
from ..demo.stickers.world import parse
from ..scoring.folders import digest
from ..scoring.metrics import score
from ..scoring.scorers import ClipScorer, PreferenceScorer, Scorer
from .blip import Matching, Questions
from .found import Counts, Detection, Styles
from .judge import ALL, Between, Judge, OfMany
from .pictures import Distance, Frechet
from .suites import Item


class Reader(Judge):
    """The bundled reader: things, colours, patterns, and the background of the bundled model's world."""

    name, share = "reader", True

    def __init__(self) -> None:
        self.reader = load_reader()
        self.key = digest([WEIGHTS], "prove reader")

    @torch.inference_mode()
    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        found = judge(read(self.reader, picture)[0], demo.parse(item.text))
        out = {
            "present": all(found.present),
            "colours": all(found.colour),
            "patterns": all(found.pattern),
            ALL: all(found.bound),
        }
        for i, (there, bound) in enumerate(zip(found.present, found.bound, strict=True), 1):
            out |= {f"thing {i} present": there, f"thing {i} bound": bound}
        for part, value in (("background", found.background), ("relation", found.relation)):
            if value is not None:
                out[part] = value
        return {part: float(value) for part, value in out.items()}


class Metric(Judge):
    """CLIP-T (with each phrase as a part), CLIP-IQA, or a preference."""

    def __init__(self, name: str, scorer: Scorer, metric: str):
        self.name, self.scorer, self.metric = name, scorer, metric
        self.key = f"{metric} {scorer.key}"

    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        out = {ALL: float(score(picture, "" if self.metric == "clip_iqa" else item.text, self.scorer, self.metric)[0])}
        if self.metric == "clip_t" and item.things:
            found = self.scorer.scores(picture, [t.phrase for t in item.things])[0]
            out |= {f"thing {i}": float(value) for i, value in enumerate(found, 1)}
        return out


class StickersReader(Judge):
    """The reader of the second bundled model's world: things, their details, the place and its style."""

    name, share = "reader", True

    def __init__(self) -> None:
        self.reader = stickers.load_reader()
        self.key = digest([stickers.WEIGHTS], "prove reader")

    @torch.inference_mode()
    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        caption, (reading,) = parse(item.text), stickers.read(self.reader, picture)
        found = stickers.judge(reading, caption)
        right = {"present": found.present, "colours": found.colour, "accessories": found.accessory, "styles": found.style}
        out = {part: all(values) for part, values in {**right, ALL: found.bound}.items()}
        out["leaked"] = stickers.leaked(reading, caption)
        for i, (there, bound) in enumerate(zip(found.present, found.bound, strict=True), 1):
            out |= {f"thing {i} present": there, f"thing {i} bound": bound}
        for part, value in (("place", found.place), ("place's style", found.place_style), ("relation", found.relation)):
            if value is not None:
                out[part] = value
        if found.place_style is not None and len(caption.things) == 1:  # Detail++'s benchmark
            out["both styles"] = found.place_style and found.bound[0]
        return {part: float(value) for part, value in out.items()}


def _demo(name: str, kind: str) -> Judge:
    if kind == "bound":
        return Reader()
    if kind == "stickers bound":
        return StickersReader()
    if kind == "similarity":
        return Metric(name, demo.DemoScorer(), "clip_t")
    raise ValueError(f"prove: there is no scorer “{name}”; write “demo: bound”, “demo: stickers bound” or “demo: similarity”.")


def _two(kind: Callable[[str, str, str], Any]) -> Callable[[str, str], Any]:
    """A scorer of two folders, with a comma between them."""

    def make(name: str, folders: str) -> Any:
        first, _, second = (part.strip() for part in folders.partition(","))
        return kind(name, first, second)

    return make


KINDS: Mapping[str, Callable[[str, str], Judge | Between | OfMany]] = {
    "demo": _demo,
    "clip_t": lambda name, folder: Metric(name, ClipScorer(folder), "clip_t"),
    "clip_iqa": lambda name, folder: Metric(name, ClipScorer(folder), "clip_iqa"),
    "preference": lambda name, folder: Metric(name, PreferenceScorer(folder), "preference"),
    "detection": Detection,
    "counts": Counts,
    "scb": _two(Styles),
    "vqa": Questions,
    "reward": Matching,
    "distance": Distance,
    "frechet": _two(Frechet),
}


def judges(names: list[str]) -> tuple[list[Any], list[str]]:
    """The scorers of a config (`Judge`, `Between`, `OfMany`), and a sentence for each that is not there.

    Raises:
        ValueError: for a kind of scorer that nobody knows.
    """
    found: list[Any] = []
    missing = []
    for name in names:
        kind, _, folder = (part.strip() for part in name.partition(":"))
        if kind not in KINDS:
            raise ValueError(
                f"prove: there is no kind of scorer “{kind}”; there are {', '.join(KINDS)}, as in “clip_t: folder”."
            )
        if kind == "demo":
            found.append(_demo(name, folder))
            continue
        try:
            found.append(KINDS[kind](name, folder))
        except ValueError as error:
            missing.append(f"{name} is skipped: {error}")
    return found, missing
