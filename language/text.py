"""A prompt as ComfyUI's text encoders read it: its text without weights and escapes, and the words in that."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Letters and digits (with accents on their own), and the ending of "dog's" as a word of its own, so that "dog" is found.
_LETTER = r"(?:[^\W_]|[\u0300-\u036f])"
EMBEDDING = re.compile(r"(?<![^ \n])embedding:\S*[^\s,]")
WORD = re.compile(rf"{EMBEDDING.pattern}|(?<=[^\W_])['’]{_LETTER}+|{_LETTER}+")


def segments_of(prompt: str) -> list[tuple[str, float]]:
    """The prompt's stretches of equal weight, without brackets and escapes, each with its weight.

    Raises:
        ValueError: for half a character (a lone surrogate), which no text encoder can read.
    """
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    if broken := re.search("[\ud800-\udfff]", prompt):
        raise ValueError(f"the text has half a character (U+{ord(broken.group()):04X}) in it: delete it and write it again")
    return [(unescape_important(text), weight) for text, weight in token_weights(escape_important(prompt), 1.0)]


def placed_segments(prompt: str) -> tuple[str, list[tuple[int, str]]]:
    """The prompt without weights and escapes, and its segments with their place in that.

    ComfyUI tokenises segments one by one, so words end where they do: a space goes between two that touch.
    """
    plain, placed = "", []
    for segment, _ in segments_of(prompt):
        if plain and segment and not plain[-1].isspace() and not segment[0].isspace():
            plain += " "
        placed.append((len(plain), segment))
        plain += segment
    return plain, placed


def plain_text(prompt: str) -> str:
    """The prompt without weights and escapes."""
    return placed_segments(prompt)[0]


def weighted_text(prompt: str) -> tuple[str, list[float]]:
    """The prompt without weights and escapes, as it would be written (“(cat)s” is one word), and each character's weight."""
    plain: str = ""
    weights: list[float] = []
    for segment, weight in segments_of(prompt):
        if plain and segment and plain[-1].isalnum() and segment[0].isalnum():
            plain, weights = plain + " ", [*weights, 1.0]
        plain += segment
        weights += [weight] * len(segment)
    return plain, weights


def without_embeddings(plain: str) -> str:
    """The text with spaces in place of its embeddings, which are no words of English."""
    return EMBEDDING.sub(lambda m: " " * len(m.group()), plain)


def word_key(word: str) -> str:
    """What two spellings of a word have in common."""
    return unicodedata.normalize("NFKC", word).casefold().replace("’", "'")


def word_keys(plain: str) -> list[str]:
    """The keys of a plain text's words."""
    return [word_key(m.group()) for m in WORD.finditer(plain)]


def starts_of(wanted: Sequence[str], keys: Sequence[str]) -> list[int]:
    """Which of the words start the wanted row of words; nothing starts an empty one."""
    size, row = len(wanted), list(wanted)
    return [i for i in range(len(keys) - size + 1) if size and list(keys[i : i + size]) == row]


@dataclass(frozen=True)
class Written:
    """A prompt as it is typed, and what it says.

    Attributes:
        literal: as an encoder reads it that takes no weights: without escapes.
        plain: without weights and brackets too, as of `plain_text`.
        plain_of: for each character of ``literal`` its place in ``plain``, or None where it only writes a weight.
        weights: of each character of ``plain``.
    """

    literal: str
    plain: str
    plain_of: tuple[int | None, ...]
    weights: tuple[float, ...]


def _pieces(text: str, start: int, weight: float) -> Iterator[tuple[int, str, float]]:
    """ComfyUI's stretches of equal weight with their places: ``token_weights`` says what they are, not where."""
    from comfy.sd1_clip import parse_parentheses

    for part in parse_parentheses(text):
        if len(part) >= 2 and part[0] == "(" and part[-1] == ")":
            inner, own = part[1:-1], weight * 1.1
            before, colon, number = inner.rpartition(":")
            if colon and before:
                with contextlib.suppress(ValueError):
                    own = float(number)
                    inner = before
            yield from _pieces(inner, start + 1, own)
        else:
            yield start, part, weight
        start += len(part)


def as_typed(prompt: str) -> Written:
    """What a prompt says and where it says so.

    Raises:
        ValueError: for half a character.
    """
    from comfy.sd1_clip import escape_important, unescape_important

    plain, placed = placed_segments(prompt)
    escaped = escape_important(prompt)  # two characters for two
    places = [i for i, c in enumerate(escaped) if c != "\0"]
    weights: list[float] = [1.0] * len(plain)
    of: dict[int, int] = {}
    for (start, segment), (at, piece, weight) in zip(placed, _pieces(escaped, 0, 1.0), strict=True):
        inside = [at + i for i, c in enumerate(piece) if c != "\0"]
        if len(inside) != len(segment):
            raise RuntimeError("Attune reads this prompt's brackets in another way than this ComfyUI; update Attune")
        for i, place in enumerate(inside):
            of[place], weights[start + i] = start + i, weight
    literal = unescape_important(escaped)
    return Written(literal, plain, tuple(of.get(place) for place in places), tuple(weights))
