"""A detail: some words of a text, and the nouns that they are about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Detail:
    """A modifier or phrase.

    Attributes:
        units: the words that say it.
        nouns: what it is about, by their number.
        links: commas and “and” that are only shown with it.
    """

    units: tuple[int, ...]
    nouns: tuple[int, ...]
    links: tuple[int, ...] = ()


def units_taken(details: Iterable[Detail]) -> set[int]:
    """The units that details have, their links included."""
    return {i for detail in details for i in (*detail.units, *detail.links)}
