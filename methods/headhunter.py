"""HeadHunter: greedy search for the attention heads whose perturbation serves an objective.

Source: "Where and How to Perturb" (NeurIPS 2025, arXiv 2506.10978 v4), algorithm 1. In every round each head that is not chosen yet is
tried together with the chosen ones, over the same prompt–seed pairs; the best ``k`` of them join the set. What a set is worth is the
business of a function that the search is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Head: TypeAlias = Any  # whatever can be a dictionary's key
HeadSet: TypeAlias = tuple[Head, ...]
# evaluate(sets, n): the mean score of each set over the first n images; higher is better.
Evaluate: TypeAlias = Callable[[Sequence[HeadSet], int], Sequence[float]]
Eligible: TypeAlias = Callable[[Sequence[HeadSet], int], Sequence[bool]]  # whether the last head of each set may join


@dataclass(frozen=True)
class Round:
    """One round of the search.

    Attributes:
        chosen: the heads that joined the set in this round, best first.
        scores: what the set of the rounds before was worth with each head added, in the order of the candidates.
        images: over how many images each of these scores is a mean; with halving not the same for all.
        score: what the whole set is worth after the round, over all images.
    """

    chosen: HeadSet
    scores: dict[Head, float]
    images: dict[Head, int]
    score: float


@dataclass(frozen=True)
class Hunt:
    """The result: ``plain`` is the score without any head, over all images."""

    plain: float
    rounds: tuple[Round, ...]

    @property
    def heads(self) -> HeadSet:
        """All chosen heads, in the order in which they were chosen."""
        return tuple(head for r in self.rounds for head in r.chosen)


def rungs(candidates: int, keep: int, images: int, halving: int) -> list[tuple[int, int]]:
    """Successive halving: how many candidates are scored over how many images, rung by rung.

    Every rung keeps the best 1/``halving`` of the candidates (and at least ``keep``) and gives them ``halving`` times the images. As
    many rungs as the images and the candidates allow; without halving (below 2) there is one.
    """
    if halving < 2:
        return [(candidates, images)]
    count = 0
    while images // halving ** (count + 1) >= 1 and candidates / halving ** (count + 1) >= keep:
        count += 1
    return [
        (max(keep, math.ceil(candidates / halving**i)) if i else candidates, max(1, round(images / halving ** (count - i))))
        for i in range(count + 1)
    ]


def harmonic_mean(a: float, b: float) -> float:
    """``2ab / (a + b)`` of two scores, near the smaller one; 0 where their sum is not above 0, as in the released code."""
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def hunt(
    candidates: Sequence[Head],
    evaluate: Evaluate,
    rounds: int,
    heads_per_round: int,
    images: int,
    halving: int = 0,
    eligible: Eligible | None = None,
) -> Hunt:
    """Search greedily; the same scores give the same result, and of equal scores the earlier candidate's wins.

    Args:
        candidates: heads to choose from, each once.
        evaluate: the mean score of sets over the first ``n`` images. It is asked for single sets more than once and should remember.
        rounds, heads_per_round: how often how many heads are added; the search ends early when no candidate is left.
        images: how many a final score is over.
        halving: below 2, every candidate is tried on all images; else see `rungs`.
        eligible: heads that may join; None: all. A round takes fewer than ``k`` where fewer may, and the search ends where none may.

    Raises:
        ValueError: for settings that leave nothing to search, or a score that is not a number.
    """
    if not candidates or len(set(candidates)) != len(candidates):
        raise ValueError("HeadHunter: the candidates must be one or more different heads.")
    if min(rounds, heads_per_round, images) < 1:
        raise ValueError("HeadHunter: rounds, heads_per_round and images_per_candidate must be 1 or more.")

    def scored(sets: Sequence[HeadSet], count: int) -> list[float]:
        found = [float(s) for s in evaluate(sets, count)]
        if len(found) != len(sets) or not all(map(math.isfinite, found)):
            raise ValueError("HeadHunter: the scorer gave something that is not a number; choose another scorer or objective.")
        return found

    (plain,) = scored([()], images)
    chosen: HeadSet = ()
    done: list[Round] = []
    for _ in range(rounds):
        left = [head for head in candidates if head not in chosen]
        if not left:
            break
        keep = min(heads_per_round, len(left))
        scores: dict[Head, float] = {}
        seen: dict[Head, int] = {}
        ranked, able = left, set(left)
        for count, over in rungs(len(left), keep, images, halving):
            trying = set(ranked[:count])
            trying_in_order = [head for head in left if head in trying]
            now = dict(zip(trying_in_order, scored([(*chosen, head) for head in trying_in_order], over), strict=True))
            scores.update(now)
            seen.update(dict.fromkeys(now, over))
            if eligible is not None:
                may = eligible([(*chosen, head) for head in trying_in_order], over)
                able = {head for head, yes in zip(trying_in_order, may, strict=True) if yes}
            # Stable: ties stay in order.
            ranked = sorted(trying_in_order, key=lambda head: (head not in able, -now[head]))
        best = tuple(head for head in ranked[:keep] if head in able)
        if not best:
            break
        chosen = (*chosen, *best)
        (score,) = scored([chosen], images)
        done.append(Round(best, {head: scores[head] for head in left}, {head: seen[head] for head in left}, score))
    return Hunt(plain, tuple(done))


def evaluations(candidates: int, rounds: int, heads_per_round: int, images: int, halving: int = 0) -> int:
    """How many images a search looks at in all, each set's images counted once."""
    seen: dict[frozenset[Head], int] = {}

    def count(sets: Sequence[HeadSet], over: int) -> list[float]:
        for heads in sets:
            key = frozenset(heads)
            seen[key] = max(seen.get(key, 0), over)
        return [0.0] * len(sets)

    hunt(range(candidates), count, rounds, heads_per_round, images, halving)
    return sum(seen.values())
