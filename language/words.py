"""Which columns of a prompt's conditioning belong to which words: the pack's one place for token positions.

A prompt is taken apart as ComfyUI does it (weights, escapes, embeddings, chunks of 77), every token is traced back to the
characters it came from, and the result is checked against the tokens that ComfyUI itself makes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

from .nouns import noun_spans

Span = tuple[int, int]  # first character, one past the last
T5 = "t5xxl"
_PARTS = {"l": "clip_l", "g": "clip_g", "h": "clip_h", T5: T5}  # ComfyUI's attribute for each text encoder
_KNOWN = ({"l"}, {"h"}, {"l", "g"}, {"l", "g", T5}, {"l", T5})  # SD1.5, SD2, SDXL, SD3, FLUX

# Letters and digits (with accents on their own), and the ending of "dog's" as a word of its own, so that "dog" is found.
_LETTER = r"(?:[^\W_]|[\u0300-\u036f])"
_EMBEDDING = re.compile(r"(?<![^ \n])embedding:\S*[^\s,]")
_WORD = re.compile(rf"{_EMBEDDING.pattern}|(?<=[^\W_])['’]{_LETTER}+|{_LETTER}+")
# Where CLIP's tokeniser cuts; only needed when it cannot say so itself.
_CUTS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)


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
    """

    text: str
    phrases: tuple[Phrase, ...]
    words: tuple[Phrase, ...]
    special: tuple[int, ...]
    total: int
    counts: Mapping[str, int]
    automatic: bool = False

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


# --- text -----------------------------------------------------------------------------------------------------------


def _plain(prompt: str) -> tuple[str, list[tuple[int, str]]]:
    """The prompt without weights and escapes, and its equally weighted segments with their place in that.

    ComfyUI tokenises segments one by one, so words end where they do: a space goes between two that touch.
    """
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    plain, segments = "", []
    for escaped, _ in token_weights(escape_important(prompt), 1.0):
        segment = unescape_important(escaped)
        if plain and segment and not plain[-1].isspace() and not segment[0].isspace():
            plain += " "
        segments.append((len(plain), segment))
        plain += segment
    return plain, segments


def _key(word: str) -> str:
    """What two spellings of a word have in common."""
    return unicodedata.normalize("NFKC", word).casefold().replace("’", "'")


def _keys(phrase: str) -> tuple[str, ...]:
    return tuple(_key(m.group()) for m in _WORD.finditer(_plain(phrase)[0]))


# --- tokens ---------------------------------------------------------------------------------------------------------


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


def _derive(tokenizer: Any, segments: list[tuple[int, str]]) -> list[tuple[int | None, Span]]:
    """The tokens of a prompt in order with their characters in the plain text; None for a vector of an embedding."""
    out: list[tuple[int | None, Span]] = []
    name = tokenizer.embedding_identifier
    for start, segment in segments:
        cuts = [0, *(m.end() for m in re.finditer(rf"[ \n](?={re.escape(name)})", segment)), len(segment) + 1]
        for begin, end in pairwise(cuts):
            text = segment[begin : end - 1]
            places = list(range(start + begin, start + begin + len(text)))
            if text.startswith(name) and tokenizer.embedding_directory is not None:
                vectors, rest = tokenizer._try_get_embedding(text[len(name) :].strip("\n"))
                # What is left over has other spaces, but its letters are the last ones of this text.
                solid = [p for p, c in zip(places, text, strict=True) if not c.isspace()]
                used = len(solid) - sum(not c.isspace() for c in rest)
                if vectors is not None:
                    out += [(None, (solid[0], solid[used - 1] + 1))] * (1 if vectors.ndim == 1 else len(vectors))
                letters, text, at = iter(solid[used:]), rest, start + begin
                places = [at := at if c.isspace() else next(letters) for c in rest]
            if text:
                out += [(t, (places[a], places[b - 1] + 1) if b > a else (0, 0)) for t, (a, b) in _tokenise(tokenizer, text)]
    return out


@dataclass(frozen=True)
class _Encoded:
    """One text encoder's view: number of columns, and per token of the prompt its column (None: dropped) and characters."""

    total: int
    tokens: tuple[tuple[int | None, Span], ...]


