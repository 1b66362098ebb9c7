"""What a prompt says about what: its noun phrases, and every modifier with the noun that it belongs to.

spaCy's small model gives each word's part of speech; the rest is rules over the words, because its trees are often wrong on prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..nouns import english
from .lexicon import (
    ANIMATE,
    COLOURS,
    JOINED,
    LOOKS,
    MATERIALS,
    MEDIA,
    NAMES,
    PAIRED,
    PAIRS,
    PATTERNS,
    POSTURES,
    ROOMS,
    SHADES,
    STYLES,
    THINGS,
    TINTS,
    WEARABLE,
    WHICH,
)

_ARTICLES = {"a", "an", "the"}
_BE = {"is", "are", "was", "were", "be", "being", "been", "'s", "’s"}
_WEAR = {"wear", "wears", "wearing", "wore", "hold", "holds", "holding", "held", "carry", "carries", "carrying", "carried"}
_WEAR |= {"sport", "sports", "sporting", "clutching", "has", "have", "having"}
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
_JOINS = {"and", "or", "&", ","}
_SIDES = {"back", "front", "top", "side"}
_FRUITS = {"orange", "plum", "peach", "olive", "lime", "rose", "salmon", "coral", "cream"}
_WHO = {"who", "which", "that", "whose"}


@dataclass(frozen=True)
class Unit:
    """A word of the text (hyphens do not part it), or a mark: where it is, and spaCy's tags."""

    text: str
    start: int
    end: int
    pos: str
    tag: str

    @property
    def low(self) -> str:
        return self.text.lower()

    @property
    def nominal(self) -> bool:
        """It may be, or stand before, a noun."""
        return self.pos in ("NOUN", "PROPN", "ADJ", "NUM") or self.looks

    @property
    def looks(self) -> bool:
        """It says what something looks like, whatever its tag."""
        parts = self.low.split("-")
        if len(parts) == 1:
            return self.low in LOOKS
        last = parts[-1]
        return last in LOOKS or last in JOINED or last in ("style", "like") or last.endswith(("ed", "ing"))

    @property
    def mark(self) -> bool:
        return not any(map(str.isalnum, self.text))


@dataclass
class Noun:
    """A noun phrase: its units, its name (compounds included) and its modifiers, each a tuple of units.

    ``links`` are commas and “and” between modifiers: shown when every modifier that they need is.
    """

    start: int
    end: int
    name: range
    modifiers: list[tuple[int, ...]] = field(default_factory=list)
    links: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Detail:
    """A modifier: the units that say it, and the nouns (by index) that it is about."""

    units: tuple[int, ...]
    nouns: tuple[int, ...]


@dataclass
class Reading:
    """A text as units, noun phrases and details; ``needs`` lists the details without which a unit is not shown."""

    units: list[Unit]
    nouns: list[Noun]
    details: list[Detail] = field(default_factory=list)
    needs: dict[int, set[int]] = field(default_factory=dict)


def units_of(text: str) -> list[Unit]:
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
    return out


def _single(word: str) -> str:
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


