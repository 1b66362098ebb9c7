"""The search: rounds over the heads of a model, by evaluations that a log remembers."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from PIL import Image

from ..methods.headhunter import Hunt, evaluations, hunt
from ..patches.hook.sites import Heads, Site, check
from .batches import Batch, HeadSet
from .engine import Engine
from .log import Evaluation, Evaluations
from .settings import Plan

Progress: TypeAlias = Callable[[int, int, float], None]  # pictures done, pictures in all, seconds left
Workers: TypeAlias = Callable[[Sequence[Batch]], Iterator[list[Evaluation]]]  # carries out batches, in any order


@dataclass
class Found:
    """What a search gives: the hunt itself, pictures of the sets along the way, and how much was computed now.

    Attributes:
        pictures: of no heads, and of the set after every round.
        means: of these sets, every scorer's mean score.
        images: per candidate; ``computed`` now, ``known`` from the log, and ``of_others``: in the log, and of other settings.
    """

    hunt: Hunt
    heads: Heads
    plan: Plan
    pictures: list[list[Image.Image]] = field(default_factory=list)
    means: list[tuple[float, ...]] = field(default_factory=list)
    images: int = 0
    computed: int = 0
    known: int = 0
    of_others: int = 0


def all_heads(sites: Iterable[Site], family: str) -> Heads:
    """Every head of a model."""
    return Heads(family, tuple((s.name, tuple(range(s.heads))) for s in sites))


def search(
    engine: Engine,
    log: Evaluations,
    plan: Plan,
    candidates: Heads | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Found:
    """Search for heads; what the log already knows is not computed again.

    Args:
        workers: carries out batches elsewhere; None: here, one after the other.

    Raises:
        ValueError: for candidates of another model, too few images for the conditionings, a ranking without its scorers, or one
            that no head passes.
    """
    plan.check(len(engine.scorers))
    chosen = check(candidates or all_heads(engine.sites, engine.family), engine.sites, engine.family)
    every = [(name, number) for name, numbers in chosen.items() for number in numbers]
    if plan.images < len(engine.positives):
        raise ValueError(
            f"HeadHunter: {len(engine.positives)} conditionings need images_per_candidate of at least as many, not {plan.images}."
        )
    total = evaluations(len(every), plan.rounds, plan.heads_per_round, plan.images, plan.halving)
    asked: dict[str, int] = {}
    done = computed = 0
    of_others = log.of_others()
    began = time.monotonic()

    def here(batches: Sequence[Batch]) -> Iterator[list[Evaluation]]:
        for sets, numbers in batches:
            yield engine.evaluate(sets, numbers)

    def tell() -> None:
        if progress is not None:
            left = (time.monotonic() - began) / computed * (total - done) if computed else math.nan
            progress(min(done, total), total, left)

    def means(sets: Sequence[HeadSet], over: int) -> list[tuple[float, ...]]:
        nonlocal done, computed
        # Batches follow from what this search has asked for so far, never from the log: a resumed search makes the same ones.
        fresh: dict[int, list[HeadSet]] = {}
        for heads in sets:
            if asked.get(engine.text(heads), 0) < over:
                fresh.setdefault(asked.get(engine.text(heads), 0), []).append(heads)
        todo: list[Batch] = []
        for start, members in fresh.items():
            for batch, numbers in engine.plan(members, range(start, over)):
                missing = tuple(h for h in batch if not log.has(engine.text(h), numbers))
                done += (len(batch) - len(missing)) * len(numbers)
                if missing:
                    todo.append((missing, numbers))
            asked.update((engine.text(h), over) for h in members)
        tell()
        for rows in (workers or here)(todo):
            log.add(rows)
            done, computed = done + len(rows), computed + len(rows)
            tell()
        return [log.means(engine.text(heads), over) for heads in sets]

    found = hunt(
        every,
        lambda sets, over: [plan.worth(scores) for scores in means(sets, over)],
        plan.rounds,
        plan.heads_per_round,
        plan.images,
        plan.halving,
        lambda sets, over: [plan.eligible(scores) for scores in means(sets, over)],
    )
    if not found.rounds:
        best = map(max, zip(*means([(head,) for head in every], 1), strict=True))
        raise ValueError(
            f"HeadHunter: no head passes the thresholds ({plan.text}); on the first picture the best scores are "
            f"{', '.join(f'{b:.4g}' for b in best)}. Lower the thresholds and search again: what is evaluated is in the log."
        )
    sets: list[Any] = [()]
    for r in found.rounds:
        sets.append((*sets[-1], *r.chosen))
    names = [engine.text(heads) for heads in sets]
    log.keep_pictures(names)
    return Found(
        hunt=found,
        heads=engine.heads(sets[-1]),
        plan=plan,
        pictures=[[Image.open(io.BytesIO(p)).convert("RGB") for p in log.pictures(name)] for name in names],
        means=[log.means(name, plan.images) for name in names],
        images=plan.images,
        computed=computed,
        known=done - computed,
        of_others=of_others,
    )
