"""The chunks of ComfyUI's batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Chunk:
    """One conditioning's rows of a batch; ComfyUI's batches are chunks of equal size, a row per picture.

    Attributes:
        uuid: ComfyUI's name of the conditioning, or None where it has none.
        role: 0 conditional, 1 unconditional.
        first_time: False where the same conditioning has been run before in this evaluation of the sampler's: another pack's own pass.
        rows: in the batch.
        given: the same rows among those that a request is given (see `AttentionCall.parts`).
    """

    uuid: Any
    role: int
    rows: slice
    given: slice
    first_time: bool = True


def chunks_of(
    batch: int, roles: Sequence[int], uuids: Sequence[Any], first_times: Sequence[bool] = (), wanted: int | None = None
) -> tuple[Chunk, ...]:
    """The chunks of a batch, or those of one role."""
    size = batch // max(len(roles), 1)
    out: list[Chunk] = []
    for number, role in enumerate(roles):
        if wanted is None or role == wanted:
            uuid = uuids[number] if number < len(uuids) else None
            first, given = number * size, len(out) * size
            own = Chunk(uuid, role, slice(first, first + size), slice(given, given + size))
            out.append(own if number >= len(first_times) else replace(own, first_time=first_times[number]))
    return tuple(out)
