"""What a scorer of a report is: of one picture, of a picture beside plain's, or of all pictures of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor

from .suites import Item

ALL = "all"  # the part that is the whole


class Judge(ABC):
    """A scorer of a report. ``key`` stands for weights and settings; ``share``: values are 0 or 1, or parts of 1."""

    name: str
    key: str
    share = False

    @abstractmethod
    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        """Of a picture ``[1, h, w, 3]``: a value by part; nothing where there is nothing to judge."""


class Between(ABC):
    """How far a picture is from plain's of the same prompt and seed."""

    name: str
    key: str

    @abstractmethod
    def apart(self, one: Tensor, other: Tensor) -> float:
        """Of two pictures ``[1, h, w, 3]``."""


class OfMany(ABC):
    """One number for all pictures of a method."""

    name: str
    key: str

    @abstractmethod
    def of(self, pictures: Iterable[Tensor]) -> float:
        """Of pictures ``[1, h, w, 3]``."""
