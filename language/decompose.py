"""A prompt taken apart into branches: a base for the layout, and sub-prompts that each add details (Detail++, arXiv 2507.17853).

The paper's P = {p0, p1, …, pn}: p0 is the prompt, p1 has no modifiers, p2 … pn are p1 with one more detail each; Q are the nouns that
these details are about.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .branches import Branch, Branches, Subject
from .text import starts_of, weighted_text, word_keys
from .writing import Piece, Text, occurrence_of, phrase_of, pieces_of, read_prompt, write

GRANULARITIES = ("subject", "attribute")
ORDERS = ("complex first", "simple first")
SORTS = ("as written", "short first", "long first")
LONGEST = 4_000  # characters of a prompt
LONGEST_MANUAL = 20_000  # characters of all lines
MOST = 100  # branches

# Words that say nothing themselves: “with a hat” is as long as “red”.
_SMALL = re.compile(
    r"a|an|the|with|wearing|holding|carrying|in|of|and|or|is|are|was|were|that|who|which|style|made|on|its|his|her|their|has|have|,"
)


def order_of(order: str, remove_then_add: bool) -> str:
    """The order that Decompose Prompt's two inputs ask for: remove_then_add was the way to p0 as the base before order was."""
    return "complex first" if remove_then_add and order in ORDERS else order


def decompose(
    text: str,
    granularity: str = "attribute",
    order: str = "complex first",
    sort: str = "as written",
    manual: str = "",
    check: Callable[[], None] = lambda: None,
) -> Branches:
    """Take a prompt apart.

    The paper's configurations A and B are (subject, complex first) and (attribute, complex first), C and D the same with simple first
    (appendix 6). What is said of the whole picture (“…, oil painting, highly detailed”) stays in every branch.

    Args:
        text: the prompt, with ComfyUI's weights, escapes and embeddings; they are kept in the branches.
        granularity: “attribute”: a branch for every detail; “subject”: one for all details of a noun.
        order: “complex first”: p0 is the base and p1, on the whole picture, is branch 1; “simple first”: p1 is the base. The branches
            after them add details.
        sort: the details as they stand in the prompt, those of fewer words first, or those of more.
        manual: lines “subject | sub-prompt”, in place of the parser. “*” is the whole picture; “car #2” the second “car".
            Granularity and sort do not matter then. With simple first a first line with “*” is the base.
        check: called between branches, so that it can stop the work by raising.

    Raises:
        ValueError: for an empty or too long prompt, too many branches, an unknown choice, or a line that cannot be read.
        RuntimeError: when spaCy or its English model is not installed and there are no lines.
    """
    for name, value, choices in (("granularity", granularity, GRANULARITIES), ("order", order, ORDERS), ("sort", sort, SORTS)):
        if value not in choices:
            raise ValueError(f"unknown {name} “{value}”: choose {' or '.join(choices)}")
    if len(text) > LONGEST:
        raise ValueError(f"the prompt has {len(text)} characters; at most {LONGEST} are taken apart: shorten it")
    if len(manual) > LONGEST_MANUAL:
        raise ValueError(f"manual has {len(manual)} characters; at most {LONGEST_MANUAL} are read: shorten it")
    if not word_keys(weighted_text(text)[0]):
        raise ValueError("the prompt is empty: write the text that is to be taken apart")
    if manual.strip():
        return _by_hand(text, manual, order)
    check()
    try:
        whole = read_prompt(text)
    except RuntimeError as error:
        raise RuntimeError(f"{error}, as lines “subject | sub-prompt” in manual") from error
    groups = _groups(whole, granularity, sort)
    if not groups:
        return Branches(text, (Branch(text),))
    simple = pieces_of(whole, set())
    if order == "complex first":
        base, branches = pieces_of(whole, set(range(len(whole.reading.details)))), [Branch(text), Branch(write(simple))]
    else:
        base, branches = simple, [Branch(write(simple))]
    for members in groups:
        check()
        branches.append(_branch(whole, base, members))
    return Branches(text, tuple(branches))


def _groups(whole: Text, granularity: str, sort: str) -> list[list[int]]:
    """The details of each branch."""
    details = whole.reading.details
    groups: dict[tuple[int, ...], list[int]] = {}
    for d, detail in enumerate(details):
        groups.setdefault(detail.nouns if granularity == "subject" else (d,), []).append(d)
    if len(groups) > MOST:
        fewer = "choose the granularity subject, or shorten it" if granularity == "attribute" else "shorten it"
        raise ValueError(f"the prompt would make {len(groups)} branches with details, and at most {MOST} are made: {fewer}")
    sign = {"as written": 0, "short first": 1, "long first": -1}[sort]
    return sorted(groups.values(), key=lambda members: sign * sum(_length(phrase_of(whole, details[d].units)) for d in members))


def _length(text: str) -> int:
    """How many words of a detail say something."""
    return sum(not _SMALL.fullmatch(word) for word in re.findall(r"[^\W_]+(?:-[^\W_]+)*|,", text.lower()))


def _branch(whole: Text, base: list[Piece], members: list[int]) -> Branch:
    """The sub-prompt with these details, which are about the same nouns."""
    details, nouns = whole.reading.details, whole.reading.nouns
    pieces = pieces_of(whole, set(members))
    subjects = []
    for name in (nouns[k].name for k in details[members[0]].nouns):
        phrase = phrase_of(whole, name)
        there = occurrence_of(base, name[0], phrase)
        subjects.append(Subject(phrase, occurrence_of(pieces, name[0], phrase) or 0, there))
    return Branch(write(pieces), tuple(subjects), tuple(phrase_of(whole, details[d].units) for d in members))


def _by_hand(text: str, manual: str, order: str) -> Branches:
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
    if len(lines) > MOST:
        raise ValueError(f"manual has {len(lines)} lines, and at most {MOST} branches are made: write fewer")
    base = lines.pop(0)[2] if order == "simple first" and lines[0][1] == "*" else text
    plain = word_keys(weighted_text(base)[0])
    branches = [Branch(base)]
    for number, names, prompt in lines:
        own = word_keys(weighted_text(prompt)[0])
        subjects = []
        for name in [] if names == "*" else re.split("[,，、]", names):
            phrase, occurrence = _numbered(name.strip())
            wanted = word_keys(phrase)
            if occurrence >= len(starts_of(wanted, own)):
                words = ", ".join(dict.fromkeys(own))
                raise ValueError(
                    f"line {number} of manual: “{name.strip()}” is not in its sub-prompt “{prompt}”. Write it as it stands there; it has "
                    f"these words: {words}"
                )
            there = occurrence < len(starts_of(wanted, plain))
            subjects.append(Subject(phrase, occurrence, occurrence if there else None))
        branches.append(Branch(prompt, tuple(subjects)))
    return Branches(text, tuple(branches))


def _numbered(name: str) -> tuple[str, int]:
    """“car #2” is the second car."""
    found = re.fullmatch(r"(.*\S)\s*#([1-9]\d{0,5})", name)
    return (found.group(1), int(found.group(2)) - 1) if found else (name, 0)
