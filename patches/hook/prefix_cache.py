"""Never compute twice what a perturbed pass shares with the conditional one: everything before the first perturbed block.

A normal forward records what its blocks put out for the conditional rows; the perturbed forward of the same input replays it
instead of running those blocks. Both are done with blocks of their own (see `views`); the model's are never touched. Replay asks for the same
conditioning and bit-identical input; where these are not met, the pass is computed in full.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, cat, equal, nn

from .families.base import Block, Family
from .parts import chunks_of
from .requests import Span
from .tensors import index_or_slice, persistent

Given: TypeAlias = tuple[Tensor, int]
PREFIXES = "attune_prefixes"  # in transformer_options: ((span, block), …) that perturbed passes will replay up to


def wanted(options: dict[str, Any], holds: Callable[[Span], bool]) -> tuple[Block, ...]:
    """The blocks up to which passes will replay, of those whose span ``holds`` now."""
    return tuple({block for span, block in options.get(PREFIXES, ()) if holds(span)})


def _needed(family: Family, until: Block) -> list[Block]:
    """The blocks before ``until`` whose outputs a replay needs."""
    order = family.blocks()
    before = order[: order.index(until)]
    return before if family.skips else before[-1:]


@dataclass
class Prefix:
    """What one conditioning's rows looked like: noise level, input, and every block's output so far.

    ``given`` is the sampler's input that they are of, and the number of the evaluation.
    """

    sigma: Tensor
    x: Tensor
    given: Given | None = None
    outputs: dict[Block, tuple[Tensor, ...]] = field(default_factory=dict)

    def fits(self, sigma: Tensor, x: Tensor, rows: Sequence[int] | None = None, given: Given | None = None) -> bool:
        """Whether it was recorded from this very input, of which ``x`` may be some ``rows``.

        What was ``given`` in one evaluation is the same; anything else is compared, and that waits for the device.
        """
        if rows is not None and max(rows) >= len(self.x):
            return False
        if x.shape != (len(self.x) if rows is None else len(rows), *self.x.shape[1:]):
            return False
        if given is not None and self.given is not None and given[0] is self.given[0] and given[1] == self.given[1]:
            return True
        mine, level = self.x.to(x.device), self.sigma.to(x.device)
        if rows is not None:
            which = index_or_slice(rows, x.device)
            mine, level = mine[which], level[which] if len(level) == len(self.x) else level
        return equal(level, sigma.to(x.device)) and equal(mine, x)


@dataclass
class PrefixCache:
    """Recorded prefixes of the current step, one per conditioning."""

    held: dict[Any, Prefix] = field(default_factory=dict)
    replays: int = 0
    told: bool = False

    def recorders(
        self,
        family: Family,
        until: Sequence[Block],
        x: Tensor,
        options: dict[str, Any],
        first_times: Sequence[bool] = (),
        given: Given | None = None,
    ) -> dict[Block, nn.Module]:
        """Blocks for a forward that keeps the conditional rows' outputs of all that is needed to begin before each of ``until``.

        Only a conditioning's first forward in an evaluation is kept: later ones are other packs' perturbed passes.
        """
        rows: dict[Any, slice] = {}
        # A negative may have a positive's name (under an area).
        for chunk in chunks_of(len(x), options.get("cond_or_uncond") or (), options.get("uuids") or (), first_times, wanted=0):
            if chunk.uuid is not None and chunk.first_time:
                rows[chunk.uuid] = chunk.rows
                with persistent():
                    self.held[chunk.uuid] = Prefix(options["sigmas"].clone(), x[chunk.rows].clone(), given)
        needed = {block for u in until for block in _needed(family, u)} if rows else ()
        return {block: family.recorder(block, self._keep(block, rows)) for block in needed}

    def _keep(self, block: Block, rows: dict[Any, slice]) -> Callable[[tuple[Tensor, ...]], None]:
        def keep(parts: tuple[Tensor, ...]) -> None:
            with persistent():
                for uuid, where in rows.items():
                    self.held[uuid].outputs[block] = tuple(t[where].clone() for t in parts)

        return keep

    def stand_ins(
        self,
        family: Family,
        until: Block,
        x: Tensor,
        options: dict[str, Any],
        rows: Sequence[int] | None = None,
        given: Given | None = None,
    ) -> dict[Block, nn.Module]:
        """Blocks for a forward in which all blocks before ``until`` give what was recorded, if it was; ``rows`` of it, if given."""
        order = family.blocks()
        before = order[: order.index(until)]
        recorded = self._recorded(_needed(family, until), x, options, rows, given)
        if recorded is None:
            if before and not self.told:
                logging.info("Attune: the perturbed pass runs in full, since its input was not met in the normal pass")
                self.told = True
            return {}
        self.replays += 1
        return {block: family.replay(block, recorded.get(block)) for block in before}

    def _recorded(
        self,
        needed: list[Block],
        x: Tensor,
        options: dict[str, Any],
        rows: Sequence[int] | None = None,
        given: Given | None = None,
    ) -> dict[Block, tuple[Tensor, ...]] | None:
        uuids = list(options.get("uuids") or ())
        if not needed or not uuids:
            return None
        found: list[Prefix] = []
        for chunk in chunks_of(len(x), [0] * len(uuids), uuids):
            prefix, part = self.held.get(chunk.uuid), x[chunk.rows]
            if (
                prefix is None
                or not prefix.outputs.keys() >= set(needed)
                or not prefix.fits(options["sigmas"], part, rows, given)
            ):
                return None
            found.append(prefix)

        def of(t: Tensor) -> Tensor:
            return t if rows is None else t[index_or_slice(rows, t.device)]

        def joined(parts: Sequence[Tensor]) -> Tensor:
            return cat([of(t).to(parts[0].device) for t in parts])  # several devices may have run them

        return {b: tuple(joined(parts) for parts in zip(*(p.outputs[b] for p in found), strict=True)) for b in needed}
