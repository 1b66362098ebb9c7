"""What a search is set to: the pictures that it draws, and how it goes through the heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import comfy.samplers

from ..methods.headhunter import harmonic_mean
from ..patches.samplers import needs
from ..patches.softpag import AUTOMATIC

Ranking: TypeAlias = Callable[[Sequence[float]], float]  # scores of all scorers to what a head set is worth


@dataclass(frozen=True)
class Settings:
    """The sampler's numbers and SoftPAG's, as their nodes have them.

    ``cfg`` is 1, no guidance but SoftPAG's, as in the paper; ``scale`` may be `AUTOMATIC`, the model family's own.
    """

    seed: int = 0
    steps: int = 20
    cfg: float = 1.0
    sampler_name: str = "euler"
    scheduler: str = "normal"
    scale: float = AUTOMATIC
    perturbation: float = 1.0
    start_percent: float = 0.0

    def check(self) -> None:
        """Raises ValueError for settings that cannot be searched with."""
        known = comfy.samplers.KSampler
        if self.sampler_name not in known.SAMPLERS or self.scheduler not in known.SCHEDULERS:
            raise ValueError(
                f"HeadHunter: this ComfyUI has no sampler “{self.sampler_name}” or no scheduler “{self.scheduler}”."
            )
        needs(self.sampler_name, "HeadHunter")
        if self.sampler_name == "dpm_adaptive" or self.sampler_name.endswith("cfg_pp"):
            raise ValueError(
                f"HeadHunter: the sampler “{self.sampler_name}” mixes the pictures of a batch or reads single predictions; choose another."
            )
        if self.scale == 0 or not 0 < self.perturbation <= 1:
            raise ValueError(
                "HeadHunter: with scale 0 or perturbation 0 all heads are alike; set scale to 3 and perturbation to 1."
            )
        if not 0 <= self.start_percent < 1 or self.steps < 1:
            raise ValueError("HeadHunter: start_percent must be from 0 up to, but not including, 1, and steps 1 or more.")


FIRST, HARMONIC, THRESHOLDS = "scorer", "harmonic mean", "above thresholds"
RANKINGS: Mapping[str, tuple[int, Ranking]] = {  # how many scorers each needs, and what it makes of their scores
    FIRST: (1, lambda scores: scores[0]),
    HARMONIC: (2, lambda scores: harmonic_mean(scores[0], scores[1])),
    THRESHOLDS: (2, lambda scores: scores[0]),
}


@dataclass(frozen=True)
class Plan:
    """How a search goes through the heads.

    Attributes:
        rounds, heads_per_round: how often how many heads join.
        images: pictures (prompt–seed pairs) that every candidate is judged by.
        halving: see `methods.headhunter.rungs`.
        ranking: one of `RANKINGS`: the first scorer's score; the harmonic mean of the first two; or the first one's score among heads
            whose other scores reach ``thresholds``.
        thresholds: of the second scorer, the third, and so on.
    """

    rounds: int = 3
    heads_per_round: int = 2
    images: int = 8
    halving: int = 0
    ranking: str = FIRST
    thresholds: tuple[float, ...] = ()

    def check(self, scorers: int) -> None:
        """Raises ValueError for a ranking that these many scorers cannot serve."""
        if self.ranking not in RANKINGS:
            raise ValueError(f"HeadHunter: there is no ranking “{self.ranking}”; choose one of {', '.join(RANKINGS)}.")
        needed, _ = RANKINGS[self.ranking]
        if scorers < needed:
            raise ValueError(
                f"HeadHunter: the ranking “{self.ranking}” needs {needed} scorers; connect scorer_2, or set ranking to “{FIRST}”."
            )
        if self.ranking == THRESHOLDS and len(self.thresholds) < scorers - 1:
            raise ValueError(
                f"HeadHunter: the ranking “{self.ranking}” needs a threshold for each of the {scorers - 1} other scorers."
            )

    def worth(self, scores: Sequence[float]) -> float:
        """What a head set with these scores is worth."""
        return RANKINGS[self.ranking][1](scores)

    def eligible(self, scores: Sequence[float]) -> bool:
        """Whether a head with these scores may join."""
        return self.ranking != THRESHOLDS or all(s >= t for s, t in zip(scores[1:], self.thresholds, strict=False))

    @property
    def text(self) -> str:
        """The ranking, for people."""
        if self.ranking == THRESHOLDS:
            return f"{self.ranking} {', '.join(f'{t:g}' for t in self.thresholds)}"
        return self.ranking


CUSTOM = "custom"
PRESETS: Mapping[str, dict[str, Any]] = {  # sections 4.1.1 and 4.1.2 of the paper
    CUSTOM: {},
    "quality": {"rounds": 1, "heads_per_round": 24, "images": 20},
    "style": {"rounds": 5, "heads_per_round": 3, "images": 5},
}
