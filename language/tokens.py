"""A prompt's tokens traced back to its characters, for each text encoder: only what ComfyUI's tokenizers give is used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

from .letters import places
from .text import Written

Span = tuple[int, int]  # first character, one past the last
Chunks = Sequence[Sequence[tuple[Any, float, int]]]  # a tokenizer's answer with word ids: (token or vector, weight, word)
T5 = "t5xxl"
_PARTS = {"l": "clip_l", "g": "clip_g", "h": "clip_h", T5: T5}  # ComfyUI's attribute for each text encoder
_KNOWN = ({"l"}, {"h"}, {"l", "g"}, {"l", "g", T5}, {"l", T5})  # SD1.5, SD2, SDXL, SD3, FLUX

# Where CLIP's tokeniser cuts; only needed when it cannot say so itself.
_CUTS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)


@dataclass(frozen=True)
class Encoded:
    """One text encoder's view of a prompt.

    Attributes:
        total: number of columns.
        tokens: per token of the prompt its column (None: dropped) and characters.
        typed: ``(weights:1.2)`` are text to it.
        brackets: the columns that hold nothing else than what writes these.
    """

    total: int
    tokens: tuple[tuple[int | None, Span], ...]
    typed: bool = False
    brackets: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Token:
    """A token that ComfyUI made of the prompt itself. ``number``: None for a vector of an embedding."""

    number: int | None
    column: int | None
    word: int


def fingerprint(tokens: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for all tokens that ``clip.tokenize`` made of a prompt, weights aside.

    Equal ones mean that every word is at the same columns. A vector of an embedding counts by its size.
    """
    ids = {
        name: [[int(t[0]) if isinstance(t[0], Integral) else list(t[0].shape) for t in chunk] for chunk in chunks]
        for name, chunks in tokens.items()
        if isinstance(chunks, list)  # some tokenizers put settings beside the tokens
    }
    return hashlib.sha256(repr(sorted(ids.items())).encode()).hexdigest()[:16]


def known(tokens: Mapping[str, Any]) -> bool:
    """Whether a CLIP is one of `encoders`; all others are `language_models`."""
    return set(tokens) in _KNOWN


def encoders(clip: Any, tokens: Mapping[str, Any], segments: Sequence[tuple[int, str]]) -> dict[str, Encoded]:
    """Every text encoder that a CLIP of SD1.5, SD2, SDXL, SD3 or FLUX.1 really has (SD3 may lack some, SDXL's refiner has no L).

    Args:
        tokens: of ``clip.tokenize(prompt, return_word_ids=True)``.
        segments: of `text.placed_segments`.

    Raises:
        RuntimeError: when tokens cannot be traced.
    """
    found = {}
    for name, chunks in tokens.items():
        part = getattr(clip.cond_stage_model, _PARTS[name], None)
        if part is not None:
            width = part.transformer.get_input_embeddings().weight.shape[-1]
            found[name] = _encode(name, getattr(clip.tokenizer, _PARTS[name]), width, chunks, segments)
    return found


def _encode(name: str, tokenizer: Any, width: int, chunks: Chunks, segments: Sequence[tuple[int, str]]) -> Encoded:
    """Trace ComfyUI's tokens; ``width`` is the channels of the encoder's token embeddings."""
    own: list[_Token] = []
    total = 0
    for chunk in chunks:
        column = total
        for token, _, word in chunk:
            # ComfyUI leaves out vectors made for another encoder, moves the rest up and pads the end.
            number = int(token) if isinstance(token, Integral) else None
            fits = number is not None or token.shape[-1] == width
            if word:  # 0: start, end and padding
                own.append(_Token(number, column if fits else None, word))
            column += fits
        total += len(chunk)
    spans = _trace(tokenizer, segments, own)
    if spans is None:
        raise RuntimeError(_lost(name))
    return Encoded(total, tuple((token.column, span) for token, span in zip(own, spans, strict=True)))


def _lost(name: str) -> str:
    return (
        f"Attune could not find the prompt's words among the tokens of text encoder “{name}”: this CLIP cuts prompts in a way "
        "that Attune does not know. It may come from another pack or a newer ComfyUI; update Attune, or use ComfyUI's own loaders."
    )


def language_models(
    clip: Any, tokens: Mapping[str, Any], names: Iterable[str], prompt: Written, segments: Sequence[tuple[int, str]]
) -> dict[str, Encoded]:
    """Every text encoder of any other CLIP, by the letters of its tokens.

    Args:
        tokens: of ``clip.tokenize(prompt, return_word_ids=True)``.
        names: of the encoders whose output is in the context.
        segments: of `text.placed_segments`.

    Raises:
        RuntimeError: when tokens cannot be traced.
    """
    empty = clip.tokenize("")
    found = {}
    for name in dict.fromkeys(names):
        tokenizer = next((t for t in (getattr(clip.tokenizer, n, None) for n in (name, f"clip_{name}")) if t is not None), None)
        if tokenizer is None:
            raise RuntimeError(_lost(name))
        one = _by_letters(tokenizer, _numbers(tokens[name]), _numbers(empty[name]), prompt)
        if one is None:  # one that leaves letters out (T5 knows no emoji) may say itself what it has made of which
            one = _encode(name, tokenizer, int(getattr(tokenizer, "embedding_size", 0)), tokens[name], segments)
        found[name] = one
    return found


