"""Branches of a prompt as conditionings that know where their subjects are looked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...language.branches import Branch, Branches
from ...language.words import prompt_words
from .branches import BRANCH, Columns, EncodedBranch, SubjectColumns


def _found(clip: Any, text: str, phrase: str) -> tuple[list[Columns], Columns]:
    """Columns of every occurrence of a phrase in a prompt, and those of the prompt itself; none where the phrase is not in it."""
    try:
        words = prompt_words(clip, text, phrase)
    except ValueError:
        return [], ()
    found = words.phrases[0]
    size = len(found.text.split(" "))
    members = [w.columns for w in words.words if w.columns and set(w.columns) <= set(found.columns)]
    return [tuple(sorted(set().union(*members[i : i + size]))) for i in range(0, len(members), size)], words.content


def encode(clip: Any, branches: Branches) -> list[Any]:
    """One conditioning per branch that knows where its subjects stand: in its prompt, in the base's, and in that of the branch before, if
    it has as many of these words (several conditionings with a schedule of hooks).

    Raises:
        ValueError: for no CLIP, a CLIP of another family, or a subject that is not in its branch.
    """
    if clip is None:
        raise ValueError("Encode Branches: there is no text encoder: this checkpoint has none, so load a CLIP on its own.")
    parts: Sequence[Branch] = branches.branches
    content: Columns = ()
    subjects: list[tuple[SubjectColumns, ...]] = []
    for index, branch in enumerate(parts):
        found = []
        for subject in branch.subjects:
            own, _ = _found(clip, branch.text, subject.text)
            if subject.occurrence >= len(own):
                raise ValueError(
                    f"Encode Branches: “{subject.text}” is not in the branch “{branch.text}”; write it as it stands there."
                )
            base, tokens = _found(clip, parts[0].text, subject.text)
            content = tokens or content
            in_base = base[subject.base] if subject.base is not None and subject.base < len(base) else None
            before, _ = _found(clip, parts[index - 1].text, subject.text)
            in_before = in_base if index == 1 else before[subject.occurrence] if len(before) == len(own) else None
            found.append(SubjectColumns(own[subject.occurrence], in_base, in_before))
        subjects.append(tuple(found))
    out = []
    for index, branch in enumerate(parts):
        name = ", ".join(subject.text for subject in branch.subjects)
        for context, options in clip.encode_from_tokens_scheduled(clip.tokenize(branch.text)):
            known = EncodedBranch(index, len(parts), context.shape[1], subjects[index], name, () if index else content)
            out.append([context, {**options, BRANCH: known}])
    return out
