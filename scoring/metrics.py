"""Scores of a batch of pictures: what the nodes Score Images, Diversity and SCB Score give back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..methods.scores import PAIR, Box, around, clip_iqa, crop, within
from .detector import Detector
from .scorers import Scorer

METRICS = ("clip_t", "clip_iqa", "preference")


def score(images: Tensor, text: str, scorer: Scorer, metric: str) -> Tensor:
    """One score for each picture ``[B, h, w, 3]``, ``[B]``.

    Raises:
        ValueError: when the metric needs another scorer, or a text.
    """
    if metric not in METRICS:
        raise ValueError(f"Score Images: there is no metric “{metric}”; choose one of: {', '.join(METRICS)}")
    if metric != "preference" and not scorer.cosine:
        raise ValueError(
            f"Score Images: {metric} compares a picture with a text by their cosine, which the scorer “{scorer.name}” does not give. "
            "Connect CLIP Scorer, or Demo Scorer set to similarity, or choose the metric preference."
        )
    if metric == "clip_iqa":
        return clip_iqa(scorer.scores(images, antonyms(text)), scorer.scale)
    if not text.strip():
        raise ValueError(f"Score Images: {metric} needs the text that the pictures should show; the text is empty.")
    found = scorer.scores(images, [text])[:, 0]
    return scorer.scale * found if scorer.cosine and metric == "preference" else found


def antonyms(text: str) -> tuple[str, str]:
    """“Bright photo. | Dark photo.” as a pair; without a bar CLIP-IQA's own, for quality.

    Raises:
        ValueError: when a side is empty or there are more than two.
    """
    if "|" not in text:
        return PAIR
    sides = [side.strip() for side in text.split("|")]
    if len(sides) != 2 or not all(sides):
        raise ValueError(f"Score Images: clip_iqa takes two opposites, as in “Bright photo. | Dark photo.”, and not “{text}”.")
    return sides[0], sides[1]


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows with tabs between cells, which every spreadsheet takes; numbers with four digits."""
    cells = [[f"{c:.4f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    return "\n".join("\t".join(row) for row in [list(heads), *cells])


def thing(phrase: str) -> str:
    """What to look for: “a sketch style robot” is found as “robot”, other phrases without their article."""
    name = phrase.rpartition(" style ")[2].strip()
    first, _, rest = name.partition(" ")
    return rest if first.lower() in ("a", "an", "the") and rest else name


def style_score(
    images: Tensor, phrases: Sequence[str], scorer: Scorer, detector: Detector | None, masks: Tensor | None
) -> tuple[Tensor, str]:
    """The style composition score: each part of a picture, cut out with its box, against its phrase; the mean of the parts.

    A part that is not found is judged by the whole picture.

    Args:
        images: ``[B, h, w, 3]``.
        phrases: of the parts, such as subject and background.
        masks: ``[B, h, w]`` of the first part, or ``[parts · B, h, w]``, the first part's for every picture and so on. Without a
            detector.

    Returns:
        Scores ``[B]`` and a table.

    Raises:
        ValueError: when phrases are empty, there is nothing to find parts by, or masks are of another number.
    """
    if not all(p.strip() for p in phrases):
        raise ValueError("SCB Score: subject and background each need a phrase, such as “a sketch style robot”.")
    if not scorer.cosine:
        raise ValueError(f"SCB Score compares by cosine, which the scorer “{scorer.name}” does not give: connect CLIP Scorer.")
    count = len(images)
    if masks is not None:
        masks = masks if masks.ndim == 3 else masks[None]
        if len(masks) not in (count, len(phrases) * count):
            raise ValueError(
                f"SCB Score: there are {len(masks)} masks for {count} pictures. Give one per picture (the subject's), or two: the subject's "
                "for every picture, then the background's, as Attention Segmentation does with two words."
            )
    elif detector is None:
        raise ValueError("SCB Score needs masks (from Attention Segmentation) or a detector to find the parts of a picture by.")
    found = torch.zeros(count, len(phrases))
    rows: list[tuple[object, ...]] = []
    for b in range(count):
        for p, phrase in enumerate(phrases):
            box = _box(images[b], phrase, p * count + b, detector, masks)
            found[b, p] = scorer.scores(crop(images[b], box)[None], [phrase])[0, 0]
            rows.append(
                (b + 1, phrase, "whole picture" if box is None else "{}, {} to {}, {}".format(*box), float(found[b, p]))
            )
    each = found.mean(dim=1)
    rows.append(("mean", "", "", float(each.mean())))
    return each, table(("picture", "part", "where", "score"), rows)


def _box(picture: Tensor, phrase: str, index: int, detector: Detector | None, masks: Tensor | None) -> Box | None:
    height, width = picture.shape[:2]
    if masks is not None:
        if index >= len(masks):
            return None
        mask = torch.nn.functional.interpolate(masks[index][None, None].float(), (height, width), mode="nearest")[0, 0]
        box = around(mask)
        return None if box is None else within(box, height, width)
    assert detector is not None
    hit = detector.find(picture, thing(phrase))
    return None if hit is None else hit[0]
