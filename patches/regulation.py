"""Attention Regulation on ComfyUI models: one edit of the target words' columns per layer, its state, and the checks before a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..methods import regulation as maths
from .hook.call import AttentionCall
from .hook.install import ModelPatcher, request
from .hook.requests import COND, EditWeights, Span
from .hook.sites import Heads, Site
from .hook.tensors import index
from .maps.layers import auto_sites
from .observer import NOBODY, Observer
from .prompts import edit_own, guard, own_name, text_places

if TYPE_CHECKING:
    from ..language.words import Words

METHOD = "Attention Regulation"
CHUNK = 77  # columns of CLIP that have a start and an end token of their own
T5 = "t5xxl"  # the text encoder whose columns come after CLIP's


PAPER, RELEASED = FORMS = ("paper", "released")


@dataclass(frozen=True)
class Settings:
    """What a node may choose (its inputs say what each does).

    Attributes:
        strength: of the edit; 1 is the paper's.
        iterations: of the published procedure.
        mass_weight, deviation_weight: ``α`` and ``β``.
        ema, decay: ``κ`` and ``λ``.
        start_percent, end_percent: the part of sampling.
        form: ``paper``, or ``released``: the authors' code's penalty on θ and its optimiser.
    """

    strength: float = 1.0
    iterations: int = maths.ITERATIONS
    mass_weight: float = 80.0
    deviation_weight: float = 0.1
    ema: float = 0.25
    decay: float = 0.99
    start_percent: float = 0.0
    end_percent: float = 0.5
    form: str = PAPER


DEFAULTS = Settings()


@dataclass
class _Layer:
    """One layer's edit of one conditioning: the running average, and the sampling step that it is of."""

    step: int | None
    edit: Tensor  # S_EMA, [T + 1, pictures, H, M]


@dataclass(frozen=True)
class _Regulation:
    """One node's edit: which columns, how, and a key to its state.

    Attributes:
        targets: places among the columns that the hook hands over.
        names: of the phrases; ``members``: which of ``targets`` are theirs.
    """

    settings: Settings
    targets: tuple[int, ...]
    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    observer: Observer
    key: object

    def edit(self, call: AttentionCall, weights: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """An ``edit`` request: ``[R, H, M, T + restored]`` to the same and the factor on all other columns.

        The restored columns stay as they are.
        """
        return edit_own(call, weights, lambda part: self._edit(call, part))

    def _edit(self, call: AttentionCall, part: Tensor) -> tuple[Tensor, Tensor]:
        targets = index(self.targets, part.device)
        weights = maths.with_others(part, targets).unflatten(1, (-1, call.pictures))
        edit = self._layer(call, own_name(call), weights[:, 0].detach())
        scale = self.settings.strength * maths.fading(call.step or 0, self.settings.decay)
        new = maths.regulated(weights.log(), edit[:, None], scale)
        raised, factor = new[:-1].flatten(1, 2).permute(1, 2, 3, 0), (new[-1] / weights[-1]).flatten(0, 1)[..., None]
        if not call.perturbed and self.observer.watching():
            shown = torch.stack([raised[0][..., list(m)].mean(dim=-1) for m in self.members], dim=-1)
            self.observer.layer(call, shown, self.names)
        return part.index_copy(-1, targets, raised), factor

    def _layer(self, call: AttentionCall, name: Any, weights: Tensor) -> Tensor:
        """``S_EMA [T + 1, pictures, H, M]`` of this layer and step. It moves on once a step, however often the sampler asks."""
        if call.run is None:
            return self._solve(call, weights, None)
        state: dict[Any, Any] = call.run.state.setdefault(self.key, {})
        place = (call.site.name, name, weights.shape, call.grid)  # sizes may change within a run
        known: _Layer | None = state.get(place)
        if known is None or known.step is None or known.step != call.step:
            before = None if known is None else known.edit
            best = self._solve(call, weights, before)
            known = state[place] = _Layer(call.step, maths.average(before, best, self.settings.ema))
        return known.edit

    def _solve(self, call: AttentionCall, weights: Tensor, before: Tensor | None) -> Tensor:
        """The step's own edit: found from where the steps ``before`` have come to; the released search begins anew each step."""
        settings, released = self.settings, self.settings.form == RELEASED
        count, pictures, heads, _ = weights.shape
        state: dict[Any, Any] = {} if call.run is None else call.run.state.setdefault(self.key, {})
        grid = call.grid
        if grid not in state:
            state[grid] = maths.problem(
                grid, count - 1, settings.mass_weight, settings.deviation_weight, like=weights, released=released
            )
        flat = weights.flatten(1, 2)
        if before is not None and not released:
            edit = maths.solve(flat, before.flatten(1, 2), state[grid], settings.iterations, again=True)
            return edit.view(weights.shape)
        seed = 0 if call.run is None or call.run.seed is None else call.run.seed
        # The same start for every picture, so that one does not depend on its place in the batch.
        theta = maths.start(count - 1, heads, seed + 1_000_003 * call.site.layer + 7_919 * (call.step or 0), flat)
        theta = theta.repeat(1, pictures, 1, 1)
        if released:
            edit = maths.published(flat, theta, state[grid], settings.iterations)
        else:
            edit = maths.solve(flat, maths.additive(theta, state[grid]), state[grid], settings.iterations)
        return edit.view(weights.shape)


def auto_layers(sites: tuple[Site, ...], family: str) -> tuple[Site, ...]:
    """The last down-sampling and the first up-sampling block with attention to text, with all their layers, as in the paper.

    Transformers have no such blocks: three layers around the middle, as for the maps, which is beyond the paper.

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
    settings: Settings = DEFAULTS,
    heads: Heads | None = None,
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
    span = Span.checked(METHOD, settings.start_percent, settings.end_percent)
    if settings.form not in FORMS:
        raise ValueError(f"{METHOD}: form must be one of {', '.join(FORMS)}, not “{settings.form}”.")
    targets = tuple(sorted({c for phrase in words.phrases for c in phrase.columns}))
    if not targets:
        raise ValueError(f"{METHOD}: there are no words to raise; name at least one in Prompt Words.")
    where = text_places(model, METHOD, heads, auto_layers)
    patched = model.clone()
    if settings.strength == 0:
        observer.effect("strength is 0, which is off")
        return patched
    columns = tuple(sorted({*targets, *start_and_end(words)}))
    method = _Regulation(
        settings,
        targets=tuple(columns.index(c) for c in targets),
        names=tuple(p.text for p in words.phrases),
        members=tuple(tuple(targets.index(c) for c in p.columns) for p in words.phrases),
        observer=observer,
        key=object(),
    )
    asking = EditWeights(where, method.edit, rows=COND, span=span, columns=columns, prompt_columns=words.total)
    request(patched, asking, tell=observer.effect)
    guard(patched, METHOD, words, observer)
    return patched
