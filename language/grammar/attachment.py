"""Phrases after a noun, and whose they are: "with", "wearing", "holding", "in" clothes, "made of"."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from .details import Detail, units_taken
from .lexicon import ANIMATE, MATERIALS, PAIRED, ROOMS, WEARABLE
from .noun_phrases import Parse
from .units import BE, JOINS, WEAR

_DRESSED = {
    "dressed",
    "clad",
    "adorned",
    "decorated",
    "covered",
    "topped",
    "trimmed",
    "made",
    "crafted",
    "embellished",
    "painted",
}
_PLACED = {"in", "with", "of", "from", "by"}
_OPENING = WEAR | _DRESSED | {"with", "in", "of", "featuring"}


def accessories(p: Parse, taken: Collection[int], kept: Collection[int]) -> tuple[list[Detail], set[int]]:
    """One detail for each phrase, if nothing in it is modified; and the materials among their nouns, which stay as they are.

    If something is, the phrase stays and its noun is a subject of its own, as in the paper.

    Args:
        taken: units that other details have.
        kept: nouns whose modifiers are no details.
    """
    s, taken, kept = p.s, set(taken), set(kept)
    behind, ends = animate_before(p), _phrase_ends(p)
    out: list[Detail] = []
    materials: set[int] = set()
    last: tuple[int, int, int | None] | None = None  # owner, end and detail of the phrase before
    for i, unit in enumerate(s.units):
        low = unit.low
        if low not in _OPENING or i in taken:
            continue
        begin, k = i, p.ending(i)
        links: tuple[int, ...] = ()
        if k is None and last and s.low(i - 1) in ("and", ",") and last[1] == i - 1 and low not in ("of", "in"):
            k, links = last[0], (i - 1,)
        elif k is None and low not in ("with", "in", "of"):
            begin = i - 1 if s.low(i - 1) in BE else i
            k = p.ending(begin)
        if k is None and s.low(begin - 1) == ",":
            k, links = p.ending(begin - 1), (begin - 1,)
        item = _thing_after(p, i + 1)
        if k is None or item is None or k in kept or not _opens_phrase(p, i, k, item, behind):
            continue
        who = low in WEAR or low in ("dressed", "clad", "in")
        animate = behind[k] if who and not p.is_any(k, ANIMATE) else None
        owner = k if animate is None else animate
        made = low == "of" or (low in ("made", "crafted") and s.low(i + 1) in ("of", "from", "out"))
        things = [item] if made else _listed(p, item, owner, low)
        end = ends[things[-1]]
        more = p.starting(end + 1) if s.low(end) == "of" else None
        inner = things if more is None else [*things, more]
        if not made and any(p.nouns[t].modifiers for t in inner):
            last = (owner, end, None)
            continue
        if made:
            materials.add(item)
            kept.add(item)
        if links and s.low(links[0]) == "," and s.low(end) == ",":
            links = (*links, end)
        if last and links and s.low(links[0]) == "and" and last[2] is not None:  # the “and” goes with either phrase
            out[last[2]] = replace(out[last[2]], links=(*out[last[2]].links, links[0]))
        last = (owner, end, len(out))
        out.append(Detail(tuple(range(begin, end)), _owners(p, owner, begin, things), links))
        taken |= units_taken(out[-1:])
    return out, materials


def _opens_phrase(p: Parse, i: int, k: int, item: int, behind: Sequence[int | None]) -> bool:
    """Whether the word at i makes noun ``item`` a detail of noun k."""
    s, low, thing = p.s, p.s.low(i), p.nouns[item]
    if low == "sports":
        return s.pos(i) == "VERB"
    if low == "in":
        return p.is_any(item, WEARABLE) and (p.is_any(k, ANIMATE) or behind[k] is not None)
    if low == "of":
        return p.head(item) in MATERIALS and (thing.start == thing.name[0] or bool(thing.modifiers))
    if low == "with":  # "feeds the birds with bread": the phrase is about the verb
        before = p.nouns[k].start - 1
        verb = s[before].tag in ("VBZ", "VBD", "VBP") and s.low(before) not in WEAR
        return not verb or p.is_any(k, ANIMATE)
    return True


def animate_before(p: Parse) -> tuple[int | None, ...]:
    """For every noun, who it is with: the cat in "a cat on a mat in a room". A phrase such as “wearing a hat” is about it."""
    out: list[int | None] = []
    for k, noun in enumerate(p.nouns):
        linked = k > 0 and p.s.pos(noun.start - 1) == "ADP" and p.nouns[k - 1].end <= noun.start - 1
        out.append(None if not linked else k - 1 if p.is_any(k - 1, ANIMATE) else out[k - 1])
    return tuple(out)


def _phrase_ends(p: Parse) -> tuple[int, ...]:
    """For every noun, one past its phrase: "on its head" and "of flowers" go with it."""
    s, ends = p.s, [noun.end for noun in p.nouns]
    for n in reversed(range(len(ends))):
        end = p.nouns[n].end
        k = p.starting(end + 1)
        if k is None or p.nouns[k].modifiers:
            continue
        own = s[p.nouns[k].start].tag == "PRP$" and s.pos(end) == "ADP"
        if own or s.low(end) == "of":
            ends[n] = ends[k]
    return tuple(ends)


def _thing_after(p: Parse, i: int) -> int | None:
    """The noun phrase that starts at i, also after one preposition ("dressed in")."""
    k = p.starting(i)
    return p.starting(i + 1) if k is None and p.s.low(i) in _PLACED else k


def _listed(p: Parse, k: int, owner: int, verb: str) -> list[int]:
    """Noun k and those that are listed with it: "a hat, a scarf and glasses"."""
    s, out = p.s, [k]
    while True:
        after = p.nouns[out[-1]].end
        while s.low(after) in JOINS:
            after += 1
        following = p.starting(after)
        if after == p.nouns[out[-1]].end or following is None:
            return out
        part = p.is_any(following, WEARABLE) or (p.is_any(owner, ROOMS) and verb == "with")
        ends = p.nouns[following].end
        taken = s.low(ends) in WEAR | BE | {"with"} or s.pos(ends) in ("VERB", "AUX")
        if not part or p.is_any(following, ANIMATE) or (taken and p.is_any(k, ANIMATE)):
            return out
        out.append(following)


def _owners(p: Parse, k: int, first: int, things: Sequence[int]) -> tuple[int, ...]:
    """Two who share what follows: "a man and a woman wearing hats"."""
    s = p.s
    plural = all(s[p.nouns[t].end - 1].tag == "NNS" and p.nouns[t].name[0] == p.nouns[t].start for t in things)
    if not k or not plural or any(p.is_any(t, PAIRED) for t in things):
        return (k,)
    noun, before = p.nouns[k], p.nouns[k - 1]
    together = s.low(noun.start - 1) == "and" and before.end == noun.start - 1
    animate = p.is_any(k, ANIMATE) and p.is_any(k - 1, ANIMATE)
    return (k - 1, k) if together and animate and first == noun.end else (k,)
