"""Word weights on ComfyUI models: one edit of the weighted phrases' columns in every layer that attends to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..methods import weights as maths
from .hook.call import AttentionCall
from .hook.install import ModelPatcher, model_family, request
from .hook.requests import COND, IMAGE, TEXT, EditWeights, Span
from .hook.tensors import index_or_slice
from .observer import NOBODY, Observer
from .prompts import edit_own, guard, text_places

if TYPE_CHECKING:
    from ..language.weights import Weighted
    from ..language.words import Words

METHOD = "Word Weights"
ATTENTION, VALUE = MODES = ("attention", "value")
IMAGE_ONLY, BOTH = LOOKING = ("image", "image and text")


@dataclass(frozen=True)
class Settings:
    """What a node may choose (its inputs say what each does)."""

    mode: str = ATTENTION
    start_percent: float = 0.0
    end_percent: float = 1.0
    outside: float = 0.0
    tokens: str = IMAGE_ONLY


DEFAULTS = Settings()


@dataclass(frozen=True)
class _Weights:
    """The gains of the columns ``columns``, made once a run for every grid that a layer has."""

    weights: Tensor
    members: tuple[tuple[int, ...], ...]
    count: int
    masks: Tensor | None  # [S, P, height, width]
    settings: Settings
    least: float
    key: object = field(default_factory=object)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Weights:
        """Cloning a model copies what is on it: not the masks."""
        return self

    def _gains(self, call: AttentionCall, weights: Tensor, tokens: str) -> Tensor:
        """``[S, M or 1, T]``, float32, where the weights are."""
        grid = (call.height, call.width) if self.masks is not None and tokens == IMAGE else None
        queries = weights.shape[2]
        if grid is not None and (call.tokens.regrouped or queries % (grid[0] * grid[1])):
            raise ValueError(
                f"{METHOD}: at {call.site.name} another node merges pixels or cuts the picture into tiles, so that a mask has no place there; "
                "take that node out, or disconnect the mask."
            )
        made = {} if call.run is None else call.run.state.setdefault(self.key, {})
        name = (grid, queries if grid else None, weights.device, weights.dtype)
        if name not in made:
            masks = None
            if grid is not None and self.masks is not None:
                masks = maths.placed(self.masks, grid)
                masks = masks.repeat(1, 1, queries // masks.shape[2])  # frames
            gain = maths.gains(self.weights, masks, self.settings.outside)
            made[name] = maths.of_columns(gain, self.members, self.count).to(weights)
        return made[name]

    def edit(self, call: AttentionCall, weights: Tensor, tokens: str) -> tuple[Tensor, Tensor | None] | None:
        """An ``edit`` request."""

        def change(part: Tensor) -> tuple[Tensor, Tensor | None]:
            gain = self._gains(call, part, tokens)
            if len(gain) > 1:
                gain = gain[index_or_slice([n % len(gain) for n in call.numbers(len(part))], part.device)]
            return maths.attention(part, gain, self.least) if self.settings.mode == ATTENTION else maths.value(part, gain)

        return edit_own(call, weights, change)


def precision(model: ModelPatcher) -> torch.dtype:
    """What the model computes in."""
    return getattr(model.model, "manual_cast_dtype", None) or model.model.get_dtype()


def sets_of(mask: Tensor, phrases: int) -> Tensor:
    """Masks ``[S, P, height, width]`` of a MASK: one for all phrases, or for each picture as many as there are phrases.

    Raises:
        ValueError: for a number of masks that does not fit the phrases.
    """
    masks = (mask[None] if mask.ndim == 2 else mask).detach().float().cpu()
    if len(masks) == 1:
        masks = masks.expand(phrases, -1, -1)
    if len(masks) % phrases:
        raise ValueError(
            f"{METHOD}: there are {len(masks)} masks for {phrases} phrases. Connect one mask for all, a batch with one mask for each phrase, or "
            "such a batch for each picture."
        )
    return masks.unflatten(0, (-1, phrases))


def acting(chosen: Sequence[Weighted], mask: Tensor | None, outside: float) -> list[int]:
    """Which of the phrases change anything: those that do not weigh 1 everywhere."""
    return [i for i, one in enumerate(chosen) if one.weight != 1 or (mask is not None and outside != 1)]


def apply(
    model: ModelPatcher,
    words: Words,
    chosen: Sequence[Weighted],
    mask: Tensor | None = None,
    settings: Settings = DEFAULTS,
    observer: Observer = NOBODY,
) -> ModelPatcher:
    """A clone of ``model`` in whose conditional rows the chosen phrases weigh what they say; if all weigh 1 everywhere, just a clone.

    Args:
        words: of the prompt that the phrases are in.
        chosen: phrases with weights; phrases that share a column multiply there.
        mask: ``[N, height, width]``, where the weights hold (see `sets_of`); elsewhere phrases weigh ``settings.outside``. It is laid over the
            whole picture, and over every frame of a video.
        observer: knows the text that is sampled.

    Raises:
        ValueError: for settings out of range, a number of masks that does not fit, or a model without attention to text.
    """
    span = Span.checked(METHOD, settings.start_percent, settings.end_percent)
    for value, known, name in ((settings.mode, MODES, "mode"), (settings.tokens, LOOKING, "tokens")):
        if value not in known:
            raise ValueError(f"{METHOD}: {name} must be one of {', '.join(known)}, not “{value}”.")
    where = text_places(model, METHOD)
    masks = None if mask is None or not chosen else sets_of(mask, len(chosen))
    patched = model.clone()
    which = acting(chosen, mask, settings.outside)
    if not which:
        observer.effect("all weights are 1" if chosen else "no phrase has a weight")
        return patched
    phrases = [chosen[i].phrase.columns for i in which]
    numbers = [chosen[i].weight for i in which]
    masks = None if masks is None else masks[:, which]
    if words.brackets:  # what only writes a weight in the prompt is not to be drawn, wherever it is
        phrases, numbers = [*phrases, words.brackets], [*numbers, 0.0]
        masks = None if masks is None else torch.cat([masks, torch.ones_like(masks[:, :1])], dim=1)
    columns = tuple(sorted({c for phrase in phrases for c in phrase}))
    members = tuple(tuple(columns.index(c) for c in phrase) for phrase in phrases)
    least = maths.least(precision(model))
    method = _Weights(torch.tensor(numbers), members, len(columns), masks, settings, least)
    looks = model_family(model).text_looks
    joint = {place: heads for place, heads in where.items() if place[1] == "joint" and looks}
    asked = [(IMAGE, where), *([(TEXT, joint)] if settings.tokens == BOTH and joint else [])]
    requests = [
        EditWeights(
            places,
            partial(method.edit, tokens=tokens),
            rows=COND,
            span=span,
            columns=columns,
            prompt_columns=words.total,
            tokens=tokens,
        )
        for tokens, places in asked
    ]
    request(patched, *requests, tell=observer.effect)
    guard(patched, METHOD, words, observer)
    return patched


def summary(words: Words, chosen: Sequence[Weighted], mask: Tensor | None, settings: Settings = DEFAULTS) -> str:
    """What weighs how much and at which token columns, a line each."""
    which = acting(chosen, mask, settings.outside)
    if not which:
        return "Nothing weighs other than 1, so the model is the plain one."
    lines = []
    for i in which:
        phrase, weight = chosen[i].phrase, chosen[i].weight
        place = "" if mask is None else f" inside its mask, {settings.outside:g} elsewhere"
        lines.append(f"{phrase.text}: {weight:g}{place} (columns {', '.join(map(str, phrase.columns))} of {words.total})")
    return "\n".join(lines)
