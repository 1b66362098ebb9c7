"""Refine Attention on ComfyUI models: the words' columns refined in every layer that attends to text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..methods import refine as maths
from .hook.call import AttentionCall
from .hook.install import ModelPatcher, model_sites, request
from .hook.requests import COND, EditWeights, Span
from .hook.sites import Heads
from .hook.tensors import index_or_slice
from .observer import NOBODY, Observer
from .prompts import edit_own, guard, text_places
from .regulation import CHUNK

if TYPE_CHECKING:
    from ..language.words import Words

METHOD = "Refine Attention"


@dataclass(frozen=True)
class Settings:
    """What a node may choose: rounds of cutting below ``keep`` of a word's maximum and smoothing by ``sigma``, and the part of sampling."""

    rounds: int = 2
    keep: float = 0.7
    sigma: float = 0.8
    start_percent: float = 0.0
    end_percent: float = 1.0


DEFAULTS = Settings()


def every_token(columns: int) -> tuple[int, ...]:
    """Without words: every text column but the start tokens, which take what no word wants. CLIP has one in front of each chunk."""
    starts = range(0, columns, CHUNK if columns % CHUNK == 0 else columns)
    return tuple(c for c in range(columns) if c not in starts)


def apply(
    model: ModelPatcher,
    words: Words | None = None,
    rounds: int = DEFAULTS.rounds,
    keep: float = DEFAULTS.keep,
    sigma: float = DEFAULTS.sigma,
    start_percent: float = DEFAULTS.start_percent,
    end_percent: float = DEFAULTS.end_percent,
    heads: Heads | None = None,
    observer: Observer = NOBODY,
) -> ModelPatcher:
    """A clone of ``model`` whose attention to words is refined, in the conditional rows; with 0 rounds, just a clone.

    In a UNet a row of the map is the text columns and nothing else, so all of it is written anew; in joint attention only the words' columns
    are, and a factor goes on the rest.

    Args:
        words: whose columns are refined, in the prompt that they are of; None is every token of every positive prompt.
        heads: a selection to work on; None is every head of every layer that attends to text.
        observer: knows the text that is sampled.

    Raises:
        ValueError: for settings out of range, the span the wrong way round, no words where joint attention needs them, a selection of another
            model, or a model without attention to text.
    """
    span = Span.checked(METHOD, start_percent, end_percent)
    for value, low, high, name in (
        (rounds, 0, 100, "rounds"),
        (keep, 0, 1, "keep"),
        (sigma, 0, 8, "sigma"),
    ):
        if not low <= value <= high:
            raise ValueError(f"{METHOD}: {name} must be from {low} to {high}, not {value:g}.")
    where = text_places(model, METHOD, heads)
    joint = model_sites(model)[0] != "unet"
    if words is None and joint:
        raise ValueError(
            f"{METHOD}: this model attends to text and picture at once, and much of its text may be padding; connect Prompt Words "
            f"to say which to refine."
        )
    targets = None if words is None else tuple(sorted({c for phrase in words.phrases for c in phrase.columns}))
    if targets == ():
        raise ValueError(f"{METHOD}: there are no words to refine; name at least one in Prompt Words, or leave words open.")
    patched = model.clone()
    if rounds == 0:
        observer.effect("rounds is 0, which is off")
        return patched

    def refined(weights: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        rows, heads, _, columns = weights.shape
        which = range(columns) if joint else every_token(columns) if targets is None else targets
        places = index_or_slice(which, weights.device)
        maps = weights[..., places].flatten(0, 1).transpose(-1, -2).contiguous()
        if joint:
            rest = (1 - maps.sum(dim=1)).clamp_min(0)
        else:  # all others are here
            others = index_or_slice([c for c in range(columns) if c not in which], weights.device)
            rest = weights[..., others].sum(dim=-1).flatten(0, 1)
        new, factor = maths.refine(maps, rest, grid, rounds, keep, sigma)
        factor = factor.view(rows, heads, -1, 1)
        new = new.unflatten(0, (rows, heads)).transpose(-1, -2)
        if joint:
            return new, factor
        whole = weights * factor
        whole[..., places] = new
        return whole, None

    def edit(call: AttentionCall, weights: Tensor) -> tuple[Tensor, Tensor | None] | None:
        grid = call.grid
        if targets is None:
            return refined(weights, grid)
        return edit_own(call, weights, lambda part: refined(part, grid))

    prompt_columns = None if words is None else words.total
    own = targets if joint else None
    asking = EditWeights(where, edit, rows=COND, span=span, columns=own, prompt_columns=prompt_columns)
    request(patched, asking, tell=observer.effect)
    if words is not None:
        guard(patched, METHOD, words, observer)
    return patched
