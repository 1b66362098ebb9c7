"""A prompt taken apart into branches: a simple base, and sub-prompts that each add details to it (Detail++, arXiv 2507.17853).

The paper's P = {p0, p1, …, pn}: p0 is the prompt, p1 has no modifiers, p2 … pn are p1 with one more detail each; Q are the nouns that
these details are about.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .grammar.reading import Reading, read, shown
from .text import EMBEDDING, starts_of, weighted_text, without_embeddings, word_keys

GRANULARITIES = ("subject", "attribute")
ORDERS = ("simple first", "complex first")

_BY_VOWEL = {"a", "an"}
_SILENT = re.compile(r"(hour|honest|honou?r|heir|[fhlmnrsx](?=[A-Z\d-])|[FHLMNRSX][A-Z\d]+\b)")
_LIKE_YOU = re.compile(r"(eu|ew|one\b|once\b|ouija|uni(?!n|m)|us[aeiu]|ut[aeio]|ubiq|ukulele|uranium|urin|u\b)", re.IGNORECASE)
_SMALL = {
    "a",
    "an",
    "the",
    "with",
    "wearing",
    "holding",
    "carrying",
    "in",
    "of",
    "and",
    "or",
    "is",
    "are",
    "was",
    "were",
    "that",
}
_SMALL |= {"who", "which", "style", "made", "on", "its", "his", "her", "their", "has", "have", ","}


@dataclass(frozen=True)
class Subject:
    """A noun that a branch's details are about.

    Attributes:
        text: the noun as it stands in the branch, compounds included, without weights: “sports car”.
        occurrence: which occurrence of these words it is in the branch's own text, from 0.
        base: which one it is in branch 0's text; None if it is not there.
    """

    text: str
    occurrence: int = 0
    base: int | None = 0


@dataclass(frozen=True)
class Branch:
    """One sub-prompt.

    Attributes:
        text: for a text encoder, weights and escapes included.
        subjects: the nouns whose region the details go to; none: the whole picture.
        added: the details, as they stand in the prompt; none for p0 and p1, and for lines written by hand.
    """

    text: str
    subjects: tuple[Subject, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def subject(self) -> str | None:
        """The nouns, separated by commas as Prompt Words takes them; None: the whole picture."""
        return ", ".join(s.text for s in self.subjects) or None


@dataclass(frozen=True)
class Branches:
    """A prompt and its branches in the order of sampling (``ATTUNE_BRANCHES``): plain data.

    Attributes:
        prompt: p0, as it was written.
        branches: the first is the base, which gives the layout.
    """

    prompt: str
    branches: tuple[Branch, ...]

    @property
    def summary(self) -> str:
        """The base, then a line for each branch as manual takes it: “car | a red car and a bench”."""
        lines = [f"base: {self.branches[0].text}"]
        for branch in self.branches[1:]:
            lines.append(f"{', '.join(map(place, branch.subjects)) or '*'} | {' '.join(branch.text.split())}")
        return "\n".join(lines)


def place(subject: Subject) -> str:
    """A subject as manual takes it: the second car is “car #2”."""
    return subject.text if not subject.occurrence else f"{subject.text} #{subject.occurrence + 1}"


# --- text -----------------------------------------------------------------------------------------------------------


def _occurrences(text: str, phrase: str) -> list[int]:
    """Which words of a text start the phrase."""
    return starts_of(word_keys(phrase), word_keys(text))


def article(word: str) -> str:
    """“a” or “an”, as the word after it asks for by its sound."""
    vowel = word[:1].lower() in "aeio" or word[:1].lower() == "u" or bool(re.match(r"8|11\b|18\b", word))
    return "an" if (vowel and not _LIKE_YOU.match(word)) or _SILENT.match(word) else "a"


@dataclass(frozen=True)
class _Piece:
    """A stretch of a sub-prompt: its text, the space before it, its weight, and its unit (None: no word of the grammar's)."""

    text: str
    space: str
    weight: float
    unit: int


