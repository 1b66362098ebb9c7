"""The words before a noun cut into modifiers: "light blue", "red and white striped", "oil painting style"."""

from __future__ import annotations

from collections.abc import Sequence

from .lexicon import COLOURS, JOINED, MATERIALS, PAIRS, PATTERNS, SHADES, STYLES, TINTS, WHICH
from .units import JOINS, Sentence

Links = dict[int, tuple[int, ...]]


def modifiers_of(s: Sentence, first: int, name: int) -> tuple[tuple[tuple[int, ...], ...], Links]:
    """The units from ``first`` to the noun's name as modifiers, and the commas and “and” between them with the modifiers beside each."""
    parts: list[list[int]] = []
    i = first
    while i < name:
        end = i + 1 if s.low(i) in JOINS else _modifier_end(s, i, name)
        parts.append(list(range(i, end)))
        i = end
    modifiers: list[tuple[int, ...]] = []
    joins: list[tuple[int, int]] = []  # a link and the number of modifiers before it
    for part in _colours_joined(s, parts):
        if s.low(part[0]) in JOINS:
            joins.append((part[0], len(modifiers)))
        elif not _counts(s, part):
            modifiers.append(tuple(part))
    links = {link: tuple(k for k in (n - 1, n) if 0 <= k < len(modifiers)) for link, n in joins}
    return tuple(modifiers), links


def _counts(s: Sentence, part: Sequence[int]) -> bool:
    return all(s.pos(i) == "NUM" or s.low(i) in WHICH for i in part)


def _modifier_end(s: Sentence, i: int, name: int) -> int:
    """One past the last unit of the modifier that starts at i."""
    end = i + 1
    for j in range(i + 1, name):  # "oil painting style", "Van Gogh style"
        if s.low(j) in ("style", "styled") and _style_start(s, i, j) == i:
            return j + 1
        if s.low(j) in JOINS:
            break
    if end >= name:
        return end
    if s.pos(i) == "ADV" and s.low(end) not in JOINS:
        return _modifier_end(s, end, name)
    if paired(s, i, end) or s.low(end) in JOINED:
        return end + 1
    low, after = s.low(i), s.low(end)
    colour = after in COLOURS or after.split("-")[-1] in COLOURS
    if colour and low in SHADES | TINTS and not (low in COLOURS and after not in COLOURS - MATERIALS):
        return end + 2 if end + 1 < name and s.low(end + 1) in JOINED else end + 1
    if low in SHADES and after in TINTS and s.low(end + 1) in COLOURS and end + 1 < name:
        return end + 2
    return end


def _style_start(s: Sentence, first: int, style: int) -> int:
    """Where the name of a style starts that ends just before ``style``."""
    if style - 2 >= first and (s.low(style - 2), s.low(style - 1)) in STYLES:
        return style - 2
    i = style - 1
    while i > first and s.pos(i) == "PROPN" and s.pos(i - 1) == "PROPN" and not s.looks(i - 1):
        i -= 1
    return i


def paired(s: Sentence, i: int, j: int) -> bool:
    """Two words for one material or pattern: "stained glass"."""
    return i >= 0 and (s.low(i), s.low(j)) in PAIRS


def _colours_joined(s: Sentence, parts: Sequence[list[int]]) -> list[list[int]]:
    """Colours or materials with “and” between them are one modifier, with the pattern after them: "red and white striped"."""

    def kind(part: Sequence[int]) -> str:
        last = s.low(part[-1]).split("-")[-1]
        return "colour" if last in COLOURS else "material" if last in MATERIALS else ""

    out: list[list[int]] = []
    i = 0
    while i < len(parts):
        j, joined = i, False
        while kind(parts[i]) and j + 1 < len(parts):
            k = j + 1
            while k < len(parts) and s.low(parts[k][0]) in JOINS:
                k += 1
            linked = k > j + 1
            later = any(s.low(p[0]) in ("and", "&") for p in parts[k : k + 2])
            if k >= len(parts) or kind(parts[k]) != kind(parts[i]) or not (linked or later):
                break
            joined = joined or any(s.low(parts[m][0]) in ("and", "or", "&") for m in range(j + 1, k))
            j = k
        if joined:
            if j + 1 < len(parts) and s.low(parts[j + 1][0]) in PATTERNS and len(parts[j + 1]) == 1:
                j += 1
            out.append([u for part in parts[i : j + 1] for u in part])
        else:
            j = i
            out.append(parts[i])
        i = j + 1
    return out
