"""What lives while sampling: the state of a run, and forwards of our own beside the normal one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .effects import Effect
from .prefix_cache import PrefixCache
from .requests import Request, Span
from .sites import Site

RUN = "attune_run"  # in transformer_options: the `SamplingRun`
EXTRA = "attune_pass"  # in transformer_options: the `ExtraForward`
GIVEN = "attune_given"  # in transformer_options: the whole batch of pictures that a forward's rows are of


def whole_picture(conds: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The first conditioning that is not limited to an area."""
    return next((cond for cond in conds if "area" not in cond), None)


def prompt(conds: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """The conditioning that a run's words belong to: the first positive one for the whole picture, else the first one."""
    positive = conds.get("positive") or ()
    return whole_picture(positive) or next(iter(positive), None)


@dataclass
class SamplingRun:
    """What lives while one sampling run lasts: recorded prefixes and every method's own state.

    Forwards of one run may go on at once, on threads and on copies of the model (ComfyUI gives each device its own), so state is kept by what
    it is of, never by the identity of tensors.

    Attributes:
        conds: the guider's conditionings by role.
        texts: the role, among ``conds``, of every text other than the prompt.
        sites: the places of the models met so far.
        state: every method's own.
        finished: called, in order, after a run that came to its end.
        acted: effects that there were; ``why``: reasons that methods know for those that there were not.
        held: spans that an evaluation was in.
        seed: the sampler's, or None where it has none.
        evaluation: number of the sampler's call of the guider that is going on, from 1; 0 where the guider does not say.
    """

    conds: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    texts: Mapping[Any, str] = field(default_factory=dict)
    sites: dict[int, dict[str, Site]] = field(default_factory=dict)
    prefixes: PrefixCache = field(default_factory=PrefixCache)
    state: dict[Any, Any] = field(default_factory=dict)
    finished: list[Callable[[], None]] = field(default_factory=list)
    acted: set[Effect | None] = field(default_factory=set)
    why: dict[Effect, str] = field(default_factory=dict)
    held: set[Span] = field(default_factory=set)
    seed: int | None = None
    evaluation: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    met: set[Any] = field(default_factory=set)
    met_in: Any = None
    read: tuple[int, float] | None = None
    bounds: dict[Any, tuple[float, float]] = field(default_factory=dict)
    schedules: dict[int, tuple[Tensor, list[float]]] = field(default_factory=dict)

    @property
    def prompt(self) -> dict[str, Any] | None:
        """The conditioning that words belong to (see `prompt`)."""
        return prompt(self.conds)

    def __deepcopy__(self, memo: dict[int, Any]) -> SamplingRun:
        """Cloning a model copies what is on it: a run is one, whoever copies its options."""
        return self

    def first_times(self, options: Mapping[str, Any]) -> tuple[bool, ...]:
        """Of each chunk of a forward that begins, whether its conditioning was not run before in this evaluation.

        Later forwards of it are other packs' own passes. To be asked once a forward.
        """
        roles, uuids, sigmas = (options.get(name) for name in ("cond_or_uncond", "uuids", "sigmas"))
        evaluation: Any = self.evaluation
        if not evaluation and sigmas is not None:  # a guider that ComfyUI's wrappers do not see
            evaluation = ("noise level", self.level(sigmas))
        with self.lock:
            if self.met_in != evaluation:
                self.met_in = evaluation
                self.met.clear()
            chunks = tuple(zip(uuids or (), roles or (), strict=False))
            out = tuple(chunk not in self.met for chunk in chunks)
            self.met.update(chunks)
        return out

    def given(self, x: Tensor | None) -> tuple[Tensor, int] | None:
        """The sampler's input as an evaluation's own; None where it is not known, or the guider does not say which evaluation goes on."""
        return None if x is None or not self.evaluation else (x, self.evaluation)

    # --- what is known of noise levels without waiting for the device: one wait an evaluation, for everybody, and some at the start ---

    def level(self, sigma: Tensor) -> float:
        """The noise level of the evaluation that is going on; all of its forwards have one."""
        with self.lock:
            if self.read is None or not self.evaluation or self.read[0] != self.evaluation:
                self.read = self.evaluation, float(sigma.flatten()[0])
            return self.read[1]

    def inside(self, span: Span, sigma: Tensor, model_sampling: Any) -> bool:
        """Whether the evaluation that is going on, at noise level ``sigma``, is in a span."""
        if span.whole:
            return True
        inside = self.within(span, self.level(sigma), model_sampling)
        if inside:
            self.held.add(span)
        return inside

    def within(self, span: Span, level: float, model_sampling: Any) -> bool:
        """Whether a noise level is in a span."""
        if span.whole:
            return True
        key = span, id(model_sampling)
        if key not in self.bounds:
            self.bounds[key] = span.levels(model_sampling)
        low, high = self.bounds[key]
        return low <= level <= high

    def schedule(self, sigmas: Tensor) -> list[float]:
        """The noise levels of a schedule, which is the same object in all steps."""
        known = self.schedules.get(id(sigmas))
        if known is None or known[0] is not sigmas:
            known = self.schedules[id(sigmas)] = sigmas, sigmas.tolist()
        return known[1]

    def step(self, sigma: Tensor, schedule: Tensor) -> int:
        """Number of the sampling step that is going on; an evaluation between two steps is of the first."""
        now = self.level(sigma) * (1 - 1e-6)
        return sum(level >= now for level in self.schedule(schedule)) - 1


@dataclass(frozen=True)
class ExtraForward:
    """A forward of our own, beside the normal one.

    Attributes:
        requests: its own; those of the model count in it too, but nothing is read.
        replay_before: the block up to which it may replay a recorded prefix.
        rows: which of the normal forward's pictures each of its own is; None: the same ones.
        given: the sampler's input in this evaluation, where its own are rows of that.
    """

    requests: tuple[Request, ...]
    replay_before: tuple[str, int] | None = None
    rows: tuple[int, ...] | None = None
    given: Tensor | None = None


def with_extra_forward(model_options: dict[str, Any], own: ExtraForward) -> dict[str, Any]:
    """A copy of a sampler's model options that makes the forwards under it the given one."""
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), EXTRA: own}}


def step_at(sigma: Tensor, schedule: Tensor) -> int:
    """Number of the sampling step that the noise level ``sigma`` is of; an evaluation between two steps is of the first."""
    return int((schedule >= sigma.flatten()[0] * (1 - 1e-6)).sum()) - 1
