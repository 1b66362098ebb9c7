"""What nodes with words have in common: the layers that attend to text, the prompt that the words are of, and its rows in a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import comfy.patcher_extension
import torch
from torch import Tensor

from ..language.layouts import ANIMA
from ..language.words import PROMPT, column_lengths
from .hook.call import AttentionCall
from .hook.install import REQUESTS, ModelPatcher, model_sites
from .hook.requests import COND, EditWeights
from .hook.run import prompt
from .hook.sites import Heads, Site, check, joint
from .hook.tensors import index
from .observer import NOBODY, Observer

if TYPE_CHECKING:
    from ..language.words import Words

KEY = "attune_words"
SAME = 1e-2  # relative difference of a column's length that rounding may make
Where = dict[tuple[str, str], tuple[int, ...] | None]
Auto = Callable[[tuple[Site, ...], str], tuple[Site, ...]]


def own_name(call: AttentionCall) -> Any:
    """ComfyUI's name of the conditioning that the words belong to; None outside a run, where prompts have no names."""
    cond = None if call.run is None else call.run.prompt
    return None if cond is None else cond.get("uuid")


def text_places(model: ModelPatcher, method: str, heads: Heads | None = None, auto: Auto | None = None) -> Where:
    """Every place where image tokens attend to text, those that ``auto(sites, family)`` chooses, or those of a selection.

    Raises:
        ValueError: for a model without attention to text, or a selection of another model or of a layer without it.
    """
    family, sites = model_sites(model)
    kind = "joint" if joint(sites) else "cross"
    having = [s.name for s in sites if kind in s.kinds]
    if not having:
        raise ValueError(f"{method}: this model has no attention to text; connect a text-to-image model.")
    if heads is None:
        names = having if auto is None else [s.name for s in auto(sites, family)]
        return {(name, kind): None for name in names}
    chosen = check(heads, sites, family)
    if without := [name for name in chosen if name not in having]:
        raise ValueError(f"{method}: {without[0]} has no attention to text; choose other layers.")
    return {(name, kind): numbers for name, numbers in chosen.items()}


def guard(patched: ModelPatcher, method: str, words: Words, observer: Observer = NOBODY) -> None:
    """Make words of another prompt an error before the first step of a run."""

    def compare(executor: Any, *args: Any, **kwargs: Any) -> Any:
        cond = prompt(getattr(executor.class_obj, "conds", {}))
        if cond is not None:
            compare_words(method, words, cond, observer)
            compare_columns(method, words, cond)
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, compare)


def compare_words(method: str, words: Words, cond: Mapping[str, Any], observer: Observer = NOBODY) -> None:
    """Compare words with the conditioning that they should be of.

    One that Prompt Words has made knows its tokens. Of another, the columns after the prompt, which have seen all of it and take no
    weights, are as long as those that the words' own CLIP has made, where it is the same CLIP: then its start column is.

    Raises:
        ValueError: when they are of another prompt, with both.
    """
    context, made_of = cond.get("cross_attn"), cond.get(PROMPT)
    if not isinstance(context, Tensor):
        return
    columns = context.shape[1]
    if made_of is not None and words.tokens:
        other = made_of.tokens != words.tokens
    elif words.lengths and len(words.lengths) == columns == words.total and words.special[:1] == (0,):
        lengths, known = column_lengths(context), words.lengths
        differs = [abs(lengths[c] - known[c]) > SAME * abs(known[c]) for c in words.special]
        other = not differs[0] and any(differs[1:])
    else:
        other = False
    if other:
        text = observer.prompt_text() if made_of is None else made_of.text
        said = "is another one" if text is None else f"is “{text}”"
        raise ValueError(
            f"{method}: these words are of the prompt “{words.text}”, and the sampler's positive prompt {said}; they are of different prompts. "
            "Connect Prompt Words' conditioning output to the sampler, or give it the same text."
        )


def compare_columns(method: str, words: Words, cond: Mapping[str, Any]) -> None:
    """Compare the number of token columns that words and a conditioning have.

    Raises:
        ValueError: when they differ.
    """
    context, ids = cond.get("cross_attn"), cond.get("t5xxl_ids")
    if not isinstance(context, Tensor):
        return
    columns = context.shape[1] if ids is None else max(len(ids), ANIMA)  # of these Anima makes a context of its own
    if columns != words.total:
        raise ValueError(
            f"{method}: these words are of a prompt with {words.total} token columns, and the sampler's positive prompt has "
            f"{columns}. Connect the same CLIP and the same text to Prompt Words and to CLIP Text Encode; prompts that "
            "another node has joined or lengthened (Conditioning Concat, a style model) do not fit."
        )


def refuse(model: ModelPatcher, where: str) -> None:
    """Refuse a model on which words of one prompt act, where every row of a batch may have a prompt of its own.

    Raises:
        ValueError: with what to do.
    """
    asked = model.model_options.get("transformer_options", {}).get(REQUESTS, ())
    if any(isinstance(r, EditWeights) and r.prompt_columns is not None for r in asked):
        raise ValueError(
            f"{where}: on this model a node acts on single words of one prompt (Attention Regulation, Phrase Fusion, Semantic Gate, Refine "
            "Attention with words, Word Weights), and here several prompts are drawn at once, in which other words have these places. Connect "
            "the model from before that node."
        )


def edit_own(
    call: AttentionCall, weights: Tensor, edit: Callable[[Tensor], tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None] | None:
    """An ``edit`` of the rows whose prompt the words are of, among the conditional rows ``weights [R, H, M, T]``.

    Outside a run, where prompts have no names, it is all of them.
    """
    parts, name = call.parts(COND), own_name(call)
    mine = [part.given for part in parts if name is None or part.uuid == name]
    if not mine:
        return None
    if len(mine) == len(parts):
        return edit(weights)
    rows = index([row for given in mine for row in range(given.start, given.stop)], weights.device)
    new, factor = edit(weights[rows])
    everywhere = torch.ones_like(weights[..., :1])
    return weights.index_copy(0, rows, new), None if factor is None else everywhere.index_copy(0, rows, factor)
