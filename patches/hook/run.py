"""What lives while sampling: the state of a run, and forwards of our own beside the normal one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .prefix_cache import PrefixCache
from .requests import Request
from .sites import Site

RUN = "attune_run"  # in transformer_options: the `SamplingRun`
EXTRA = "attune_pass"  # in transformer_options: the `ExtraForward`


@dataclass
class SamplingRun:
    """What lives while one sampling run lasts: recorded prefixes and every method's own state.

    ``conds`` are the guider's conditionings by role, ``sites`` the places of the models met so far; ``finished`` is called, in
    order, after a run that came to its end; ``seed`` is the sampler's, or None where it has none.
    """

    conds: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    sites: dict[int, dict[str, Site]] = field(default_factory=dict)
    prefixes: PrefixCache = field(default_factory=PrefixCache)
    state: dict[Any, Any] = field(default_factory=dict)
    finished: list[Callable[[], None]] = field(default_factory=list)
    seed: int | None = None


@dataclass(frozen=True)
class ExtraForward:
    """A forward of our own, beside the normal one: its own requests, and whether it may replay a recorded prefix.

    ``rows`` says which of the normal forward's pictures each of its own is; None: the same ones.
    """

    requests: tuple[Request, ...]
    replay_before: tuple[str, int] | None = None
    rows: tuple[int, ...] | None = None


def with_extra_forward(model_options: dict[str, Any], own: ExtraForward) -> dict[str, Any]:
    """A copy of a sampler's model options that makes the forwards under it the given one."""
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), EXTRA: own}}


def step_at(sigma: Tensor, schedule: Tensor) -> int:
    """Number of the sampling step that the noise level ``sigma`` is of; an evaluation between two steps is of the first."""
    return int((schedule >= sigma.flatten()[0] * (1 - 1e-6)).sum()) - 1
