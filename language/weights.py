"""Weights of phrases: read from lines a person writes, and looked up in a prompt's words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .phrases import joined
from .text import plain_text, starts_of, word_key, word_keys
from .words import Phrase, Words, listed

LOW, HIGH = -2.0, 5.0
_PARTS = re.compile(r"[,，、;；\n]")
_LINE = re.compile(r"(?P<phrase>.*)[:：=]\s*(?P<weight>[^:：=]*)", re.DOTALL)


@dataclass(frozen=True)
class Weighted:
    """A phrase, everywhere it stands in the prompt, and what it weighs."""

    phrase: Phrase
    weight: float


def written(lines: str) -> list[tuple[str, float]]:
    """Phrases and weights as they are written, ``phrase: number``, a line or a comma apart.

    Raises:
        ValueError: for a part without phrase or number, or a number out of range.
    """
    found = []
    for part in filter(str.strip, _PARTS.split(lines)):
        match = _LINE.fullmatch(part.strip())
        if match is None or not word_keys(plain_text(match["phrase"])):
            raise ValueError(f"“{_short(part)}” is no phrase with a weight: write “red car: 1.4”, one a line")
        found.append((match["phrase"].strip(), number(match["weight"], match["phrase"].strip())))
    return found


def number(text: str, phrase: str) -> float:
    """A weight.

    Raises:
        ValueError: when it is none, or out of range.
    """
    try:
        weight = float(text)
    except ValueError:
        raise ValueError(f"“{_short(text)}” in the weight of “{_short(phrase)}” is no number: write “red car: 1.4”") from None
    if not LOW <= weight <= HIGH:  # NaN is in no range
        raise ValueError(f"the weight of “{_short(phrase)}” is {weight:g}; it must be from {LOW:g} to {HIGH:g}")
    return weight


def weighted(words: Words, lines: str) -> tuple[Weighted, ...]:
    """The phrases that the prompt itself weighs where its encoders do not, then those that ``lines`` weigh, everywhere they stand in it.

    A phrase that is written twice weighs what is last.

    Raises:
        ValueError: for what `written` refuses, or a phrase that is not in the prompt or takes no place in it.
    """
    keys = [word_key(w.text) for w in words.words]
    found = {p.columns: Weighted(p, number(str(weight), p.text)) for p, weight in words.weighted if p.columns}
    for text, weight in written(lines):
        wanted = word_keys(plain_text(text))
        members = [i + k for i in starts_of(wanted, keys) for k in range(len(wanted))]
        if not members:
            raise ValueError(f"“{_short(text)}” is not in the prompt. It has these words: {listed(words.words)}")
        spelled = " ".join(words.words[i].text for i in members[: len(wanted)])
        phrase = joined(spelled, [words.words[i] for i in sorted(set(members))])
        if not phrase.columns:
            raise ValueError(
                f"“{_short(text)}” takes no place in the prompt: the embedding is missing, or made for another model"
            )
        found.pop(phrase.columns, None)
        found[phrase.columns] = Weighted(phrase, weight)
    return tuple(found.values())


def _short(text: str) -> str:
    """A part of what was written, in a sentence."""
    shown = "".join(c if c.isprintable() else " " for c in text.strip()[:60])
    return shown if len(text.strip()) <= 60 else f"{shown}…"