class _Text:
    """A prompt that can be written out with any of its details."""

    def __init__(self, prompt: str) -> None:
        self.plain, self.weights = weighted_text(prompt)
        # An embedding is no word of English: the grammar does not see it, and it stays in every branch.
        self.hidden = [m.span() for m in EMBEDDING.finditer(self.plain)]
        self.reading: Reading = read(without_embeddings(self.plain))
        spans = [(u.start, u.end, i) for i, u in enumerate(self.reading.units)] + [(a, b, -1) for a, b in self.hidden]
        self.spans = sorted(spans)

    def phrase(self, units: Iterable[int]) -> str:
        """Units as they stand in the prompt, without weights."""
        members = list(units)
        return self.plain[self.reading.units[members[0]].start : self.reading.units[members[-1]].end]

    def pieces(self, details: set[int]) -> list[_Piece]:
        visible = set(shown(self.reading, details))
        out: list[_Piece] = []
        gap, last, raised, dropped = "", 0, False, False
        for start, end, unit in self.spans:
            gap += self.plain[last:start]
            last = end
            if unit >= 0 and unit not in visible:
                first = not out or out[-1].text[-1:] in ".;!?"
                raised = raised or (
                    first and self.plain[start].isupper() and not any(p.isupper() for p in self.plain[start + 1 : end])
                )
                dropped = True
                continue
            text = self.plain[start:end]
            mark = unit >= 0 and self.reading.units[unit].mark
            if dropped:  # the gap is now made of several
                gap = "\n" if "\n" in gap else "" if mark and text not in '([{“"-–—&' else " " if gap else ""
            if mark and text == "," and (not out or out[-1].text in (",", ".", ";")) and dropped:
                gap, dropped = "", True
                continue
            if raised and not mark and dropped:
                text = text[:1].upper() + text[1:]
            out.append(_Piece(text, gap if out else "", self.weights[start], unit))
            gap, raised, dropped = "", False, False
        return self.articles(out)

    def articles(self, pieces: list[_Piece]) -> list[_Piece]:
        """Put “a” or “an” right where the word after it is not the one of the prompt."""
        out = list(pieces)
        for i, piece in enumerate(pieces[:-1]):
            after = pieces[i + 1]
            if piece.text.lower() in _BY_VOWEL and piece.unit >= 0 and after.unit != piece.unit + 1:
                word = article(after.text)
                out[i] = _Piece(word.capitalize() if piece.text[0].isupper() else word, piece.space, piece.weight, piece.unit)
        return out

    def write(self, pieces: list[_Piece]) -> str:
        """The pieces as a prompt: weights and escapes are put back."""
        out, i = "", 0
        while i < len(pieces):
            j = i
            while j < len(pieces) and pieces[j].weight == pieces[i].weight:
                j += 1
            run = "".join((p.space if n else "") + p.text for n, p in enumerate(pieces[i:j]))
            run = run.replace("(", "\\(").replace(")", "\\)")
            out += pieces[i].space + (run if pieces[i].weight == 1.0 else f"({run}:{pieces[i].weight:.4g})")
            i = j
        return out

    def place(self, pieces: list[_Piece], unit: int, phrase: str) -> int | None:
        """Which occurrence of the phrase starts at this unit; None if it is not there."""
        before = plain = ""
        for piece in pieces:
            if piece.unit == unit:
                before = plain + piece.space
            plain += piece.space + piece.text
        starts = _occurrences(plain, phrase)
        return starts.index(len(word_keys(before))) if len(word_keys(before)) in starts else None


# --- branches ---------------------------------------------------------------------------------------------------------


def _complexity(text: str) -> int:
    """How many words of a detail say something: “with a hat” as many as “red”."""
    return sum(word not in _SMALL for word in re.findall(r"[^\W_]+(?:-[^\W_]+)*|,", text.lower()))


