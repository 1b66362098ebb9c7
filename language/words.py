"""Which columns of a prompt's conditioning belong to which words: the pack's one place for token positions.

A prompt is taken apart as ComfyUI does it (weights, escapes, embeddings, chunks of 77), every token is traced back to the
characters it came from, and the result is checked against the tokens that ComfyUI itself makes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from .layouts import NOBODY, places
from .nouns import noun_spans
from .text import WORD, Written, as_typed, placed_segments, plain_text, starts_of, without_embeddings, word_key, word_keys
from .tokens import T5, Encoded, encoders, fingerprint, known, language_models

PROMPT = "attune_prompt"  # in a conditioning's options: the `Prompt` that it was made of


@dataclass(frozen=True)
class Prompt:
    """What a conditioning was made of: plain data.

    Attributes:
        text: the prompt.
        tokens: `tokens.fingerprint` of its tokens: equal ones have every word at the same columns.
    """

    text: str
    tokens: str


@dataclass(frozen=True)
class Phrase:
    """A word or phrase and everywhere it stands in the prompt.

    Attributes:
        text: as it is written in the prompt's first place of it, without weights.
        columns: of the conditioning context (the keys of cross or joint attention), counted from 0, rising.
        encoders: per text encoder (``l``, ``g``, ``h``, ``t5xxl``), columns of that encoder's own output.
    """

    text: str
    columns: tuple[int, ...]
    encoders: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Words:
    """A prompt's words and their token columns (``ATTUNE_WORDS``): plain data.

    The context's columns are chunk 0's tokens, chunk 1's and so on (start, end and padding included). L and G share
    columns; SD3's T5 columns come after them; FLUX's context is T5 alone.

    Attributes:
        text: the prompt.
        phrases: what was asked for, in that order; no two alike, each with at least one column.
        words: every word of the prompt in order, repeated ones each time; one that takes no place has no columns.
        special: columns that are start, end or padding in every encoder that has them.
        total: columns of the context.
        counts: columns of each text encoder's own output.
        automatic: nothing was asked for, so the phrases are the prompt's nouns.
        tokens: a fingerprint of the prompt's tokens, as in `Prompt`; empty where it is not known.
        weighted: phrases that the prompt gives a weight other than 1, “(red car:1.4)”, where its encoders take that for text and do nothing.
        brackets: columns of nothing but such brackets and numbers.
        lengths: of the context's columns as the CLIP has encoded them (`column_lengths`); none where nothing was encoded.
    """

    text: str
    phrases: tuple[Phrase, ...]
    words: tuple[Phrase, ...]
    special: tuple[int, ...]
    total: int
    counts: Mapping[str, int]
    automatic: bool = False
    tokens: str = ""
    lengths: tuple[float, ...] = field(default=(), compare=False)
    weighted: tuple[tuple[Phrase, float], ...] = ()
    brackets: tuple[int, ...] = ()

    @property
    def content(self) -> tuple[int, ...]:
        """Columns of the context that hold the prompt itself, punctuation included."""
        special = set(self.special)
        return tuple(c for c in range(self.total) if c not in special)

    @property
    def summary(self) -> str:
        """The phrases and their columns, in a sentence."""
        parts = (f"{p.text}: {', '.join(map(str, p.columns))}" for p in self.phrases)
        return f"{'; '.join(parts)} (of {self.total} token columns, {len(self.content)} of them the prompt's own)"


def listed(words: Iterable[Phrase]) -> str:
    """The words that a phrase may be made of, each once, for an error."""
    known = list(dict.fromkeys(w.text.lower() for w in words if w.columns))
    return ", ".join(known[:60]) + (", …" if len(known) > 60 else "")


def prompt_words(clip: Any, text: str, words: str | None = "") -> Words:
    """Find words of a prompt in the conditioning that ``clip`` makes of it.

    Args:
        clip: any CLIP whose tokens can be traced.
        text: the prompt, as for CLIP Text Encode.
        words: phrases separated by commas. Every occurrence counts; case, spaces, weights and punctuation do not. Empty:
            every noun of the prompt. None: no phrases, only where each word is.

    Raises:
        ValueError: for an empty prompt, a phrase that is not in it, no noun to be found, or no or an unknown CLIP.
        RuntimeError: when the tokens cannot be traced, or nouns are wanted and spaCy is not installed.
    """
    if clip is None:
        raise ValueError("there is no text encoder: this checkpoint has none, so load a CLIP on its own")
    plain, segments = placed_segments(text)
    matches = list(WORD.finditer(plain))
    if not matches:
        raise ValueError("the prompt is empty: write the text that the picture is to be drawn from")
    try:
        tokens = clip.tokenize(text, return_word_ids=True)
    except IndexError:  # ComfyUI's own, for an embedding without a name
        raise ValueError("“embedding:” has no name after it in the prompt: write the embedding's name, or delete it") from None
    prompt = as_typed(text)
    if known(tokens):
        encoded = encoders(clip, tokens, segments)
        context, total = _context(encoded, tokens)
    else:
        layout = {place: column for column, place in enumerate(places(clip, tokens))}
        encoded = language_models(clip, tokens, [name for name, _ in layout if name != NOBODY], prompt, segments)
        total = len(layout)

        def context(columns: Mapping[str, Iterable[int]]) -> tuple[int, ...]:
            return tuple(sorted(layout[n, c] for n in columns for c in columns[n] if (n, c) in layout))

    owner = {place: i for i, m in enumerate(matches) for place in range(*m.span())}  # characters to words
    where: list[dict[str, set[int]]] = [{n: set() for n in encoded} for _ in matches]
    for name, one in encoded.items():
        for column, span in one.tokens:
            for word in {owner[place] for place in range(*span) if place in owner}:
                where[word][name] |= set() if column is None else {column}

    def phrase(written: str, members: Iterable[int]) -> Phrase:
        members = list(members)
        columns = {n: tuple(sorted(set().union(*(where[i][n] for i in members)))) for n in encoded}
        return Phrase(written, context(columns), columns)

    all_words = tuple(phrase(m.group(), [i]) for i, m in enumerate(matches))
    keys = [word_key(m.group()) for m in matches]
    asked = [part for part in re.split(r"[,，、\n]", words or "") if part.strip()]
    if asked or words is None:
        wanted = {tuple(word_keys(plain_text(part))): part.strip() for part in asked}
    else:
        spans = noun_spans(without_embeddings(plain))
        nouns = [tuple(keys[i] for i in sorted({owner[p] for p in range(*span) if p in owner})) for span in spans]
        wanted = {noun: " ".join(noun) for noun in nouns if noun}
        if not wanted:
            raise ValueError(f"no noun was found in the prompt: write the words you mean. It has: {listed(all_words)}")
    phrases = []
    for sequence, written in wanted.items():
        n, starts = len(sequence), starts_of(sequence, keys)
        if not starts:
            raise ValueError(f"“{written}” is not in the prompt. It has these words: {listed(all_words)}")
        spelled = " ".join(m.group() for m in matches[starts[0] : starts[0] + n])
        found = phrase(spelled, {i + k for i in starts for k in range(n)})
        if not found.columns:
            raise ValueError(f"“{written}” takes no place in the prompt: the embedding is missing, or made for another model")
        phrases.append(found)
    content = context({n: {c for c, _ in one.tokens if c is not None} for n, one in encoded.items()})
    typed = any(one.typed for one in encoded.values())
    return Words(
        text=text,
        phrases=tuple(phrases),
        words=all_words,
        special=tuple(sorted(set(range(total)) - set(content))),
        total=total,
        counts={n: one.total for n, one in encoded.items()},
        automatic=words is not None and not asked,
        tokens=fingerprint(tokens),
        weighted=tuple((phrase(name, of), weight) for name, of, weight in _weighted(prompt, matches)) if typed else (),
        brackets=context({n: one.brackets for n, one in encoded.items()}),
    )


def _weighted(prompt: Written, matches: Sequence[re.Match[str]]) -> Iterator[tuple[str, list[int], float]]:
    """Stretches of the prompt with a weight other than 1: how they are written, their words, and the weight."""
    for weight, run in groupby(range(len(prompt.plain)), key=prompt.weights.__getitem__):
        inside = set(run)
        members = [i for i, m in enumerate(matches) if inside & set(range(*m.span()))]
        if weight != 1 and members:
            yield " ".join(matches[i].group() for i in members), members, weight


def _context(
    encoded: Mapping[str, Encoded], tokens: Mapping[str, Any]
) -> tuple[Callable[[Mapping[str, Iterable[int]]], tuple[int, ...]], int]:
    """The context's columns of encoders' columns, and how many it has, for SD1.5, SD2, SDXL, SD3 and FLUX.1."""
    flux = set(tokens) == {"l", T5}  # there L only makes the pooled vector
    shared = [n for n in encoded if n != T5 and not flux]
    before = min((encoded[n].total for n in shared), default=0)  # ComfyUI cuts L and G to the shorter of the two

    def context(columns: Mapping[str, Iterable[int]]) -> tuple[int, ...]:
        out = {c for n in shared for c in columns[n] if c < before}
        return tuple(sorted(out | {before + c for c in columns.get(T5, ())}))

    return context, before + (encoded[T5].total if T5 in encoded else 0)


def encode_prompt(clip: Any, words: Words) -> tuple[Words, list[Any]]:
    """The conditioning of the words' prompt, as CLIP Text Encode makes it, and the words with its columns' lengths.

    The conditioning knows which prompt it was made of (`PROMPT`).
    """
    known = {PROMPT: Prompt(words.text, words.tokens)}
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(words.text), add_dict=known)
    return replace(words, lengths=column_lengths(conditioning[0][0])), conditioning


def column_lengths(context: Any) -> tuple[float, ...]:
    """The lengths of the first prompt's columns in a context ``[B, N, C]``.

    Two prompts that one CLIP has encoded are the same if all are; a CLIP's start column does not see the text, so that one which
    differs tells of another CLIP, LoRA or layer instead.
    """
    return tuple(context[0].detach().float().norm(dim=-1).tolist())
