"""A prompt's tokens traced back to its characters, for each text encoder: only what ComfyUI's tokenizers give is used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

Span = tuple[int, int]  # first character, one past the last
Chunks = Sequence[Sequence[tuple[Any, float, int]]]  # a tokenizer's answer with word ids: (token or vector, weight, word)
T5 = "t5xxl"
_PARTS = {"l": "clip_l", "g": "clip_g", "h": "clip_h", T5: T5}  # ComfyUI's attribute for each text encoder
_KNOWN = ({"l"}, {"h"}, {"l", "g"}, {"l", "g", T5}, {"l", T5})  # SD1.5, SD2, SDXL, SD3, FLUX

# Where CLIP's tokeniser cuts; only needed when it cannot say so itself.
_CUTS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)


@dataclass(frozen=True)
class Encoded:
    """One text encoder's view: number of columns, and per token of the prompt its column (None: dropped) and characters."""

    total: int
    tokens: tuple[tuple[int | None, Span], ...]


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
    }
    return hashlib.sha256(repr(sorted(ids.items())).encode()).hexdigest()[:16]


def encoders(clip: Any, tokens: Mapping[str, Any], segments: Sequence[tuple[int, str]]) -> dict[str, Encoded]:
    """Every text encoder that this CLIP really has (SD3 may lack some, SDXL's refiner has no L).

    Args:
        tokens: of ``clip.tokenize(prompt, return_word_ids=True)``.
        segments: of `text.placed_segments`.

    Raises:
        ValueError: for an unknown CLIP.
        RuntimeError: when tokens cannot be traced.
    """
    if set(tokens) not in _KNOWN:
        raise ValueError(
            f"Attune does not know this CLIP (text encoders: {', '.join(tokens)}). It reads prompts for SD1.5, SD2, SDXL, SD3 and "
            "FLUX; connect the CLIP of one of these."
        )
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
        raise RuntimeError(
            f"Attune could not find the prompt's words among the tokens of text encoder “{name}”: this CLIP cuts prompts in a way "
            "that Attune does not know. It may come from another pack or a newer ComfyUI; update Attune, or use ComfyUI's own loaders."
        )
    return Encoded(total, tuple((token.column, span) for token, span in zip(own, spans, strict=True)))


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
