"""Never compute twice what a perturbed pass shares with the conditional one: everything before the first perturbed block.

A normal forward records what its blocks put out for the conditional rows; the perturbed forward of the same input replays it
instead of running those blocks. Blocks are swapped for the length of one forward and put back whatever happens. Replay asks for
the same conditioning and bit-identical input; where these are not met, the pass is computed in full.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, cat, equal, nn, tensor

from .families import family_of
from .families.base import Block, Family
from .parts import chunks_of

PREFIXES = "attune_prefixes"  # in transformer_options: ((span, block), …) that perturbed passes will replay up to


def wanted(options: dict[str, Any], sigma: Tensor, model_sampling: Any) -> tuple[Block, ...]:
    """The blocks up to which passes at this noise level will replay."""
    return tuple({block for span, block in options.get(PREFIXES, ()) if span.holds(sigma, model_sampling)})


def _needed(family: Family, until: Block) -> list[Block]:
    """The blocks before ``until`` whose outputs a replay needs."""
    order = family.blocks()
    before = order[: order.index(until)]
    return before if family.skips else before[-1:]


@dataclass
class Prefix:
    """What one conditioning's rows looked like: noise level, input, and every block's output so far."""

    sigma: Tensor
    x: Tensor
    outputs: dict[Block, tuple[Tensor, ...]] = field(default_factory=dict)

    def fits(self, sigma: Tensor, x: Tensor, rows: Tensor | None = None) -> bool:
        """Whether it was recorded from this very input, of which ``x`` may be some ``rows``."""
        mine, level = self.x, self.sigma
        if rows is not None:
            if int(rows.max()) >= len(mine):
                return False
            mine, level = mine[rows], level[rows] if len(level) == len(self.x) else level
        return mine.shape == x.shape and equal(level, sigma) and equal(mine, x)


class _Replay(nn.Module):
    """Stands in for a block and returns what was recorded (UNet), or what the block before it gave (DiT)."""

    def __init__(self, recorded: tuple[Tensor, ...] | None):
        super().__init__()
        self.recorded = recorded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.recorded is not None:
            # A copy: ComfyUI adds ControlNet's residuals in place.
            copies = tuple(t.clone() for t in self.recorded)
            return copies if len(copies) > 1 else copies[0]
        if "img" in kwargs:
            return kwargs["img"], kwargs["txt"]
        return args[:2] if len(args) > 1 else args[0]


@dataclass
class PrefixCache:
    """Recorded prefixes of the current step, one per conditioning."""

    held: dict[Any, Prefix] = field(default_factory=dict)
    replays: int = 0
    told: bool = False

    @contextlib.contextmanager
    def record(self, diffusion_model: nn.Module, until: Sequence[Block], x: Tensor, options: dict[str, Any]) -> Iterator[None]:
        """Record the conditional rows' outputs of the blocks before each of ``until`` while a forward runs."""
        rows: dict[Any, slice] = {}
        # A negative may have a positive's name (under an area).
        for chunk in chunks_of(len(x), options.get("cond_or_uncond") or (), options.get("uuids") or (), wanted=0):
            if chunk.uuid is None:
                continue
            known = self.held.get(chunk.uuid)
            # The first forward of an input is the plain one; later ones may be other packs' perturbed passes.
            if known is None or not known.fits(options["sigmas"], x[chunk.rows]):
                rows[chunk.uuid] = chunk.rows
                self.held[chunk.uuid] = Prefix(options["sigmas"].clone(), x[chunk.rows].clone())
        family = family_of(diffusion_model)
        handles = []
        for block in {b for u in until for b in _needed(family, u)} if rows else ():
            module = family.block(block)
            module = module[-1] if family.skips else module  # ComfyUI walks a UNet block's layers itself
            handles.append(module.register_forward_hook(self._recorder(block, rows)))
        try:
            yield
        except BaseException:
            self.held.clear()
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _recorder(self, block: Block, rows: dict[Any, slice]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            for uuid, where in rows.items():
                self.held[uuid].outputs[block] = tuple(t[where].clone() for t in parts)

        return hook

    @contextlib.contextmanager
    def replay(
        self, diffusion_model: nn.Module, until: Block, x: Tensor, options: dict[str, Any], rows: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Run one forward in which all blocks before ``until`` return what was recorded, if it was; ``rows`` of it, if given."""
        family = family_of(diffusion_model)
        order = family.blocks()
        before = order[: order.index(until)]
        which = None if rows is None else tensor(rows, device=x.device)
        recorded = self._recorded(_needed(family, until), x, options, which)
        if recorded is None:
            if before and not self.told:
                logging.info("Attune: the perturbed pass runs in full, since its input was not met in the normal pass")
                self.told = True
            yield
            return
        self.replays += 1
        originals: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            for block in before:
                stand_in: nn.Module = _Replay(recorded.get(block))
                parent, name = (
                    (diffusion_model, block[0])
                    if block[0] == "middle_block"
                    else (getattr(diffusion_model, block[0]), str(block[1]))
                )
                originals.append((parent, name, parent._modules[name]))  # type: ignore[arg-type]
                parent._modules[name] = nn.ModuleList([stand_in]) if family.skips else stand_in
            yield
        finally:
            for parent, name, module in originals:
                parent._modules[name] = module

    def _recorded(
        self, needed: list[Block], x: Tensor, options: dict[str, Any], rows: Tensor | None = None
    ) -> dict[Block, tuple[Tensor, ...]] | None:
        uuids = list(options.get("uuids") or ())
        if not needed or not uuids:
            return None
        found: list[Prefix] = []
        for chunk in chunks_of(len(x), [0] * len(uuids), uuids):
            prefix, part = self.held.get(chunk.uuid), x[chunk.rows]
            if prefix is None or not prefix.outputs.keys() >= set(needed) or not prefix.fits(options["sigmas"], part, rows):
                return None
            found.append(prefix)

        def of(t: Tensor) -> Tensor:
            return t if rows is None else t[rows]

        return {
            b: tuple(cat([of(t) for t in parts]) for parts in zip(*(p.outputs[b] for p in found), strict=True)) for b in needed
        }
