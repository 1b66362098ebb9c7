"""Shares and paired differences with their 95 % intervals: the statistics of every table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def interval(hits: int, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.96, hits / number
    middle = (p + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(p * (1 - p) / number + z * z / (4 * number * number)) / (1 + z * z / number)
    return middle - half, middle + half


def paired(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference of two answers to the same prompts, with its 95 % interval; of one pair there is none, and it is infinite."""
    differences = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    spread = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    mean, half = float(differences.mean()), 1.96 * spread
    return mean, mean - half, mean + half


def shown_share(answers: Sequence[bool]) -> str:
    """A share in per cent with its 95 % interval, as tables have it."""
    low, high = interval(sum(answers), len(answers)) if answers else (0.0, 1.0)
    return f"{100 * sum(answers) / max(len(answers), 1):.1f} % ({100 * low:.0f}-{100 * high:.0f})"


def shown_change(before: Sequence[float], after: Sequence[float], percent: bool = True) -> str:
    """`paired` as tables have it: in points of per cent, or as it is."""
    factor, form = (100, "+.1f") if percent else (1, "+.3f")
    mean, low, high = (factor * x for x in paired(before, after))
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"
