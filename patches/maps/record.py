"""Attention maps of a run, kept for other nodes to look at: which run made them, what they hold, and never more than asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..observer import NOBODY, Observer

CROSS, SELF, BOTH = KINDS = ("cross", "self", "both")
STEPS = {"mean": 0, "last": 0, "every step": 1, "every 2nd step": 2, "every 5th step": 5, "every 10th step": 10}
PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}
DEVICES = ("device", "cpu")
KEPT_RUNS = 4  # finished runs that one handle remembers


@dataclass(frozen=True)
class Settings:
    """What is kept of a run.

    Attributes:
        kind: of attention: to words (cross), to pixels (self), or both.
        steps: one of `STEPS`: the mean of all, the last, or single ones.
        precision: of what is kept, one of `PRECISIONS`.
        keep_on: where it is kept.
        limit_mb: most that it may take.
    """

    kind: str = BOTH
    steps: str = "mean"
    precision: str = "fp16"
    keep_on: str = "device"
    limit_mb: float = 1024

    @property
    def every(self) -> int:
        """Steps from one that is kept to the next; 0: they are brought together."""
        return STEPS[self.steps]

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


@dataclass
class Place:
    """Maps of one site and kind: a frame per kept step (mean and last: one, under step -1).

    A frame is ``[pictures, heads, M, N]`` (``M`` text columns, or pixels for self-attention); heads are 1 where averaged.
    """

    grid: tuple[int, int]
    frames: dict[int, Tensor] = field(default_factory=dict)
    count: int = 0


@dataclass
class Record:
    """The maps of one sampling run.

    Attributes:
        latent: height and width of the latent.
        pictures: in the batch.
        cross, pixels: places by site, in order of execution.
        planned: bytes that it will take; ``dropped``: that was too much, and nothing is kept.
        origin: what made the picture (`Observer.origin`).
        cond: the conditioning that the maps are of, or nothing outside a run.
    """

    latent: tuple[int, int]
    pictures: int
    cross: dict[str, Place] = field(default_factory=dict)
    pixels: dict[str, Place] = field(default_factory=dict)
    planned: int = 0
    dropped: bool = False
    origin: Any = None
    cond: Mapping[str, Any] = field(default_factory=dict)

    def places(self) -> Iterator[Place]:
        yield from self.cross.values()
        yield from self.pixels.values()

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for place in self.places() for t in place.frames.values())

    def only(self, site: str, head: int | None = None) -> Record:
        """One site's part, or one head's of it."""
        place = self.cross[site]
        frames = place.frames if head is None else {k: t[:, head : head + 1] for k, t in place.frames.items()}
        return Record(self.latent, self.pictures, {site: Place(place.grid, frames)}, cond=self.cond)

    @property
    def steps(self) -> list[int]:
        """The kept steps, in order; ``[-1]`` for a mean or the last."""
        return sorted({step for place in self.places() for step in place.frames})


class Maps:
    """``ATTUNE_MAPS``: the promise of maps. Runs of the patched model fill it; a node that gets it asks for its own picture's."""

    def __init__(self, settings: Settings = Settings(), observer: Observer = NOBODY):
        self.settings, self.observer = settings, observer
        self.records: OrderedDict[Any, Record] = OrderedDict()  # by origin

    def __deepcopy__(self, memo: dict[int, Any]) -> Maps:
        """Cloning a model copies what is on it: not this, which a node has given out."""
        return self

    def publish(self, record: Record) -> None:
        """Keep the record of a run that came to its end."""
        if record.dropped:
            self.observer.tell(
                f"the maps are not kept: they would take more than {self.settings.limit_mb:g} MB; Capture Attention Maps can keep fewer"
            )
            return
        record.origin = self.observer.origin()
        self.records.pop(record.origin, None)
        self.records[record.origin] = record
        while len(self.records) > KEPT_RUNS or (len(self.records) > 1 and self.bytes > self.settings.limit_mb * 2**20):
            self.records.popitem(last=False)

    @property
    def bytes(self) -> int:
        return sum(r.bytes for r in self.records.values())

    def record(self, made_by: Container[Any] | None = None) -> Record:
        """The maps of the last run of one of these origins; None: of the last run.

        Raises:
            ValueError: when no run that these maps know of has made that picture.
        """
        if not self.records:
            raise ValueError(
                "there are no attention maps yet: connect the MODEL output of the node that gave these maps to the sampler that makes "
                "the picture, and the picture to this node."
            )
        for record in reversed(self.records.values()):
            if made_by is None or record.origin in made_by:
                return record
        raise ValueError(
            "these attention maps belong to another picture: this one was not made by a sampler that runs the MODEL of the node that "
            "gave the maps, or its result came from a cache. Check the connections, or change the seed and run again."
        )
