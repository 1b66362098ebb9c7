"""Sub-prompts of Detail++ (arXiv 2507.17853) as plain data: what Decompose Prompt makes and the sampler draws."""

from __future__ import annotations

from dataclasses import dataclass


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

    @property
    def numbered(self) -> str:
        """As manual takes it: the second car is “car #2”."""
        return self.text if not self.occurrence else f"{self.text} #{self.occurrence + 1}"


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

    @property
    def line(self) -> tuple[str, str]:
        """Subject and sub-prompt as manual takes them: “car #2”, “a car and a red car”."""
        return ", ".join(s.numbered for s in self.subjects) or "*", " ".join(self.text.split())


@dataclass(frozen=True)
class Branches:
    """A prompt and its branches in the order of sampling (``ATTUNE_BRANCHES``).

    Attributes:
        prompt: p0, as it was written.
        branches: the first is the base, which gives the layout.
    """

    prompt: str
    branches: tuple[Branch, ...]

    @property
    def summary(self) -> str:
        """The base, then a line for each branch as manual takes it: “car | a red car and a bench”."""
        return "\n".join([f"base: {self.branches[0].text}", *(" | ".join(b.line) for b in self.branches[1:])])
