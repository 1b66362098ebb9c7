"""The noun phrases of a text: where each starts and ends, and which of its words are the noun's own name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .lexicon import COLOURS, JOINED, LOOKS, MATERIALS, NAMES, POSTURES, SHADES, THINGS, TINTS, WHICH
from .modifiers import modifiers_of, paired
from .units import ARTICLES, BE, JOINS, LONGEST, SIDES, WEAR, WHO, Sentence, single

_FRUITS = {"orange", "plum", "peach", "olive", "lime", "rose", "salmon", "coral", "cream"}


@dataclass(frozen=True)
class Noun:
    """A noun phrase: its units, its name (compounds included) and its modifiers, each a tuple of units.

    ``links`` are commas and “and” between modifiers, each with the modifiers that it stands between.
    """

    start: int
    end: int
    name: range
    modifiers: tuple[tuple[int, ...], ...] = ()
    links: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Parse:
    """A text and its noun phrases in order, which are counted from 0."""

    s: Sentence
    nouns: tuple[Noun, ...]

    @cached_property
    def _starts(self) -> dict[int, int]:
        return {noun.start: k for k, noun in enumerate(self.nouns)}

    @cached_property
    def _ends(self) -> dict[int, int]:
        return {noun.end: k for k, noun in enumerate(self.nouns)}

    @cached_property
    def inside(self) -> frozenset[int]:
        """The units that are in a noun phrase."""
        return frozenset(i for noun in self.nouns for i in range(noun.start, noun.end))

    def starting(self, start: int) -> int | None:
        """The noun phrase that starts at a unit."""
        return self._starts.get(start)

    def ending(self, end: int) -> int | None:
        """The noun phrase that ends just before a unit."""
        return self._ends.get(end)

    def modified(self, start: int, end: int) -> bool:
        """Whether a noun phrase that starts in these units has modifiers."""
        return any(self.nouns[self._starts[i]].modifiers for i in range(start, end) if i in self._starts)

    def head(self, k: int) -> str:
        """The last word of a noun phrase, in lower case."""
        return self.s.low(self.nouns[k].end - 1)

    def is_any(self, k: int, words: frozenset[str]) -> bool:
        """Whether the noun is one of these words, or their plural."""
        word = self.head(k)
        return word in words or single(word) in words or word.split("-")[-1] in words


def parse(s: Sentence) -> Parse:
    """Find the noun phrases of a text."""
    nouns, i = [], 0
    while i < len(s):
        noun = _noun_at(s, i)
        if noun:
            nouns.append(noun)
        i = noun.end if noun else i + 1
    return Parse(s, tuple(nouns))


def _noun_at(s: Sentence, start: int) -> Noun | None:
    """The noun phrase that starts here, if one does."""
    i, stop = start, min(len(s), start + LONGEST)
    while i < stop and _opens(s, i) and not s.closes(i):
        i += 1
    first, opened, named = i, i > start, False
    while i < stop and _goes_on(s, first, i, opened, named):
        named = named or s.plain(i)
        i += 1
    if i - 1 > first and _is_posture(s, start, i - 1):
        i -= 1
    while i > first and not _heads(s, i - 1, opened and i - 1 == first):
        i -= 1
    describes = i - start > 1 and (s.looks(start + 1) or s.pos(start + 1) == "ADJ")
    if i == first or (not opened and s[start].tag == "NNS" and describes):  # the latter is a verb
        return None
    name = _name_start(s, first, i)
    modifiers, links = modifiers_of(s, first, name)
    return Noun(start, i, range(name, i), modifiers, links)


def _opens(s: Sentence, i: int) -> bool:
    """An article, a number, a possessive: it can only stand before a noun."""
    unit = s[i]
    if unit.low in WHO:
        return False
    return unit.pos in ("DET", "NUM") or unit.tag in ("PRP$", "PDT") or (unit.low in WHICH and unit.pos != "NOUN")


def _goes_on(s: Sentence, first: int, i: int, opened: bool, named: bool) -> bool:
    """Unit i belongs to the noun phrase whose words start at ``first``; ``named``: there is a plain noun among them."""
    unit, low, body = s[i], s.low(i), i > first
    if s.closes(i) or low in BE:
        return False
    if low in JOINS:
        return body and not named and not _complete(s, first, i) and _joins(s, i)
    if unit.tag == "POS" and opened and s.pos(i - 1) == "PROPN" and s[i - 1].text[0].isupper():
        return s.low(first - 1) in ("a", "an")  # "a cubic Rubik's cube"
    if unit.mark or low in ARTICLES or unit.tag == "POS":
        return False
    if low in SIDES and body and s.looks(i - 1):
        return True
    adjective = s.pos(i + 1) == "ADJ" or s.looks(i + 1)
    if unit.tag == "NNS" and named and adjective and s[i - 1].tag != "NNS":
        return False  # a verb: "the clown juggles green balls"
    if _tint(s, i) and not named:
        return True
    if unit.pos == "VERB" and not (unit.looks and s.nominal(i + 1)):
        return _verb_inside(s, first, i, opened, named)
    if unit.nominal:
        # An adjective after a noun: only inside a longer name or a two-word colour, "sky blue car"
        return not (named and unit.pos == "ADJ") or low in JOINED or s.nominal(i + 1)
    if unit.pos == "ADV":
        following = i + 1 < len(s) and (adjective or low.endswith("ly"))
        return following and not named and (s.nominal(i + 1) or s[i + 1].tag in ("VBN", "VBG", "VBD"))
    if unit.pos == "PART" or low == "of":
        return False
    return unit.tag in ("NN", "NNS", "NNP", "FW") or unit.pos == "X"


def _tint(s: Sentence, i: int) -> bool:
    """The first of two words for one colour, whatever its tag."""
    return s.low(i) in TINTS | SHADES and s.low(i + 1) in COLOURS


def _complete(s: Sentence, first: int, end: int) -> bool:
    """What looks like modifiers has a noun at its end: "the glass marble", "a red orange"."""
    last, before = end - 1, s.low(end - 2)
    if end - first < 2 or s.pos(last) != "NOUN" or before in JOINS:
        return False
    low = s.low(last)
    return low in MATERIALS - COLOURS or (low in _FRUITS and before in COLOURS - TINTS)


def _joins(s: Sentence, i: int) -> bool:
    """A comma or “and” between two modifiers of one noun."""
    j, stop = i + 1, min(len(s), i + LONGEST)
    while j < stop and s.low(j) in JOINS:
        j += 1
    begin = j
    while j < stop and (
        s.looks(j) or s.pos(j) in ("ADJ", "ADV") or s[j].tag in ("VBN", "VBG") or s.low(j) in TINTS or s.low(j) in JOINS
    ):
        if _opens(s, j):
            return False
        j += 1
    several = j - begin >= 2 and s.pos(j - 1) == "NOUN"
    if j == begin or j >= stop or s.closes(j):
        return several  # all of them look like modifiers: the last one is the noun if it is tagged so
    return s.pos(j) in ("NOUN", "PROPN") or (several and s.low(j - 1) not in JOINS)


def _verb_inside(s: Sentence, first: int, i: int, opened: bool, named: bool) -> bool:
    """A word tagged as a verb is a modifier ("the flickering candle"), part of a name, or a noun read wrongly."""
    unit, following = s[i], s.nominal(i + 1) or s.low(i + 1) in JOINED
    participle = unit.tag in ("VBN", "VBG") or unit.low.endswith(("ed", "ing"))
    if named:
        return unit.low in JOINED and following and opened
    if i == first:
        return opened or (participle and following and unit.tag != "VBD" and unit.low not in WEAR and not _acts(s, i))
    if s.pos(i - 1) in ("NOUN", "PROPN"):  # a material or colour by its look, but it may be the noun
        if s.low(first - 1) in ("a", "an") and (unit.tag in ("VB", "VBP") or (not following and s.pos(i + 1) in ("", "CCONJ"))):
            return True
        return participle and unit.tag != "VBD" and following
    return following or not participle or unit.tag == "VBG"


def _acts(s: Sentence, i: int) -> bool:
    """A participle without an article that has a subject or an object, not a noun to describe."""
    return i > 0 and (s.pos(i - 1) in ("NOUN", "PROPN", "AUX", "VERB", "PRON") or s.low(i - 1) in JOINS)


def _is_posture(s: Sentence, start: int, i: int) -> bool:
    """A verb such as "lie" or "sails" that was taken for a noun: its subject before it, a place after it."""
    before, low = s[i - 1], s.low(i)
    if before.looks or not (s.pos(i + 1) in ("ADP", "ADV", "SCONJ") or s.closes(i + 1)) or before.low in ARTICLES:
        return False
    alone = s.low(start) in ("a", "an")
    if alone and s[i].tag == "NNS" and s.plain(i - 1):
        return True
    if low in POSTURES:
        return s.low(start - 1) == "and" or (not alone and before.low.endswith("s"))
    return single(low) in POSTURES or low in ("flies", "perches")


def _heads(s: Sentence, i: int, only: bool) -> bool:
    """It can be the noun itself; ``only``: there is nothing else after the article."""
    unit = s[i]
    if unit.low in SIDES and i and s.looks(i - 1):
        return True
    if unit.low in JOINS or unit.mark or unit.pos in ("ADV", "PART"):
        return False
    if unit.pos in ("NOUN", "PROPN"):
        return not (s.low(i - 1) in BE and unit.low in LOOKS)  # "is gold"
    if unit.pos == "ADJ" and not unit.looks and s.low(i + 1) in POSTURES:
        return True
    if s.pos(i - 1) == "DET" or only:
        return unit.pos != "NUM" or not s.low(i + 1)
    return unit.pos in ("VERB", "X") or (unit.pos == "ADJ" and _in_noun_place(s, i))


def _in_noun_place(s: Sentence, i: int) -> bool:
    """An adjective by its tag, but articles and modifiers before it wait for a noun that does not come."""
    start = s.described_from[i]
    return start < i and s.low(start - 1) in ARTICLES


def _name_start(s: Sentence, first: int, end: int) -> int:
    """Where the noun's own name starts: compounds are part of it."""
    i = end - 1
    while i > first and (_is_name(s, i - 1, end) or _is_compound(s, first, i - 1)):
        i -= 1
    return i


def _is_name(s: Sentence, i: int, end: int) -> bool:
    """A name of the lexicon starts here, inside the phrase."""
    for size in (3, 2):
        words = [s.low(j) for j in range(i, min(i + size, end))]
        if (*words[:-1], single(words[-1])) in NAMES or tuple(words) in NAMES:
            return True
    return False


def _is_compound(s: Sentence, first: int, i: int) -> bool:
    """Unit i and the noun after it are one name: "street lamp", but not "glass lamp"."""
    unit = s[i]
    if unit.tag == "POS":
        return True
    if unit.pos not in ("NOUN", "PROPN", "X") and unit.tag not in ("VB", "VBP"):
        return False
    described = unit.low.endswith("ing") and unit.low not in THINGS and (i - 1 < first or s.looks(i - 1))
    joined = unit.low in JOINS or unit.low in ("style", "styled") or unit.low in JOINED
    return not (described or unit.looks or joined or paired(s, i - 1, i))