def decompose(
    text: str, granularity: str = "attribute", order: str = "simple first", remove_then_add: bool = True, manual: str = ""
) -> Branches:
    """Take a prompt apart.

    “Remove then add” is the paper's way: the base is p0 itself, so that the layout is the whole prompt's; p1, on the whole picture,
    removes every modifier; the branches after it add details. Without it the base is p1. The paper's configurations A and B are
    (subject, complex first) and (attribute, complex first) with remove_then_add, C and D the same with simple first and without it.

    What is said of the whole picture (“…, oil painting, highly detailed”) stays in every branch.

    Args:
        text: the prompt, with ComfyUI's weights, escapes and embeddings; they are kept in the branches.
        granularity: “attribute”: a branch for every detail; “subject”: one for all details of a noun.
        order: details with fewer words first, or those with more; equal ones as they stand in the prompt.
        remove_then_add: the base is the whole prompt.
        manual: lines “subject | sub-prompt”, in place of the parser. “*” is the whole picture; “car #2” the second “car".
            Granularity and order do not matter then. Without remove_then_add a first line with “*” is the base.

    Raises:
        ValueError: for an empty prompt, an unknown granularity or order, or a line that cannot be read.
        RuntimeError: when spaCy or its English model is not installed and there are no lines.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"unknown granularity “{granularity}”: choose {' or '.join(GRANULARITIES)}")
    if order not in ORDERS:
        raise ValueError(f"unknown order “{order}”: choose {' or '.join(ORDERS)}")
    if not word_keys(weighted_text(text)[0]):
        raise ValueError("the prompt is empty: write the text that is to be taken apart")
    if manual.strip():
        return _by_hand(text, manual, remove_then_add)
    try:
        whole = _Text(text)
    except RuntimeError as error:
        raise RuntimeError(f"{error}, as lines “subject | sub-prompt” in manual") from error
    reading = whole.reading
    groups: dict[tuple[int, ...], list[int]] = {}
    for d, detail in enumerate(reading.details):
        groups.setdefault(detail.nouns if granularity == "subject" else (d,), []).append(d)
    base = whole.pieces(set(range(len(reading.details))) if remove_then_add else set())
    branches = [Branch(text if remove_then_add or not groups else whole.write(base))]
    if remove_then_add and groups:
        branches.append(Branch(whole.write(whole.pieces(set()))))

    def size(members: list[int]) -> int:
        return sum(_complexity(whole.phrase(reading.details[d].units)) for d in members)

    sign = 1 if order == "simple first" else -1
    for members in sorted(groups.values(), key=lambda members: sign * size(members)):
        pieces = whole.pieces(set(members))
        subjects = []
        for k in reading.details[members[0]].nouns:
            name = reading.nouns[k].name
            phrase = whole.phrase(name)
            subjects.append(Subject(phrase, whole.place(pieces, name[0], phrase) or 0, whole.place(base, name[0], phrase)))
        added = tuple(whole.phrase(reading.details[d].units) for d in members)
        branches.append(Branch(whole.write(pieces), tuple(subjects), added))
    return Branches(text, tuple(branches))


def _by_hand(text: str, manual: str, remove_then_add: bool) -> Branches:
    """Branches from lines “subject | sub-prompt”."""
    lines = []
    for number, line in enumerate(manual.splitlines(), 1):
        if line.strip():
            left, right = (*re.split(r"[|｜]", line, maxsplit=1), "")[:2]
            if not left.strip() or not right.strip():
                raise ValueError(
                    f"line {number} of manual, “{line.strip()}”, is not “subject | sub-prompt”: write “* | …” for the whole picture"
                )
            lines.append((number, left.strip(), right.strip()))
    base = text
    if not remove_then_add and lines[0][1] == "*":
        base = lines.pop(0)[2]
    plain = weighted_text(base)[0]
    branches = [Branch(base)]
    for number, names, prompt in lines:
        own = weighted_text(prompt)[0]
        subjects = []
        for name in [] if names == "*" else re.split("[,，、]", names):
            phrase, occurrence = _numbered(name.strip())
            places, there = _occurrences(own, phrase), _occurrences(plain, phrase)
            if occurrence >= len(places):
                words = ", ".join(dict.fromkeys(word_keys(own)))
                raise ValueError(
                    f"line {number} of manual: “{name.strip()}” is not in its sub-prompt “{prompt}”. Write it as it stands there; it has "
                    f"these words: {words}"
                )
            subjects.append(Subject(phrase, occurrence, occurrence if occurrence < len(there) else None))
        branches.append(Branch(prompt, tuple(subjects)))
    return Branches(text, tuple(branches))


def _numbered(name: str) -> tuple[str, int]:
    """“car #2” is the second car."""
    found = re.fullmatch(r"(.*\S)\s*#([1-9]\d*)", name)
    return (found.group(1), int(found.group(2)) - 1) if found else (name, 0)