class _Reader:
    """Reads one text; ``self.units`` never changes, the rest is filled in turn."""

    def __init__(self, units: list[Unit]) -> None:
        self.units = units
        self.nouns: list[Noun] = []
        self.details: list[Detail] = []
        self.needs: dict[int, set[int]] = {}
        self.kept: set[int] = set()  # nouns whose modifiers are about the whole picture or part of a longer detail

    def low(self, i: int) -> str:
        return self.units[i].low if 0 <= i < len(self.units) else ""

    def pos(self, i: int) -> str:
        return self.units[i].pos if 0 <= i < len(self.units) else ""

    def nominal(self, i: int) -> bool:
        return 0 <= i < len(self.units) and self.units[i].nominal and not self.closes(i)

    def closes(self, i: int) -> bool:
        """No noun phrase goes on here: "next to", "in front of", "left of" and the like."""
        if (self.low(i), self.low(i + 1)) == ("side", "by"):
            return True
        if self.low(i) in ("left", "right") and self.low(i + 1) == "of":
            return self.low(i - 1) not in ("the", "its", "their")
        return self.low(i) in ("next", "close", "near", "adjacent", "full") and self.low(i + 1) in ("to", "of")

    # --- noun phrases -----------------------------------------------------------------------------------------------

    def opens(self, i: int) -> bool:
        """An article, a number, a possessive: it can only stand before a noun."""
        unit = self.units[i]
        if unit.low in _WHO:
            return False
        return unit.pos in ("DET", "NUM") or unit.tag in ("PRP$", "PDT") or (unit.low in WHICH and self.pos(i) != "NOUN")

    def find_nouns(self) -> None:
        i = 0
        while i < len(self.units):
            noun = self.noun_at(i)
            if noun:
                self.nouns.append(noun)
                i = noun.end
            else:
                i += 1

    def noun_at(self, start: int) -> Noun | None:
        """The noun phrase that starts here, if one does."""
        i = start
        while i < len(self.units) and self.opens(i) and not self.closes(i):
            i += 1
        first, opened = i, i > start
        while i < len(self.units) and self.goes_on(first, i, opened):
            i += 1
        if i - 1 > first and self.stands(start, i - 1):
            i -= 1
        while i > first and not self.heads(i - 1, opened and i - 1 == first):
            i -= 1
        verb = (
            not opened
            and self.units[start].tag == "NNS"
            and i - start > 1
            and (self.units[start + 1].looks or self.pos(start + 1) == "ADJ")
        )
        if i == first or verb:
            return None
        name = self.name_of(first, i)
        noun = Noun(start, i, range(name, i))
        self.group(noun, first, name)
        return noun

    def stands(self, start: int, i: int) -> bool:
        """A verb such as "lie" or "sails" that was taken for a noun: its subject before it, a place after it."""
        before, low = self.units[i - 1], self.low(i)
        if before.looks or not (self.pos(i + 1) in ("ADP", "ADV", "SCONJ") or self.closes(i + 1)) or before.low in _ARTICLES:
            return False
        if self.low(start) in ("a", "an") and self.units[i].tag == "NNS" and self.plain(i - 1):
            return True
        if low in POSTURES:
            return self.low(start - 1) == "and" or (self.low(start) not in ("a", "an") and before.low.endswith("s"))
        return _single(low) in POSTURES or low in ("flies", "perches")

    def tint(self, i: int) -> bool:
        """The first of two words for one colour, whatever its tag."""
        return self.low(i) in TINTS | SHADES and self.low(i + 1) in COLOURS

    def heads(self, i: int, only: bool) -> bool:
        """It can be the noun itself; ``only``: there is nothing else after the article."""
        unit = self.units[i]
        if unit.low in _SIDES and i and self.units[i - 1].looks:
            return True
        if unit.low in _JOINS or unit.mark or unit.pos in ("ADV", "PART"):
            return False
        after = self.low(i + 1)
        predicate = i and self.low(i - 1) in _BE and unit.low in LOOKS
        if unit.pos in ("NOUN", "PROPN"):
            return not predicate
        if unit.pos == "ADJ" and not unit.looks and self.low(i + 1) in POSTURES:
            return True
        if self.pos(i - 1) == "DET" or only:
            return unit.pos != "NUM" or not after
        return unit.pos in ("VERB", "X") or (unit.pos == "ADJ" and self.in_noun_place(i))

    def in_noun_place(self, i: int) -> bool:
        """An adjective by its tag, but articles and modifiers before it wait for a noun that does not come."""
        j = i - 1
        while j >= 0 and (self.units[j].looks or self.pos(j) == "ADJ"):
            j -= 1
        return j < i - 1 and j >= 0 and self.low(j) in _ARTICLES

    def goes_on(self, first: int, i: int, opened: bool) -> bool:
        """Unit i belongs to the noun phrase whose words start at ``first``."""
        unit, low = self.units[i], self.low(i)
        body = range(first, i)
        named = any(self.plain(j) for j in body)
        if self.closes(i) or low in _BE:
            return False
        if low in _JOINS:
            return bool(body) and not named and not self.complete(first, i) and self.joins(i)
        if unit.tag == "POS" and opened and self.pos(i - 1) == "PROPN" and self.units[i - 1].text[0].isupper():
            return self.low(first - 1) in ("a", "an")  # "a cubic Rubik's cube"
        if unit.mark or low in _ARTICLES or unit.tag == "POS":
            return False
        if low in _SIDES and body and self.units[i - 1].looks:
            return True
        adjective = i + 1 < len(self.units) and (self.pos(i + 1) == "ADJ" or self.units[i + 1].looks)
        if unit.tag == "NNS" and named and adjective and self.units[i - 1].tag != "NNS":
            return False  # a verb: "the clown juggles green balls"
        if self.tint(i) and not named:
            return True
        if unit.pos == "VERB" and not (unit.looks and self.nominal(i + 1)):
            return self.verb_inside(first, i, opened, named)
        if unit.nominal:
            if not (named and unit.pos == "ADJ") or low in JOINED:
                return True
            # An adjective after a noun: only inside a longer name or a two-word colour, "sky blue car"
            return self.nominal(i + 1)
        if unit.pos == "ADV":
            following = i + 1 < len(self.units) and (self.pos(i + 1) == "ADJ" or self.units[i + 1].looks or low.endswith("ly"))
            return following and not named and (self.nominal(i + 1) or self.units[i + 1].tag in ("VBN", "VBG", "VBD"))
        if unit.pos == "PART" or low == "of":
            return False
        return unit.tag in ("NN", "NNS", "NNP", "FW") or (unit.pos == "X")

    def plain(self, i: int) -> bool:
        """A noun that is not also the name of a colour, material or shape."""
        return (self.pos(i) in ("NOUN", "PROPN") and not self.units[i].looks) or (
            self.low(i) in _SIDES and self.units[i - 1].looks
        )

    def complete(self, first: int, end: int) -> bool:
        """What looks like modifiers has a noun at its end: "the glass marble", "a red orange"."""
        last, before = end - 1, self.low(end - 2)
        if end - first < 2 or self.pos(last) != "NOUN" or before in _JOINS:
            return False
        low = self.low(last)
        return low in MATERIALS - COLOURS or (low in _FRUITS and before in COLOURS - TINTS)

    def joins(self, i: int) -> bool:
        """A comma or “and” between two modifiers of one noun."""
        j = i + 1
        while self.low(j) in _JOINS:
            j += 1
        begin = j
        while j < len(self.units) and (
            self.units[j].looks
            or self.pos(j) in ("ADJ", "ADV")
            or self.units[j].tag in ("VBN", "VBG")
            or self.low(j) in TINTS | _JOINS
        ):
            if self.opens(j):
                return False
            j += 1
        if j == begin or j >= len(self.units) or self.closes(j):
            # all of them look like modifiers: the last one is the noun if it is tagged so
            return j - begin >= 2 and self.pos(j - 1) == "NOUN"
        return self.pos(j) in ("NOUN", "PROPN") or (
            self.low(j - 1) not in _JOINS and self.pos(j - 1) == "NOUN" and j - begin >= 2
        )

    def verb_inside(self, first: int, i: int, opened: bool, named: bool) -> bool:
        """A word tagged as a verb is a modifier ("the flickering candle"), part of a name, or a noun read wrongly."""
        unit, following = self.units[i], self.nominal(i + 1) or self.low(i + 1) in JOINED
        participle = unit.tag in ("VBN", "VBG") or unit.low.endswith(("ed", "ing"))
        if named:
            return unit.low in JOINED and following and opened
        body = range(first, i)
        if not body:
            if not opened:
                return participle and following and unit.tag != "VBD" and unit.low not in _WEAR and not self.acts(i)
            return True
        if self.pos(i - 1) in ("NOUN", "PROPN"):  # a material or colour by its look, but it may be the noun
            if self.low(first - 1) in ("a", "an") and (
                unit.tag in ("VB", "VBP") or (not following and self.pos(i + 1) in ("", "CCONJ"))
            ):
                return True
            return participle and unit.tag != "VBD" and following
        return following or not participle or unit.tag == "VBG"

    def acts(self, i: int) -> bool:
        """A participle without an article that has a subject or an object, not a noun to describe."""
        return i > 0 and (self.pos(i - 1) in ("NOUN", "PROPN", "AUX", "VERB", "PRON") or self.low(i - 1) in _JOINS)

    def name_of(self, first: int, end: int) -> int:
        """Where the noun's own name starts: compounds are part of it."""
        i = end - 1
        while i > first:
            for size in (3, 2):
                words = [self.low(j) for j in range(i - 1, min(i - 1 + size, end))]
                if (*words[:-1], _single(words[-1])) in NAMES or tuple(words) in NAMES:
                    break
            else:
                before = self.units[i - 1]
                if before.tag == "POS":
                    i -= 1
                    continue
                if before.pos not in ("NOUN", "PROPN", "X") and before.tag not in ("VB", "VBP"):
                    return i
                described = (
                    before.low.endswith("ing") and before.low not in THINGS and (i - 2 < first or self.units[i - 2].looks)
                )
                if (
                    described
                    or before.looks
                    or before.low in _JOINS
                    or before.low in ("style", "styled")
                    or before.low in JOINED
                ):
                    return i
                if self.paired(i - 2, i - 1):
                    return i
            i -= 1
        return i

    def paired(self, i: int, j: int) -> bool:
        return i >= 0 and (self.low(i), self.low(j)) in PAIRS

    # --- modifiers before a noun ------------------------------------------------------------------------------------

    def group(self, noun: Noun, first: int, name: int) -> None:
        """Cut the units before the name into modifiers."""
        i = first
        parts: list[list[int]] = []
        while i < name:
            if self.low(i) in _JOINS:
                parts.append([i])
                i += 1
                continue
            end = self.modifier_end(i, name)
            parts.append(list(range(i, end)))
            i = end
        parts = self.join_colours(parts)
        words = [p for p in parts if self.low(p[0]) not in _JOINS]
        noun.modifiers = [tuple(p) for p in words if not self.counts(p)]
        at = -1
        for part in parts:
            if part in words:
                at += part in [list(m) for m in noun.modifiers]
            else:
                noun.links[part[0]] = [k for k in (at, at + 1) if 0 <= k < len(noun.modifiers)]

    def counts(self, part: Sequence[int]) -> bool:
        return all(self.units[i].pos == "NUM" or self.low(i) in WHICH for i in part)

    def modifier_end(self, i: int, name: int) -> int:
        """One past the last unit of the modifier that starts at i."""
        end = i + 1
        for j in range(i + 1, name):  # "oil painting style", "Van Gogh style"
            if self.low(j) in ("style", "styled") and self.style_start(i, j) == i:
                return j + 1
            if self.low(j) in _JOINS:
                break
        if self.pos(i) == "ADV" and end < name and self.low(end) not in _JOINS:
            return self.modifier_end(end, name)
        if self.paired(i, end) and end < name:
            return end + 1
        if end < name and self.low(end) in JOINED:
            return end + 1
        colour = end < name and (self.low(end) in COLOURS or self.low(end).split("-")[-1] in COLOURS)
        if (
            colour
            and self.low(i) in SHADES | TINTS
            and not (self.low(i) in COLOURS and self.low(end) not in COLOURS - MATERIALS)
        ):
            after = end + 1
            return after + 1 if after < name and self.low(after) in JOINED else after
        if end < name and self.low(i) in SHADES and self.low(end) in TINTS and self.low(end + 1) in COLOURS and end + 1 < name:
            return end + 2
        return end

    def style_start(self, first: int, style: int) -> int:
        """Where the name of a style starts that ends just before ``style``."""
        if style - 2 >= first and (self.low(style - 2), self.low(style - 1)) in STYLES:
            return style - 2
        i = style - 1
        while i > first and self.units[i].pos == "PROPN" and self.units[i - 1].pos == "PROPN" and not self.units[i - 1].looks:
            i -= 1
        return i

    def join_colours(self, parts: list[list[int]]) -> list[list[int]]:
        """Colours or materials with “and” between them are one modifier, with the pattern after them: "red and white striped"."""

        def kind(part: Sequence[int]) -> str:
            last = self.low(part[-1]).split("-")[-1]
            return "colour" if last in COLOURS else "material" if last in MATERIALS else ""

        out: list[list[int]] = []
        i = 0
        while i < len(parts):
            j, joined = i, False
            while kind(parts[i]) and j + 1 < len(parts):
                k = j + 1
                while k < len(parts) and self.low(parts[k][0]) in _JOINS:
                    k += 1
                linked = k > j + 1
                later = any(self.low(p[0]) in ("and", "&") for p in parts[k : k + 2])
                if k >= len(parts) or kind(parts[k]) != kind(parts[i]) or not (linked or later):
                    break
                joined = joined or any(self.low(parts[m][0]) in ("and", "or", "&") for m in range(j + 1, k))
                j = k
            if joined:
                if j + 1 < len(parts) and self.low(parts[j + 1][0]) in PATTERNS and len(parts[j + 1]) == 1:
                    j += 1
                out.append([u for part in parts[i : j + 1] for u in part])
            else:
                j = i
                out.append(parts[i])
            i = j + 1
        return out

    # --- phrases after a noun ---------------------------------------------------------------------------------------

    def ending(self, end: int) -> int | None:
        """The noun phrase that ends just before unit ``end``."""
        return next((k for k, noun in enumerate(self.nouns) if noun.end == end), None)

    def starting(self, start: int) -> int | None:
        return next((k for k, noun in enumerate(self.nouns) if noun.start == start), None)

    def head(self, k: int) -> str:
        return self.low(self.nouns[k].end - 1)

    def is_any(self, k: int, words: frozenset[str]) -> bool:
        word = self.head(k)
        return word in words or _single(word) in words or word.split("-")[-1] in words

    def add(self, units: Sequence[int], nouns: Sequence[int], links: Sequence[int] = ()) -> None:
        number = len(self.details)
        self.details.append(Detail(tuple(units), tuple(nouns)))
        for i in (*units, *links):
            self.needs.setdefault(i, set()).add(number)

    def owner(self, k: int, who: bool) -> int:
        """The noun that a phrase after noun k is about: not "mat" in "a cat on a mat wearing a hat"."""
        if not who or self.is_any(k, ANIMATE):
            return k
        j = k
        while j > 0 and self.pos(self.nouns[j].start - 1) == "ADP" and self.nouns[j - 1].end <= self.nouns[j].start - 1:
            j -= 1
            if self.is_any(j, ANIMATE):
                return j
        return k

    def both(self, k: int, first: int, things: Sequence[int]) -> tuple[int, ...]:
        """Two who share what follows: "a man and a woman wearing hats"."""
        plural = all(
            self.units[self.nouns[t].end - 1].tag == "NNS" and self.nouns[t].name[0] == self.nouns[t].start for t in things
        )
        if not plural or any(self.is_any(t, PAIRED) for t in things) or not k:
            return (k,)
        noun, before = self.nouns[k], self.nouns[k - 1]
        together = self.low(noun.start - 1) == "and" and before.end == noun.start - 1
        animate = self.is_any(k, ANIMATE) and self.is_any(k - 1, ANIMATE)
        return (k - 1, k) if together and animate and first == noun.end else (k,)

    def listed(self, k: int, owner: int, verb: str) -> list[int]:
        """Noun k and those that are listed with it: "a hat, a scarf and glasses"."""
        out = [k]
        while True:
            after = self.nouns[out[-1]].end
            while self.low(after) in _JOINS:
                after += 1
            following = self.starting(after)
            if after == self.nouns[out[-1]].end or following is None:
                return out
            part = self.is_any(following, WEARABLE) or (self.is_any(owner, ROOMS) and verb == "with")
            ends = self.nouns[following].end
            taken = self.low(ends) in _WEAR | _BE | {"with"} or self.pos(ends) in ("VERB", "AUX")
            if not part or self.is_any(following, ANIMATE) or (taken and self.is_any(k, ANIMATE)):
                return out
            out.append(following)

    def modified(self, things: Sequence[int]) -> bool:
        return any(self.nouns[t].modifiers for t in things)

    def phrase_end(self, things: Sequence[int]) -> int:
        """One past the phrase: "on its head" and "of flowers" go with the last thing."""
        end = self.nouns[things[-1]].end
        while True:
            k = self.starting(end + 1)
            own = k is not None and self.units[self.nouns[k].start].tag == "PRP$" and self.pos(end) == "ADP"
            if k is None or self.nouns[k].modifiers or not (own or self.low(end) == "of"):
                return end
            end = self.nouns[k].end

    def things_after(self, i: int) -> int | None:
        """The noun phrase that starts at i, also after one preposition ("dressed in")."""
        k = self.starting(i)
        return self.starting(i + 1) if k is None and self.low(i) in _PLACED else k

    def accessories(self) -> None:
        """Phrases with “with”, “wearing”, “holding”, “in” clothes, “made of”: one detail each, if nothing in them is modified.

        If something is, the phrase stays and its noun is a subject of its own, as in the paper.
        """
        last: tuple[int, int, int | None] | None = None  # owner, end and detail of the phrase before
        for i, unit in enumerate(self.units):
            low = unit.low
            if i in self.needs or not (low in _WEAR or low in _DRESSED or low in ("with", "in", "of", "featuring")):
                continue
            begin, k = i, self.ending(i)
            link: list[int] = []
            if k is None and last and self.low(i - 1) in ("and", ",") and last[1] == i - 1 and low not in ("of", "in"):
                k, link = last[0], [i - 1]
            elif k is None and low not in ("with", "in", "of"):
                begin = i - 1 if self.low(i - 1) in _BE else i
                k = self.ending(begin)
            if k is None and self.low(begin - 1) == ",":
                k, link = self.ending(begin - 1), [begin - 1]
            item = self.things_after(i + 1)
            if k is None or item is None or (low == "sports" and unit.pos != "VERB") or k in self.kept:
                continue
            if low == "in" and not (self.is_any(item, WEARABLE) and self.is_any(self.owner(k, True), ANIMATE)):
                continue
            made = low == "of" or (low in ("made", "crafted") and self.low(i + 1) in ("of", "from", "out"))
            if low == "of" and not (self.head(item) in MATERIALS and self.nouns[item].name[0] != self.nouns[item].end):
                continue
            if low == "of" and self.nouns[item].start != self.nouns[item].name[0] and not self.nouns[item].modifiers:
                continue
            if self.object_of_verb(i, k, low):
                continue
            owner = self.owner(k, low in _WEAR or low in ("dressed", "clad", "in"))
            things = [item] if made else self.listed(item, owner, low)
            end = self.phrase_end(things)
            more = self.starting(end + 1) if self.low(end) == "of" else None
            if (self.modified(things) or (more is not None and self.nouns[more].modifiers)) and not made:
                last = (owner, end, None)
                continue
            self.kept |= set(things) if made else set()
            if link and self.low(link[0]) == "," and self.low(end) == ",":
                link.append(end)
            owners = self.both(owner, begin, things)
            if last and link and self.low(link[0]) == "and" and last[2] is not None:
                self.needs.setdefault(link[0], set()).add(last[2])
            last = (owner, end, len(self.details))
            self.add(range(begin, end), owners, link)

    def object_of_verb(self, i: int, k: int, low: str) -> bool:
        """ "feeds the birds with bread": the phrase is about the verb."""
        before = self.nouns[k].start - 1
        if low != "with" or before < 0 or self.units[before].tag not in ("VBZ", "VBD", "VBP"):
            return False
        return not self.is_any(k, ANIMATE) and self.low(before) not in _WEAR

    def clauses(self) -> None:
        """Relative clauses ("who is riding a bike") and what is said with “is” ("the apple is red")."""
        for i, unit in enumerate(self.units):
            if unit.low in _WHO and i not in self.needs:
                comma = self.low(i - 1) == ","
                k = self.ending(i - 1 if comma else i)
                if k is None or unit.pos == "SCONJ":
                    continue
                end = self.clause_end(i)
                inside = [n for n, noun in enumerate(self.nouns) if i < noun.start < end]
                if self.modified(inside) or end <= i + 1:
                    continue
                links = [i - 1, end] if comma and self.low(end) == "," else [i - 1] if comma else []
                if not any(u in self.needs for u in range(i, end)):
                    self.add(range(i, end), (self.owner(k, unit.low == "who"),), links)
            elif unit.low in _BE and i not in self.needs:
                self.predicate(i)

    def clause_end(self, i: int) -> int:
        """One past a relative clause: at a comma, a stop, a second verb, or “and” with a new thing."""
        verbs, j = 0, i + 1
        while j < len(self.units):
            unit = self.units[j]
            if unit.mark or unit.low in ("while", "as"):
                return j
            if unit.low in ("and", "or") and verbs:
                k = self.starting(j + 1)
                if k is not None and not self.is_any(k, WEARABLE):
                    return j
            inside = any(noun.start <= j < noun.end for noun in self.nouns)
            if not inside and (unit.tag in ("VBZ", "VBP", "VBD", "MD") or unit.low in _BE):
                auxiliary = self.pos(j - 1) == "AUX" or self.low(j - 1) in ("and", "or") or self.low(j - 1) == "to"
                if verbs and not auxiliary:
                    return j
                verbs += 1
            j += 1
        return j

    def predicate(self, i: int) -> None:
        k = self.ending(i)
        if k is None or k in self.kept:
            return
        while k > 0 and self.pos(self.nouns[k].start - 1) == "ADP" and self.nouns[k - 1].end == self.nouns[k].start - 1:
            k -= 1
        j = i + 1
        while j < len(self.units) and (self.pos(j) in ("ADJ", "ADV") or self.units[j].looks or self.low(j) in ("and", ",")):
            if any(noun.start <= j < noun.end for noun in self.nouns) or self.closes(j):
                break
            j += 1
        while j > i + 1 and (self.low(j - 1) in ("and", ",") or self.pos(j - 1) == "ADV"):
            j -= 1
        described = any(self.pos(u) == "ADJ" or self.units[u].looks for u in range(i + 1, j))
        clear = j >= len(self.units) or (
            self.pos(j) not in ("NOUN", "PROPN", "PART") and self.low(j) not in ("to", "of", "than", "from")
        )
        if described and clear and not any(u in self.needs for u in range(i, j)):
            self.add(range(i, j), (k,))

    def after_commas(self) -> None:
        """Adjectives set off behind their noun: "a cat, black and fluffy, sits"."""
        for k, noun in enumerate(self.nouns):
            j = noun.end
            if self.low(j) != ",":
                continue
            end = j + 1
            while end < len(self.units) and (
                self.pos(end) in ("ADJ", "ADV") or self.units[end].looks or self.low(end) == "and"
            ):
                end += 1
            words = range(j + 1, end)
            inside = any(n.start < end and n.end > j + 1 for n in self.nouns)
            stop = end >= len(self.units) or self.units[end].mark
            if words and not inside and stop and any(self.units[u].looks for u in words) and not self.media(words):
                self.add(words, (k,), [j, end] if self.low(end) == "," else [j])

    # --- styles -----------------------------------------------------------------------------------------------------

    def media(self, words: Sequence[int]) -> bool:
        return any(self.low(u) in MEDIA for u in words)

    def styles(self) -> None:
        """ "in the style of …", "in … style": about the noun before it, or the whole picture if it ends the prompt."""
        found: list[tuple[int, int]] = []
        for i in range(len(self.units)):
            k = self.starting(i + 1) if self.low(i) == "in" else None
            if k is None:
                continue
            end = self.nouns[k].end
            if self.low(end) == "of" and self.head(k) in (
                "style",
                "manner",
                "shades",
                "shape",
                "form",
                "color",
                "colour",
                "colors",
            ):
                last = self.starting(end + 1)
                if last is None:
                    continue
                members = [k, last]
                while self.head(k) == "shades" and self.low(self.nouns[members[-1]].end) in _JOINS:
                    at = self.nouns[members[-1]].end
                    while self.low(at) in _JOINS:
                        at += 1
                    more = self.starting(at)
                    if more is None or self.head(more) not in COLOURS:
                        break
                    members.append(more)
                end = self.nouns[members[-1]].end
                self.kept |= set(members)
            elif self.head(k) == "style":
                self.kept.add(k)
            else:
                continue
            found.append((i, end))
        subjects = [k for k in range(len(self.nouns)) if k not in self.kept]
        for i, end in found:
            comma = self.low(i - 1) == ","
            k = self.ending(i)
            last = all(unit.mark for unit in self.units[end:]) and not self.low(i + 1).startswith("shade")
            shades = any(self.low(u) in ("shades", "color", "colour", "shape", "colors") for u in range(i, min(end, i + 3)))
            whole = comma or k is None or (last and len(found) == 1 and len(subjects) > 1)
            if k is not None and (shades or not whole):
                self.add(range(i, end), (k,))

    def tags(self) -> None:
        """Parts after a comma such as "highly detailed", "soft lighting": about the whole picture, so they stay."""
        starts = [i + 1 for i, unit in enumerate(self.units) if unit.low == ","]
        for start in starts:
            end = start
            while end < len(self.units) and not self.units[end].mark:
                end += 1
            words = self.units[start:end]
            verbs = any(unit.tag in ("VBZ", "VBP", "MD") for unit in words) or any(unit.low in _ARTICLES for unit in words)
            if words and not verbs and words[-1].low in MEDIA:
                self.kept |= {k for k, noun in enumerate(self.nouns) if start <= noun.start < end}

    # --- all ----------------------------------------------------------------------------------------------------------

    def read(self) -> Reading:
        self.find_nouns()
        self.tags()
        self.styles()
        self.after_commas()
        self.clauses()
        self.accessories()
        for k, noun in enumerate(self.nouns):
            if k in self.kept or any(i in self.needs for i in range(noun.start, noun.end)):
                continue
            first = len(self.details)
            for modifier in noun.modifiers:
                self.add(modifier, (k,))
            for i, near in noun.links.items():
                self.needs.setdefault(i, set()).update(first + m for m in near)
        return self.sorted()

    def sorted(self) -> Reading:
        """Details in the order of the text."""
        order = sorted(range(len(self.details)), key=lambda d: self.details[d].units[0])
        place = {old: new for new, old in enumerate(order)}
        needs = {i: {place[d] for d in ds} for i, ds in self.needs.items()}
        return Reading(self.units, self.nouns, [self.details[d] for d in order], needs)


def read(text: str) -> Reading:
    """What a plain text (no weights, no escapes) says about what.

    Raises:
        RuntimeError: when spaCy or its English model is not installed.
    """
    return _Reader(units_of(text)).read()


def shown(reading: Reading, details: set[int]) -> Iterator[int]:
    """The units of the text with only these details in it, in order."""
    for i in range(len(reading.units)):
        if reading.needs.get(i, set()) <= details:
            yield i
