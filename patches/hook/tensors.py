"""q, k, v and output of a call in one layout, and indices that never wait for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import comfy
import torch
from torch import Tensor


def index_or_slice(numbers: Sequence[int], device: torch.device) -> Any:
    """An index for some numbers: a slice where they follow each other, which makes a view and starts nothing on the device."""
    first = numbers[0] if len(numbers) else 0
    if isinstance(numbers, range) or list(numbers) == list(range(first, first + len(numbers))):
        return slice(first, first + len(numbers))
    return index(numbers, device)


def index(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers on a device, without waiting for what it does."""
    return torch.tensor(numbers).to(device, non_blocking=device.type == "cuda")


def put(whole: Tensor, dim: int, places: Any, new: Tensor) -> Tensor:
    """``whole`` with ``new`` at some places of a dimension."""
    if not isinstance(places, slice):
        return whole.index_copy(dim, places, new)
    if places == slice(0, whole.shape[dim]):
        return new
    return whole.slice_scatter(new, dim, places.start, places.stop)


def persistent() -> contextlib.AbstractContextManager[Any]:
    """While this lasts, tensors may be made that outlive the block that is running.

    Newer versions of ComfyUI plan the memory of a block ahead, and have to be told.
    """
    pause = getattr(getattr(comfy, "model_prefetch", None), "pause_malloc_graph", None)
    return contextlib.nullcontext() if pause is None else pause()


@dataclass(frozen=True)
class Kernel:
    """What computes a call's attention for its block.

    Attributes:
        whole: on q, k, v as the block gave them.
        function: ``function(q, k, v, heads, **settings)``, ComfyUI's, for other rows and heads.
        settings: keywords of the call.
        plain: it is PyTorch's attention without a mask, so that another way to compute the same may be taken.
        block_replaced: another pack computes the output, and may add to the text's (an IP-Adapter's picture).
    """

    whole: Callable[[Tensor, Tensor, Tensor], Tensor]
    function: Callable[..., Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    block_replaced: bool = False

    def part(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """On some rows and heads, ``[R, h, tokens, d]``."""
        settings = {n: value for n, value in self.settings.items() if n not in ("mask", "enable_gqa")}
        settings |= {"mask": mask, "skip_reshape": True, "skip_output_reshape": True}
        return self.function(q, k, v, q.shape[1], **settings)


class CallTensors:
    """q, k, v of a call as ``[B, H, tokens, d]`` views, whatever layout the caller uses, and the way back.

    Args:
        in_order: makes keys or values ``[..., tokens, width]`` of those that the caller gives, where methods see them in another order.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        settings: dict[str, Any],
        in_order: Callable[[Tensor], Tensor] | None = None,
    ):
        self.in_order = in_order
        self.by_head = bool(settings.get("skip_reshape"))
        if not self.by_head and q.shape[0] > k.shape[0] == v.shape[0]:
            # HyperTile cuts q into tiles of its own rows, and leaves it to the kernel to read k and v as so many rows.
            k, v = (t.reshape(q.shape[0], -1, t.shape[-1]) for t in (k, v))
        self.given = (q, k, v)
        self.heads, self.settings = heads, settings
        self.width = q.shape[-1] if self.by_head else q.shape[-1] // heads

    def _split(self, t: Tensor) -> Tensor:
        t = t if self.by_head else t.reshape(t.shape[0], t.shape[1], -1, self.width).transpose(1, 2)
        return t if t.shape[1] == self.heads else t.repeat_interleave(self.heads // t.shape[1], dim=1)  # grouped queries

    @cached_property
    def q(self) -> Tensor:
        return self._split(self.given[0])

    @cached_property
    def k(self) -> Tensor:
        return self._ordered(self._split(self.given[1]))

    @cached_property
    def v(self) -> Tensor:
        return self._ordered(self._split(self.given[2]))

    def _ordered(self, t: Tensor) -> Tensor:
        return t if self.in_order is None else self.in_order(t)

    @property
    def scale(self) -> float | None:
        return self.settings.get("scale")

    def mask(self, rows: Any, queries: slice) -> Tensor | None:
        """The part of the attention mask for some rows and queries, ``[R or 1, H or 1, M or 1, N]``."""
        mask = self.settings.get("mask")
        if mask is None:
            return None
        mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
        mask = mask if mask.shape[0] == 1 else mask[rows]
        return mask if mask.shape[2] == 1 else mask[:, :, queries]

    def join(self, out: Tensor) -> Tensor:
        """``[B, H, M, d]`` to the layout that the caller expects back."""
        if self.settings.get("skip_output_reshape"):
            return out
        return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)

    def open(self, out: Tensor) -> Tensor:
        """The caller's layout to ``[B, H, M, d]``."""
        if self.settings.get("skip_output_reshape"):
            return out
        return out.view(out.shape[0], out.shape[1], self.heads, -1).transpose(1, 2)
