"""Branches of a prompt as conditionings that know where their subjects are looked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...language.branches import Branch, Branches
from ...language.words import prompt_words
from .branches import BRANCH, Columns, EncodedBranch, SubjectColumns


def _occurrences(clip: Any, text: str, phrase: str) -> list[Columns]:
    """Columns of every occurrence of a phrase in a prompt; none where it is not in it."""
    try:
        words = prompt_words(clip, text, phrase)
    except ValueError:
        return []
    found = words.phrases[0]
    size = len(found.text.split(" "))
    members = [w.columns for w in words.words if w.columns and set(w.columns) <= set(found.columns)]
    return [tuple(sorted(set().union(*members[i : i + size]))) for i in range(0, len(members), size)]


def _subjects(clip: Any, branches: Sequence[Branch], index: int) -> list[SubjectColumns]:
    """Where a branch's subjects stand in its prompt, in the base's, and in that of the branch before, if it has as many of these words.

    Raises:
        ValueError: for a subject that is not in its branch.
    """
    out = []
    for subject in branches[index].subjects:
        own = _occurrences(clip, branches[index].text, subject.text)
        if subject.occurrence >= len(own):
            raise ValueError(
                f"Encode Branches: “{subject.text}” is not in the branch “{branches[index].text}”; write it as it stands there."
            )
        base = _occurrences(clip, branches[0].text, subject.text)
        in_base = base[subject.base] if subject.base is not None and subject.base < len(base) else None
        before = _occurrences(clip, branches[index - 1].text, subject.text)
        in_before = in_base if index == 1 else before[subject.occurrence] if len(before) == len(own) else None
        out.append(SubjectColumns(own[subject.occurrence], in_base, in_before))
    return out


def encode(clip: Any, branches: Branches) -> list[Any]:
    """One conditioning per branch that knows its place (several with a schedule of hooks).

    Raises:
        ValueError: for no CLIP, a CLIP of another family, or a subject that is not in its branch.
    """
    if clip is None:
        raise ValueError("Encode Branches: there is no text encoder: this checkpoint has none, so load a CLIP on its own.")
    out = []
    parts = list(branches.branches)
    for index, branch in enumerate(parts):
        subjects = tuple(_subjects(clip, parts, index))
        name = ", ".join(subject.text for subject in branch.subjects)
        for context, options in clip.encode_from_tokens_scheduled(clip.tokenize(branch.text)):
            known = EncodedBranch(index, len(parts), context.shape[1], subjects, name)
            out.append([context, {**options, BRANCH: known}])
    return out
