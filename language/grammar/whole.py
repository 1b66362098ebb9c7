"""What is said of the whole picture: "in the style of Monet", "highly detailed", "soft lighting"."""

from __future__ import annotations

from collections.abc import Collection

from .details import Detail
from .lexicon import COLOURS, MEDIA
from .noun_phrases import Parse
from .units import ARTICLES, JOINS

_WAYS = ("style", "manner", "shades", "shape", "form", "color", "colour", "colors")


def tags(p: Parse) -> set[int]:
    """The nouns of parts after a comma such as "highly detailed", "soft lighting": about the whole picture, so they stay."""
    s, kept = p.s, set()
    for start in (i + 1 for i, unit in enumerate(s.units) if unit.low == ","):
        end = start
        while end < len(s) and not s[end].mark:
            end += 1
        words = s.units[start:end]
        sentence = any(unit.tag in ("VBZ", "VBP", "MD") or unit.low in ARTICLES for unit in words)
        if words and not sentence and words[-1].low in MEDIA:
            kept |= {k for k in map(p.starting, range(start, end)) if k is not None}
    return kept


def styles(p: Parse, kept: Collection[int]) -> tuple[list[Detail], set[int]]:
    """ "in the style of …", "in … style": about the noun before it, or the whole picture if it ends the prompt.

    Args:
        kept: nouns whose modifiers are no details.

    Returns:
        The details, and the nouns of all these phrases.
    """
    s = p.s
    found: list[tuple[int, int]] = []
    named: set[int] = set()
    for i in range(len(s)):
        k = p.starting(i + 1) if s.low(i) == "in" else None
        members = [] if k is None else _style(p, k)
        if members:
            named |= set(members)
            found.append((i, p.nouns[members[-1]].end))
    subjects = len(p.nouns) - len(named | set(kept))
    last_word = max((i for i, unit in enumerate(s.units) if not unit.mark), default=-1)
    out = []
    for i, end in found:
        k = p.ending(i)
        last = end > last_word and not s.low(i + 1).startswith("shade")
        shades = any(s.low(u) in ("shades", "color", "colour", "shape", "colors") for u in range(i, min(end, i + 3)))
        whole = s.low(i - 1) == "," or (last and len(found) == 1 and subjects > 1)
        if k is not None and (shades or not whole):
            out.append(Detail(tuple(range(i, end)), (k,)))
    return out, named


def _style(p: Parse, k: int) -> list[int]:
    """The nouns of a phrase that starts with noun k, if it names a style or colours: "the style of Monet", "sketch style"."""
    s, end = p.s, p.nouns[k].end
    if s.low(end) != "of" or p.head(k) not in _WAYS:
        return [k] if p.head(k) == "style" else []
    last = p.starting(end + 1)
    if last is None:
        return []
    members = [k, last]
    while p.head(k) == "shades" and s.low(p.nouns[members[-1]].end) in JOINS:
        at = p.nouns[members[-1]].end
        while s.low(at) in JOINS:
            at += 1
        more = p.starting(at)
        if more is None or p.head(more) not in COLOURS:
            break
        members.append(more)
    return members
