"""Which pictures of which head sets share a batch, and their conditionings as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

HeadSet: TypeAlias = tuple[tuple[str, int], ...]  # (site, head number) pairs
Batch: TypeAlias = tuple[tuple[HeadSet, ...], tuple[int, ...]]  # sets, and numbers of the pictures that each is tried on

ROWS = 32  # pictures in a batch at the most: more is no faster, and shown progress gets coarse


def batches(
    sets: Sequence[HeadSet], groups: Sequence[Sequence[int]], rows: int, start: Callable[[HeadSet], int]
) -> list[Batch]:
    """Batches of at most ``rows`` pictures: pictures of a group together, and sets that begin at about the same layer.

    Args:
        groups: numbers of pictures whose prompts can be together (see `alike`).
        start: the layer that a set begins at.
    """
    ordered = sorted(sets, key=start)
    found: list[Batch] = []
    for group in groups:
        for part in parts(group, rows):
            found += [(tuple(some), tuple(part)) for some in parts(ordered, max(1, rows // len(part)))]
    return found


def parts(things: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Equal parts (to one) of at most ``size``, in order."""
    count = math.ceil(len(things) / size)
    for i in range(count):
        yield things[len(things) * i // count : len(things) * (i + 1) // count]


def tiled(t: Tensor, count: int) -> Tensor:
    """``count`` copies after one another: a batch of pictures for every set."""
    return t.repeat(count, *[1] * (t.ndim - 1))


def alike(positives: Sequence[Sequence[Any]]) -> list[int]:
    """For every conditioning the number of the first one that it can share a batch with."""
    return [next(j for j in range(i + 1) if j == i or _joinable(positives[j], p)) for i, p in enumerate(positives)]


def _joinable(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two conditionings differ in nothing but the text, so that they can be rows of one batch."""
    if len(a) != 1 or len(b) != 1 or a[0][0].shape != b[0][0].shape or len(a[0][0]) != 1 or a[0][1].keys() != b[0][1].keys():
        return False
    for key, value in a[0][1].items():
        other = b[0][1][key]
        if isinstance(value, Tensor):
            if key != "pooled_output" or not isinstance(other, Tensor) or value.shape != other.shape:
                return False
        elif value is not other and not (isinstance(value, (int, float, str)) and value == other):
            return False
    return True


def joined(conditionings: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """One conditioning with a row per picture; ComfyUI repeats the rows for every set."""
    first = conditionings[0]
    if all(c is first for c in conditionings):
        return first
    options = dict(first[0][1])
    if isinstance(options.get("pooled_output"), Tensor):
        options["pooled_output"] = torch.cat([c[0][1]["pooled_output"] for c in conditionings])
    return [[torch.cat([c[0][0] for c in conditionings]), options]]
