"""What a prompt says about what: its noun phrases, and every modifier with the noun that it belongs to.

spaCy's small model gives each word's part of speech; the rest is rules over the words, because its trees are often wrong on prompts.
The rules are applied in order: a later one leaves alone what an earlier one has taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from .attachment import accessories
from .clauses import after_commas, clauses
from .details import Detail, units_taken
from .noun_phrases import Noun, Parse, parse
from .units import Sentence, Unit, units_of
from .whole import styles, tags


@dataclass(frozen=True)
class Reading:
    """A text as units, noun phrases and details in the order of the text; ``needs``: the details without which a unit is not shown."""

    units: tuple[Unit, ...]
    nouns: tuple[Noun, ...]
    details: tuple[Detail, ...]
    needs: Mapping[int, frozenset[int]]


def read(text: str) -> Reading:
    """What a plain text (no weights, no escapes) says about what.

    Raises:
        RuntimeError: when spaCy or its English model is not installed.
    """
    p = parse(Sentence(units_of(text)))
    details = sorted(_details(p), key=lambda detail: detail.units[0])
    needs: dict[int, set[int]] = {}
    for number, detail in enumerate(details):
        for i in (*detail.units, *detail.links):
            needs.setdefault(i, set()).add(number)
    return Reading(p.s.units, p.nouns, tuple(details), {i: frozenset(numbers) for i, numbers in needs.items()})


def _details(p: Parse) -> list[Detail]:
    """The details by the rules in turn; the modifiers of nouns that none of them has taken come last."""
    kept = tags(p)  # nouns whose modifiers are about the whole picture, or part of a longer detail
    out, named = styles(p, kept)
    kept |= named
    out += after_commas(p)
    out += clauses(p, units_taken(out), kept)
    phrases, materials = accessories(p, units_taken(out), kept)
    out += phrases
    kept |= materials
    taken = units_taken(out)
    for k, noun in enumerate(p.nouns):
        if k not in kept and taken.isdisjoint(range(noun.start, noun.end)):
            for m, modifier in enumerate(noun.modifiers):
                out.append(Detail(modifier, (k,), tuple(i for i, near in noun.links.items() if m in near)))
    return out


def shown(reading: Reading, details: Set[int]) -> Iterator[int]:
    """The units of the text with only these details in it, in order."""
    for i in range(len(reading.units)):
        if reading.needs.get(i, frozenset()) <= details:
            yield i
