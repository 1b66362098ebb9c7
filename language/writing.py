"""A prompt written out with any of its details: articles, commas and capitals put right, weights and escapes kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .grammar.reading import Reading, read, shown
from .text import EMBEDDING, starts_of, weighted_text, without_embeddings, word_keys

_BY_VOWEL = {"a", "an"}
_SILENT = re.compile(r"(hour|honest|honou?r|heir|[fhlmnrsx](?=[A-Z\d-])|[FHLMNRSX][A-Z\d]+\b)")
_LIKE_YOU = re.compile(r"(eu|ew|one\b|once\b|ouija|uni(?!n|m)|us[aeiu]|ut[aeio]|ubiq|ukulele|uranium|urin|u\b)", re.IGNORECASE)


def article(word: str) -> str:
    """“a” or “an”, as the word after it asks for by its sound."""
    vowel = word[:1].lower() in "aeio" or word[:1].lower() == "u" or bool(re.match(r"8|11\b|18\b", word))
    return "an" if (vowel and not _LIKE_YOU.match(word)) or _SILENT.match(word) else "a"


@dataclass(frozen=True)
class Text:
    """A prompt that can be written out with some of its details.

    Attributes:
        plain: without weights and escapes.
        weights: of each of its characters.
        spans: where its words and marks are: (first character, one past the last, the grammar's unit, or -1 for an embedding).
    """

    plain: str
    weights: Sequence[float]
    reading: Reading
    spans: Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Piece:
    """A stretch of a sub-prompt: its text, the space before it, its weight, and the grammar's unit (-1: an embedding)."""

    text: str
    space: str
    weight: float
    unit: int


def read_prompt(prompt: str) -> Text:
    """A prompt, read. An embedding is no word of English: the grammar does not see it, and it stays in every branch.

    Raises:
        RuntimeError: when spaCy or its English model is not installed.
    """
    plain, weights = weighted_text(prompt)
    reading = read(without_embeddings(plain))
    spans = [(u.start, u.end, i) for i, u in enumerate(reading.units)] + [(*m.span(), -1) for m in EMBEDDING.finditer(plain)]
    return Text(plain, weights, reading, sorted(spans))


def phrase_of(text: Text, units: Iterable[int]) -> str:
    """Units as they stand in the prompt, without weights."""
    members = list(units)
    return text.plain[text.reading.units[members[0]].start : text.reading.units[members[-1]].end]


def pieces_of(text: Text, details: set[int]) -> list[Piece]:
    """The prompt with only these details in it."""
    plain, units, visible = text.plain, text.reading.units, set(shown(text.reading, details))
    out: list[Piece] = []
    gap, last, raised, dropped = "", 0, False, False
    for start, end, unit in text.spans:
        gap += plain[last:start]
        last = end
        if unit >= 0 and unit not in visible:
            first = not out or out[-1].text[-1:] in ".;!?"
            raised = raised or (first and plain[start].isupper() and not any(p.isupper() for p in plain[start + 1 : end]))
            dropped = True
            continue
        word = plain[start:end]
        mark = unit >= 0 and units[unit].mark
        if dropped:  # the gap is now made of several
            gap = "\n" if "\n" in gap else "" if mark and word not in '([{“"-–—&' else " " if gap else ""
        if mark and word == "," and (not out or out[-1].text in (",", ".", ";")) and dropped:
            gap, dropped = "", True
            continue
        if raised and not mark and dropped:
            word = word[:1].upper() + word[1:]
        out.append(Piece(word, gap if out else "", text.weights[start], unit))
        gap, raised, dropped = "", False, False
    return _with_articles(out)


def _with_articles(pieces: list[Piece]) -> list[Piece]:
    """Put “a” or “an” right where the word after it is not the one of the prompt."""
    out = list(pieces)
    for i, piece in enumerate(pieces[:-1]):
        after = pieces[i + 1]
        if piece.text.lower() in _BY_VOWEL and piece.unit >= 0 and after.unit != piece.unit + 1:
            word = article(after.text)
            out[i] = replace(piece, text=word.capitalize() if piece.text[0].isupper() else word)
    return out


def write(pieces: Sequence[Piece]) -> str:
    """The pieces as a prompt: weights and escapes are put back."""
    out, i = "", 0
    while i < len(pieces):
        j = i
        while j < len(pieces) and pieces[j].weight == pieces[i].weight:
            j += 1
        run = "".join((p.space if n else "") + p.text for n, p in enumerate(pieces[i:j]))
        run = run.replace("(", "\\(").replace(")", "\\)")
        out += pieces[i].space + (run if pieces[i].weight == 1.0 else f"({run}:{pieces[i].weight:.4g})")
        i = j
    return out


def occurrence_of(pieces: Sequence[Piece], unit: int, phrase: str) -> int | None:
    """Which occurrence of the phrase starts at this unit; None if it is not there."""
    before = plain = ""
    for piece in pieces:
        if piece.unit == unit:
            before = plain + piece.space
        plain += piece.space + piece.text
    starts, words = starts_of(word_keys(phrase), word_keys(plain)), len(word_keys(before))
    return starts.index(words) if words in starts else None
