"""Phrase fusion on ComfyUI models: one edit of the phrases' columns in every layer that attends to text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..methods import fusion as maths
from .hook.call import AttentionCall
from .hook.install import ModelPatcher, request
from .hook.requests import COND, EditWeights
from .hook.sites import Heads
from .observer import NOBODY, Observer
from .prompts import edit_own, guard, text_places
from .regulation import T5

if TYPE_CHECKING:
    from ..language.words import Words

METHOD = "Phrase Fusion"
SINGLE = "every phrase is a single token, so that there is nothing to fuse"


@dataclass(frozen=True)
class Settings:
    """What a node may choose: how far each word's attention moves to its phrase's mean."""

    strength: float = 0.5


DEFAULTS = Settings()


def groups(words: Words) -> tuple[tuple[int, ...], ...]:
    """The columns that share their attention: those of each phrase, CLIP's apart from T5's, which read the prompt on their own."""
    clip = words.total - words.counts.get(T5, 0)
    parts = ([c for c in p.columns if (c < clip) is first] for p in words.phrases for first in (True, False))
    return maths.joined(parts)


def apply(
    model: ModelPatcher,
    words: Words,
    strength: float = DEFAULTS.strength,
    heads: Heads | None = None,
    observer: Observer = NOBODY,
) -> ModelPatcher:
    """A clone of ``model`` whose words of one phrase share their attention; with strength 0, or nothing to fuse, just a clone.

    Args:
        words: every phrase is fused, with all columns that it has.
        heads: a selection to work on; None is every head of every layer that attends to text.
        observer: knows the text that is sampled.

    Raises:
        ValueError: for no words, a strength outside [0, 1], a selection of another model, or a model without attention to text.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"{METHOD}: strength must be from 0 to 1, not {strength:g}.")
    if not words.phrases:
        raise ValueError(f"{METHOD}: there are no words; name at least one phrase in Prompt Words.")
    where = text_places(model, METHOD, heads)
    fused = groups(words)
    patched = model.clone()
    if strength == 0 or not fused:
        observer.effect("strength is 0, which is off" if fused else SINGLE)
        return patched
    columns = tuple(sorted(c for group in fused for c in group))
    matrix = maths.mixing([[columns.index(c) for c in group] for group in fused], len(columns), strength)

    def edit(call: AttentionCall, weights: Tensor) -> tuple[Tensor, Tensor | None] | None:
        return edit_own(call, weights, lambda part: (maths.fuse(part, matrix), None))

    asking = EditWeights(where, edit, rows=COND, columns=columns, prompt_columns=words.total)
    request(patched, asking, tell=observer.effect)
    guard(patched, METHOD, words, observer)
    return patched
