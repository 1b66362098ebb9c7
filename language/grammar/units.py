"""A text as words and marks, and what each of them is by itself and beside its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..english import english
from .lexicon import JOINED, LOOKS

ARTICLES = {"a", "an", "the"}
BE = {"is", "are", "was", "were", "be", "being", "been", "'s", "’s"}
JOINS = {"and", "or", "&", ","}
SIDES = {"back", "front", "top", "side"}
WHO = {"who", "which", "that", "whose"}
WEAR = {"wear", "wears", "wearing", "wore", "hold", "holds", "holding", "held", "carry", "carries", "carrying", "carried"}
WEAR |= {"sport", "sports", "sporting", "clutching", "has", "have", "having"}
# No phrase or clause that a rule looks for is longer: a text is read in a time that grows with its length alone.
LONGEST = 40


@dataclass(frozen=True)
class Unit:
    """A word of the text (hyphens do not part it), or a mark: where it is, and spaCy's tags."""

    text: str
    start: int
    end: int
    pos: str
    tag: str

    @cached_property
    def low(self) -> str:
        return self.text.lower()

    @cached_property
    def nominal(self) -> bool:
        """It may be, or stand before, a noun."""
        return self.pos in ("NOUN", "PROPN", "ADJ", "NUM") or self.looks

    @cached_property
    def looks(self) -> bool:
        """It says what something looks like, whatever its tag."""
        parts = self.low.split("-")
        if len(parts) == 1:
            return self.low in LOOKS
        last = parts[-1]
        return last in LOOKS or last in JOINED or last in ("style", "like") or last.endswith(("ed", "ing"))

    @cached_property
    def mark(self) -> bool:
        return not any(map(str.isalnum, self.text))


_NOTHING = Unit("", -1, -1, "", "")


@dataclass(frozen=True)
class Sentence:
    """The units of a text, which may be asked for beyond its ends: nothing is there."""

    units: tuple[Unit, ...]

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, i: int) -> Unit:
        return self.units[i] if 0 <= i < len(self.units) else _NOTHING

    def low(self, i: int) -> str:
        return self[i].low

    def pos(self, i: int) -> str:
        return self[i].pos

    def looks(self, i: int) -> bool:
        return self[i].looks

    def nominal(self, i: int) -> bool:
        return self[i].nominal and not self.closes(i)

    def closes(self, i: int) -> bool:
        """No noun phrase goes on here: "next to", "in front of", "left of" and the like."""
        low, after = self.low(i), self.low(i + 1)
        if (low, after) == ("side", "by"):
            return True
        if low in ("left", "right") and after == "of":
            return self.low(i - 1) not in ("the", "its", "their")
        return low in ("next", "close", "near", "adjacent", "full") and after in ("to", "of")

    def plain(self, i: int) -> bool:
        """A noun that is not also the name of a colour, material or shape."""
        return (self.pos(i) in ("NOUN", "PROPN") and not self.looks(i)) or (self.low(i) in SIDES and self.looks(i - 1))

    @cached_property
    def described_from(self) -> tuple[int, ...]:
        """For every unit, where the row of adjectives starts that ends just before it."""
        out, start = [], 0
        for i, unit in enumerate(self.units):
            out.append(start)
            if not (unit.looks or unit.pos == "ADJ"):
                start = i + 1
        return tuple(out)


def units_of(text: str) -> tuple[Unit, ...]:
    """The words and marks of a text.

    Raises:
        RuntimeError: when spaCy or its English model is not installed.
    """
    tokens = [t for t in english()(text) if not t.is_space]
    out: list[Unit] = []
    i = 0
    while i < len(tokens):
        last = i
        while (  # "sky-blue", "t-shirt": three tokens that touch
            last + 2 < len(tokens)
            and tokens[last + 1].text == "-"
            and tokens[last].idx + len(tokens[last].text) == tokens[last + 1].idx
            and tokens[last + 1].idx + 1 == tokens[last + 2].idx
        ):
            last += 2
        first, end = tokens[i].idx, tokens[last].idx + len(tokens[last].text)
        out.append(Unit(text[first:end], first, end, tokens[last].pos_, tokens[last].tag_))
        i = last + 1
    return tuple(out)


def single(word: str) -> str:
    """A word without the ending of a plural."""
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