def _numbers(chunks: Sequence[Sequence[Any]]) -> list[int]:
    """Token numbers of all chunks; -1 for what is no plain token."""
    return [int(entry[0]) if isinstance(entry[0], Integral) else -1 for chunk in chunks for entry in chunk]


def _by_letters(tokenizer: Any, numbers: Sequence[int], empty: Sequence[int], prompt: Written) -> Encoded | None:
    """A view by the letters of the tokens, each on its own; None where these are not the prompt's."""
    # Start, end and padding are of no letters.
    special = {getattr(tokenizer, n, None) for n in ("start_token", "end_token", "pad_token")}
    vocabulary = {number: "" if number in special else piece for number, piece in tokenizer.inv_vocab.items()} | {-1: "\ufffc"}
    try:
        literal = places(prompt.literal, numbers, empty, vocabulary)
        plain = places(prompt.plain, numbers, empty, vocabulary) if literal is None else None
    except KeyError:
        return None
    if literal is None:
        return None if plain is None else Encoded(len(numbers), tuple((t, (p, p + 1)) for p, of in plain for t in of))
    placed = [(of, prompt.plain_of[place]) for place, of in literal]
    own = tuple((t, (p, p + 1)) for of, p in placed if p is not None for t in of)
    brackets = {t for of, p in placed if p is None for t in of} - {t for t, _ in own}
    return Encoded(len(numbers), own, any(p is None for _, p in placed), tuple(sorted(brackets)))


def _trace(tokenizer: Any, segments: Sequence[tuple[int, str]], own: Sequence[_Token]) -> list[Span] | None:
    """The characters of every token in the plain text; None when the text's tokens are others."""
    spans: list[Span] = []
    name = tokenizer.embedding_identifier
    for start, segment in segments:
        cuts = [0, *(m.end() for m in re.finditer(rf"[ \n](?={re.escape(name)})", segment)), len(segment) + 1]
        for begin, end in pairwise(cuts):
            text = segment[begin : end - 1]
            for vectors, used, rest in _readings(name, text, own, len(spans)):
                found = _spans(tokenizer, text, start + begin, used, rest)
                numbers = [None] * vectors + [number for number, _ in found]
                if [token.number for token in own[len(spans) : len(spans) + len(numbers)]] == numbers:
                    solid = [i for i, c in enumerate(text, start + begin) if not c.isspace()]
                    spans += [(solid[0], solid[used - 1] + 1)] * vectors if vectors else []
                    spans += [span for _, span in found]
                    break
            else:
                return None
    return spans if len(spans) == len(own) else None


def _readings(name: str, text: str, own: Sequence[_Token], at: int) -> Iterator[tuple[int, int, str]]:
    """How ComfyUI may have read a piece of text: vectors of an embedding, how many of its letters are that embedding, the rest.

    Its tokens, from ``at`` on, tell which it was. The readings with more tokens come first, since fewer of them would fit as well.
    """
    if not text.startswith(name) or not text[len(name) :].split():
        yield 0, 0, text
        return
    first, *others = text[len(name) :].strip("\n").split()
    bare = first.strip(",")
    rests = [" ".join(others)]  # ComfyUI's way of writing what is left over
    if bare != first:
        rests.insert(0, f"{first[len(bare) :]} {rests[0]}")
    if at < len(own) and own[at].number is None:
        end = at
        while end < len(own) and own[end].number is None and own[end].word == own[at].word:
            end += 1
        readings = [(end - at, rest) for rest in rests]
    else:
        yield 0, 0, text  # a tokenizer that takes no embeddings
        readings = [(0, rest) for rest in rests]  # one that has no such file
    letters = sum(not c.isspace() for c in text)
    for count, rest in readings:
        yield count, letters - sum(not c.isspace() for c in rest), rest


def _spans(tokenizer: Any, text: str, start: int, used: int, rest: str) -> list[tuple[int, Span]]:
    """Token ids of what is left of a piece, and their characters; its letters are the last ones of the piece, its spaces others."""
    if rest == text:
        return [(t, (start + a, start + b) if b > a else (0, 0)) for t, (a, b) in _tokenise(tokenizer, text)] if text else []
    letters = iter([i for i, c in enumerate(text, start) if not c.isspace()][used:])
    at = start
    places = [at := at if c.isspace() else next(letters) for c in rest]
    found = _tokenise(tokenizer, rest) if rest else []
    return [(t, (places[a], places[b - 1] + 1) if b > a else (0, 0)) for t, (a, b) in found]


def _tokenise(tokenizer: Any, text: str) -> list[tuple[int, Span]]:
    """Token ids of a text without start and end, and the characters each one came from."""
    inner, first, last = tokenizer.tokenizer, tokenizer.tokens_start, -1 if tokenizer.tokenizer_adds_end_token else None
    if getattr(inner, "is_fast", False):
        found = inner(text, return_offsets_mapping=True)
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))[first:last]

    # The older tokenizers give ids only: cut as they do, and take a whole run of text where that gives other ids.
    def ids(part: str) -> list[int]:
        return list(inner(part)["input_ids"][first:last])

    out: list[tuple[int, Span]] = []
    for run in re.finditer(r"\S+", text):
        whole, start = ids(run.group()), run.start()
        cut = [(t, (start + m.start(), start + m.end())) for m in _CUTS.finditer(run.group()) for t in ids(m.group())]
        out += cut if [t for t, _ in cut] == whole else [(t, run.span()) for t in whole]
    return out
