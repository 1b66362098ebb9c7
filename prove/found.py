"""Judges that look for things: whether they are there, how many, where, and what style they have."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..scoring.detector import Detector
from ..scoring.folders import DETECTORS, digest, files_of, model_folder
from ..scoring.metrics import style_score
from ..scoring.scorers import ClipScorer
from .judge import ALL, Judge
from .suites import PLACES, Item

SURE = 0.3  # below it a box is no find; GenEval and T2I benchmarks have it too
OVERLAP = 0.5  # intersection over union from which two boxes of a name are one thing; ours, since open detectors give a thing many boxes
APART = 0.1  # GenEval: what offsets are shortened by, in parts of both boxes' sizes


class Detection(Judge):
    """Attention Regulation's detection rate: the share of things that a detector finds; it does not count them."""

    share = True

    def __init__(self, name: str, folder: str, least: float = SURE):
        self.name, self.least, self.detector = name, least, Detector(folder)
        self.key = digest(files_of(model_folder(DETECTORS, folder)), "detection", least)

    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        found = {
            f"thing {i}": float(self.detector.find(picture[0], t.noun, self.least) is not None)
            for i, t in enumerate(item.things, 1)
        }
        return {ALL: float(all(found.values())), "share": sum(found.values()) / len(found), **found} if found else {}


class Styles(Judge):
    """The style composition score of Detail++: each part cut out by the detector, and CLIP's cosine with its phrase."""

    def __init__(self, name: str, folder: str, clip: str):
        self.name, self.detector, self.clip = name, Detector(folder), ClipScorer(clip)
        self.key = f"{self.clip.key} {digest(files_of(model_folder(DETECTORS, folder)), 'scb')}"

    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        if len(item.things) != 2:
            return {}
        return {ALL: float(style_score(picture, [t.phrase for t in item.things], self.clip, self.detector, None)[0][0])}


class Counts(Judge):
    """GenEval's counts and positions (arXiv 2310.11513) with an open detector: as many as asked for and no more, and each where it should be.

    Its code takes a Mask2Former trained on COCO and asks it to be surer of things that are counted (0.9), which open detectors never are.
    """

    share = True

    def __init__(self, name: str, folder: str, least: float = SURE):
        self.name, self.least, self.detector = name, least, Detector(folder)
        self.key = digest(files_of(model_folder(DETECTORS, folder)), "counts", least, OVERLAP)

    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        found = [self.detector.find_all(picture[0], thing.noun, self.least, OVERLAP) for thing in item.things]
        if any(thing.count > 1 for thing in item.things):
            out = {"count": all(len(f) == t.count for f, t in zip(found, item.things, strict=True))}
        elif item.group in PLACES and len(found) == 2:
            out = {"present": all(found), "position": all(found) and item.group in relations(found[0][0][0], found[1][0][0])}
        else:
            return {}
        return {ALL: float(all(out.values())), **{part: float(value) for part, value in out.items()}}


def relations(one: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box ``(left, top, right, bottom)`` is from another by GenEval's rule, in `PLACES`; nowhere when they are too close.

    The offset of the centres is shortened by `APART` of both sizes; an axis on which more than half of the offset's length is left counts.
    """
    offset = [(one[k] + one[k + 2] - other[k] - other[k + 2]) / 2 for k in (0, 1)]
    sizes = [abs(one[k + 2] - one[k]) + abs(other[k + 2] - other[k]) for k in (0, 1)]
    length = math.hypot(*offset)
    if length == 0:
        return set()
    x, y = (math.copysign(max(abs(o) - APART * s, 0), o) / length for o, s in zip(offset, sizes, strict=True))
    return {name for name, there in zip(PLACES, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True) if there}