def _encode(
    name: str, tokenizer: Any, width: int, chunks: list[list[tuple[Any, float, int]]], segments: list[tuple[int, str]]
) -> _Encoded:
    """Match the tokens that we derive with those that ComfyUI made; ``width`` is the channels of the token embeddings.

    Raises:
        RuntimeError: when they differ.
    """
    own: list[tuple[Any, int | None]] = []
    total = 0
    for chunk in chunks:
        column = total
        for token, _, word in chunk:
            # ComfyUI leaves out vectors made for another encoder, moves the rest up and pads the end.
            fits = isinstance(token, Integral) or token.shape[-1] == width
            if word:  # 0: start, end and padding
                own.append((token, column if fits else None))
            column += fits
        total += len(chunk)
    derived = _derive(tokenizer, segments)
    ids = [int(token) if isinstance(token, Integral) else None for token, _ in own]
    if ids != [token for token, _ in derived]:
        raise RuntimeError(
            f"Attune could not find the prompt's words among the tokens of text encoder “{name}”: this CLIP cuts prompts in a way "
            "that Attune does not know. It may come from another pack or a newer ComfyUI; update Attune, or use ComfyUI's own loaders."
        )
    return _Encoded(total, tuple((column, span) for (_, column), (_, span) in zip(own, derived, strict=True)))


def _encoders(clip: Any, tokens: Mapping[str, Any], segments: list[tuple[int, str]]) -> dict[str, _Encoded]:
    """Every text encoder that this CLIP really has (SD3 may lack some, SDXL's refiner has no L)."""
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


# --- words ----------------------------------------------------------------------------------------------------------


def _listed(words: Iterable[Phrase]) -> str:
    """The words that a phrase may be made of, each once, for an error."""
    known = list(dict.fromkeys(w.text.lower() for w in words if w.columns))
    return ", ".join(known[:60]) + (", …" if len(known) > 60 else "")


def prompt_words(clip: Any, text: str, words: str = "") -> Words:
    """Find words of a prompt in the conditioning that ``clip`` makes of it.

    Args:
        clip: a CLIP of SD1.5, SD2, SDXL, SD3 or FLUX.
        text: the prompt, as for CLIP Text Encode.
        words: phrases separated by commas. Every occurrence counts; case, spaces, weights and punctuation do not. Empty:
            every noun of the prompt.

    Raises:
        ValueError: for an empty prompt, a phrase that is not in it, no noun to be found, or no or an unknown CLIP.
        RuntimeError: when the tokens cannot be traced, or nouns are wanted and spaCy is not installed.
    """
    if clip is None:
        raise ValueError("there is no text encoder: this checkpoint has none, so load a CLIP on its own")
    plain, segments = _plain(text)
    matches = list(_WORD.finditer(plain))
    if not matches:
        raise ValueError("the prompt is empty: write the text that you also give to CLIP Text Encode")
    tokens = clip.tokenize(text, return_word_ids=True)
    encoded = _encoders(clip, tokens, segments)
    flux = set(tokens) == {"l", T5}  # there L only makes the pooled vector
    shared = [n for n in encoded if n != T5 and not flux]
    before = min((encoded[n].total for n in shared), default=0)  # ComfyUI cuts L and G to the shorter of the two

    def context(columns: Mapping[str, Iterable[int]]) -> tuple[int, ...]:
        out = {c for n in shared for c in columns[n] if c < before}
        return tuple(sorted(out | {before + c for c in columns.get(T5, ())}))

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
    keys = [_key(m.group()) for m in matches]
    asked = [part for part in re.split(r"[,，、\n]", words) if part.strip()]
    if asked:
        wanted = {_keys(part): part.strip() for part in asked}
    else:
        spans = noun_spans(_EMBEDDING.sub(lambda m: " " * len(m.group()), plain))
        nouns = [tuple(keys[i] for i in sorted({owner[p] for p in range(*span) if p in owner})) for span in spans]
        wanted = {noun: " ".join(noun) for noun in nouns if noun}
        if not wanted:
            raise ValueError(f"no noun was found in the prompt: write the words you mean. It has: {_listed(all_words)}")
    phrases = []
    for sequence, written in wanted.items():
        n = len(sequence)
        starts = [i for i in range(len(keys) - n + 1) if n and tuple(keys[i : i + n]) == sequence]
        if not starts:
            raise ValueError(f"“{written}” is not in the prompt. It has these words: {_listed(all_words)}")
        found = phrase(
            " ".join(m.group() for m in matches[starts[0] : starts[0] + n]), {i + k for i in starts for k in range(n)}
        )
        if not found.columns:
            raise ValueError(f"“{written}” takes no place in the prompt: the embedding is missing, or made for another model")
        phrases.append(found)
    content = context({n: {c for c, _ in one.tokens if c is not None} for n, one in encoded.items()})
    total = before + (encoded[T5].total if T5 in encoded else 0)
    special = tuple(sorted(set(range(total)) - set(content)))
    counts = {n: one.total for n, one in encoded.items()}
    return Words(text, tuple(phrases), all_words, special, total, counts, not asked)
