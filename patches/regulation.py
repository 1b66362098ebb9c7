"""Attention Regulation on ComfyUI models: one edit of the target words' columns per layer, its state, and the checks before a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..methods import regulation as maths
from .hook.call import AttentionCall
from .hook.install import ModelPatcher, model_sites, request
from .hook.requests import COND, EditWeights, Span
from .hook.sites import Heads, Site, check
from .hook.tensors import index
from .maps.record import auto_sites
from .observer import NOBODY, Observer
from .prompts import edit_own, guard, own_name

if TYPE_CHECKING:
    from ..language.words import Words

CHUNK = 77  # columns of CLIP that have a start and an end token of their own
T5 = "t5xxl"  # the text encoder whose columns come after CLIP's


@dataclass
class _Layer:
    """One layer's edit of one conditioning: the running average, and the sampling step that it is of."""

    step: int | None
    edit: Tensor  # S_EMA, [T, pictures, H, M]


@dataclass(frozen=True)
class _Method:
    """The settings, and a key to the state of this one node."""

    targets: tuple[int, ...]  # places among the columns that the hook hands over
    strength: float
    iterations: int
    mass_weight: float
    deviation_weight: float
    ema: float
    decay: float
    key: object
    names: tuple[str, ...] = ()  # of the phrases,
    members: tuple[tuple[int, ...], ...] = ()  # and which of ``targets`` are theirs
    observer: Observer = NOBODY

    def edit(self, call: AttentionCall, weights: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """An ``edit`` request: ``[R, H, M, T + restored]`` to the same and the factor on all other columns.

        The restored columns stay as they are.
        """
        return edit_own(call, weights, lambda part: self._edit(call, part))

    def _edit(self, call: AttentionCall, part: Tensor) -> tuple[Tensor, Tensor]:
        targets = index(self.targets, part.device)
        old = maths.shape(part, targets).unflatten(1, (-1, call.pictures))
        edit = self._layer(call, own_name(call), old[:, 0].detach()) * (
            self.strength * maths.fading(call.step or 0, self.decay)
        )
        raised, factor = maths.regulated(old, edit[:, None])
        raised, factor = raised.flatten(1, 2).permute(1, 2, 3, 0), factor.flatten(0, 1)[..., None]
        if not call.perturbed and self.observer.watching():
            shown = torch.stack([raised[0][..., list(m)].mean(dim=-1) for m in self.members], dim=-1)
            self.observer.layer(call, shown, self.names)
        return part.index_copy(-1, targets, raised), factor

    def _layer(self, call: AttentionCall, name: Any, old: Tensor) -> Tensor:
        """``S_EMA [T, pictures, H, M]`` of this layer and step. It moves on once a step, however often the sampler asks."""
        if call.run is None:
            return self._solve(call, old)
        state: dict[Any, Any] = call.run.state.setdefault(self.key, {})
        place = (call.site.name, name)
        known: _Layer | None = state.get(place)
        if known is not None and known.edit.shape != old.shape:  # another size, as in a node that samples in parts
            known = None
        if known is None or known.step is None or known.step != call.step:
            best = self._solve(call, old)
            known = state[place] = _Layer(call.step, maths.average(None if known is None else known.edit, best, self.ema))
        return known.edit

    def _solve(self, call: AttentionCall, old: Tensor) -> Tensor:
        state: dict[Any, Any] = {} if call.run is None else call.run.state.setdefault(self.key, {})
        grid = (call.height, call.width)
        if grid not in state:
            state[grid] = maths.problem(grid, len(old), self.mass_weight, self.deviation_weight, old)
        seed = 0 if call.run is None or call.run.seed is None else call.run.seed
        pictures, heads = old.shape[1:3]
        # The same start for every picture, so that one does not depend on its place in the batch.
        theta = maths.start(len(old), heads, seed + 1_000_003 * call.site.layer + 7_919 * (call.step or 0), old)
        edit = maths.solve(old.flatten(1, 2), theta.repeat(1, pictures, 1, 1), state[grid], self.iterations)
        return edit.view(old.shape)


def auto_layers(sites: tuple[Site, ...], family: str) -> tuple[Site, ...]:
    """The last down-sampling and the first up-sampling block with attention to text, with all their layers, as in the paper.

    SD3 and FLUX have no such blocks: three layers around the middle, as for the maps, which is beyond the paper.

    Raises:
        ValueError: for a model without attention to text.
    """
    with_text = [s for s in sites if "cross" in s.kinds]
    if family != "unet" or not with_text:
        return auto_sites(sites, family)
    down = [s for s in with_text if s.name.startswith("input.")]
    up = [s for s in with_text if s.name.startswith("output.")]
    chosen = [s for s in down if s.stride == down[-1].stride] + [s for s in up if s.stride == up[0].stride]
    return tuple(chosen or with_text)


def start_and_end(words: Words) -> tuple[int, ...]:
    """Columns of the start and end tokens: of every chunk of CLIP, and the end token of T5, which has no start."""
    content = words.content
    clip = words.total - words.counts.get(T5, 0)
    out = []
    for start in range(0, clip, CHUNK):
        inside = [c for c in content if start <= c < min(start + CHUNK, clip)]
        out += [start, max(inside, default=start) + 1]
    if clip < words.total:
        out.append(max((c for c in content if c >= clip), default=clip - 1) + 1)
    return tuple(c for c in out if c in words.special)


def apply(
    model: ModelPatcher,
    words: Words,
    strength: float = 1.0,
    heads: Heads | None = None,
    iterations: int = 20,
    mass_weight: float = 80.0,
    deviation_weight: float = 0.1,
    ema: float = 0.25,
    decay: float = 0.99,
    start_percent: float = 0.0,
    end_percent: float = 0.5,
    observer: Observer = NOBODY,
) -> ModelPatcher:
    """A clone of ``model`` that regulates the attention to ``words``; with strength 0, just a clone.

    Args:
        heads: a selection to regulate; None is all heads of `auto_layers`.
        observer: is shown the regulated maps while they form.

    Raises:
        ValueError: when the words are none, the span is the wrong way round, a selection is of another model, or there is no attention
            to text.
    """
    span = Span.checked("Attention Regulation", start_percent, end_percent)
    targets = tuple(sorted({c for phrase in words.phrases for c in phrase.columns}))
    if not targets:
        raise ValueError("Attention Regulation: there are no words to raise; name at least one in Prompt Words.")
    family, sites = model_sites(model)
    joint = family != "unet"
    where: dict[tuple[str, str], tuple[int, ...] | None]
    if heads is None:
        where = {(s.name, "joint" if joint else "cross"): None for s in auto_layers(sites, family)}
    else:
        chosen = check(heads, sites, family)
        without = [s.name for s in sites if s.name in chosen and not joint and "cross" not in s.kinds]
        if without:
            raise ValueError(f"Attention Regulation: {without[0]} has no attention to text; choose other layers.")
        where = {(name, "joint" if joint else "cross"): numbers for name, numbers in chosen.items()}
    patched = model.clone()
    if strength == 0:
        return patched
    columns = tuple(sorted({*targets, *start_and_end(words)}))
    places = tuple(columns.index(c) for c in targets)
    numbers = (strength, iterations, mass_weight, deviation_weight, ema, decay)
    names = tuple(p.text for p in words.phrases)
    members = tuple(tuple(targets.index(c) for c in p.columns) for p in words.phrases)
    method = _Method(places, *numbers, object(), names, members, observer)
    edit = EditWeights(
        where,
        method.edit,
        rows=COND,
        span=span,
        columns=columns,
        prompt_columns=words.total,
    )
    request(patched, edit)
    guard(patched, "Attention Regulation", words.total)
    return patched
