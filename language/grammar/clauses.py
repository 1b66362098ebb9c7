"""What is said of a noun in a clause: "who is riding a bike", "the apple is red", "a cat, black and fluffy, sits"."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from .attachment import animate_before
from .details import Detail, units_taken
from .lexicon import ANIMATE, MEDIA, WEARABLE
from .noun_phrases import Parse
from .units import BE, LONGEST, WHO


def after_commas(p: Parse) -> Iterator[Detail]:
    """Adjectives set off behind their noun: "a cat, black and fluffy, sits"."""
    s = p.s
    for k, noun in enumerate(p.nouns):
        j = noun.end
        if s.low(j) != ",":
            continue
        end = j + 1
        while s.pos(end) in ("ADJ", "ADV") or s.looks(end) or s.low(end) == "and":
            end += 1
        words = range(j + 1, end)
        says = any(s.looks(u) for u in words) and not any(s.low(u) in MEDIA or u in p.inside for u in words)
        if says and (end >= len(s) or s[end].mark):
            yield Detail(tuple(words), (k,), (j, end) if s.low(end) == "," else (j,))


def clauses(p: Parse, taken: Collection[int], kept: Collection[int]) -> list[Detail]:
    """Relative clauses and what is said with “is”.

    Args:
        taken: units that other details have.
        kept: nouns whose modifiers are no details.
    """
    out: list[Detail] = []
    taken = set(taken)
    roots = _roots(p)
    behind = animate_before(p)
    for i, unit in enumerate(p.s.units):
        if i in taken:
            continue
        found = _relative(p, i, behind) if unit.low in WHO else _predicate(p, i, kept, roots) if unit.low in BE else None
        if found is not None and not taken.intersection(found.units):
            out.append(found)
            taken |= units_taken([found])
    return out


def _relative(p: Parse, i: int, behind: tuple[int | None, ...]) -> Detail | None:
    """The relative clause that unit i opens."""
    s = p.s
    comma = s.low(i - 1) == ","
    k = p.ending(i - 1 if comma else i)
    if k is None or s.pos(i) == "SCONJ":
        return None
    end = _clause_end(p, i)
    if end <= i + 1 or p.modified(i + 1, end):
        return None
    links = () if not comma else (i - 1, end) if s.low(end) == "," else (i - 1,)
    animate = behind[k] if s.low(i) == "who" and not p.is_any(k, ANIMATE) else None
    return Detail(tuple(range(i, end)), (k if animate is None else animate,), links)


def _clause_end(p: Parse, i: int) -> int:
    """One past a relative clause: at a comma, a stop, a second verb, or “and” with a new thing."""
    s, verbs, j = p.s, 0, i + 1
    while j < min(len(s), i + LONGEST):
        unit = s[j]
        if unit.mark or unit.low in ("while", "as"):
            return j
        if unit.low in ("and", "or") and verbs:
            k = p.starting(j + 1)
            if k is not None and not p.is_any(k, WEARABLE):
                return j
        if j not in p.inside and (unit.tag in ("VBZ", "VBP", "VBD", "MD") or unit.low in BE):
            auxiliary = s.pos(j - 1) == "AUX" or s.low(j - 1) in ("and", "or", "to")
            if verbs and not auxiliary:
                return j
            verbs += 1
        j += 1
    return j


def _roots(p: Parse) -> tuple[int, ...]:
    """For every noun, the first one of "a cat on a mat in a room"."""
    roots: list[int] = []
    for k, noun in enumerate(p.nouns):
        linked = k > 0 and p.s.pos(noun.start - 1) == "ADP" and p.nouns[k - 1].end == noun.start - 1
        roots.append(roots[k - 1] if linked else k)
    return tuple(roots)


def _predicate(p: Parse, i: int, kept: Collection[int], roots: tuple[int, ...]) -> Detail | None:
    """What the “is” at unit i says of the noun before it."""
    s, k = p.s, p.ending(i)
    if k is None or k in kept:
        return None
    j = i + 1
    while s.pos(j) in ("ADJ", "ADV") or s.looks(j) or s.low(j) in ("and", ","):
        if j in p.inside or s.closes(j):
            break
        j += 1
    while j > i + 1 and (s.low(j - 1) in ("and", ",") or s.pos(j - 1) == "ADV"):
        j -= 1
    described = any(s.pos(u) == "ADJ" or s.looks(u) for u in range(i + 1, j))
    clear = s.pos(j) not in ("NOUN", "PROPN", "PART") and s.low(j) not in ("to", "of", "than", "from")
    return Detail(tuple(range(i, j)), (roots[k],)) if described and clear else None
