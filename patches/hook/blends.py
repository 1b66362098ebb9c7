"""Outputs of chosen heads, mixed with something else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .call import AttentionCall
from .requests import ALL, IMAGE, BlendOutputs
from .tensors import CallTensors, Kernel, index_or_slice
from .texts import OtherText


class ChosenHeads:
    """Output, q, k and v of the rows ``R``, heads ``h`` and tokens that a blend asks for, each made when it is asked for.

    Attributes:
        out: the kernel's output, after the requests before this one, ``[R, h, M, d]``.
        q: the tokens' queries ``[R, h, M, d]``.
        k, v: their keys and values ``[R, h, M, d]``; in cross-attention, where image tokens have none, those of the text ``[R, h, N, d]``.
    """

    def __init__(self, call: AttentionCall, request: BlendOutputs, tensors: CallTensors, out: Tensor, kernel: Kernel):
        self._call, self._tensors, self._kernel, self._whole = call, tensors, kernel, out
        numbers = call.rows(request.rows)
        self.rows: Any = numbers if isinstance(numbers, slice) else index_or_slice(numbers, out.device)
        heads = request.where[call.site.name, call.kind]
        self.heads: Any = slice(0, tensors.heads) if heads is None else index_or_slice(heads, out.device)
        self.tokens = slice(None) if request.tokens == ALL else call.image if request.tokens == IMAGE else call.text
        self.keys = slice(None) if call.kind == "cross" else self.tokens

    def where(self, tokens: slice) -> tuple[Any, ...]:
        """The rows, the heads and some tokens, as an index into ``[B, H, tokens, d]``."""
        if isinstance(self.rows, slice) or isinstance(self.heads, slice):
            return self.rows, self.heads, tokens
        return self.rows[:, None], self.heads[None, :], tokens

    @cached_property
    def out(self) -> Tensor:
        return self._whole[self.where(self.tokens)]

    @cached_property
    def q(self) -> Tensor:
        return self._tensors.q[self.where(self.tokens)]

    @cached_property
    def k(self) -> Tensor:
        return self._tensors.k[self.where(self.keys)]

    @cached_property
    def v(self) -> Tensor:
        return self._tensors.v[self.where(self.keys)]

    @cached_property
    def scale(self) -> float:
        """What logits are multiplied by."""
        return self._tensors.q.shape[-1] ** -0.5 if self._tensors.scale is None else self._tensors.scale

    @cached_property
    def mask(self) -> Tensor | None:
        """What is added to logits, ``[R or 1, h or 1, M or 1, N]``, if the call has a mask."""
        mask = self._mask()
        if mask is None or mask.dtype != torch.bool:
            return mask
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))

    def _mask(self) -> Tensor | None:
        mask = self._tensors.mask(self.rows, self.tokens)
        return mask if mask is None or mask.shape[1] == 1 else mask[:, self.heads]

    def attend(self, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """ComfyUI's kernel for these queries, on all keys and values, with some of these tokens' replaced.

        Args:
            q, k, v: in place of those here, of the same shape; None leaves them. Without a mask there may be other numbers of queries, and
                of keys where these tokens are all there are.

        Returns:
            ``[R, h, M, d]``.
        """
        return self._kernel.part(self.q if q is None else q, self._all("k", k), self._all("v", v), self._mask())

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """ComfyUI's kernel for any queries, keys and values of these rows and heads."""
        return self._kernel.part(q, k, v, mask)

    @cached_property
    def all_keys(self) -> Tensor:
        """The keys of all tokens that the call has."""
        return self._all("k", None)

    @cached_property
    def all_values(self) -> Tensor:
        """The values of all tokens that the call has."""
        return self._all("v", None)

    @property
    def replaced(self) -> bool:
        """Whether another pack computes the output, and may add to the text's (an IP-Adapter's picture)."""
        return self._kernel.block_replaced

    def with_text(self, text: OtherText) -> Tensor:
        """What the output would be with another text, which the request names; all heads, conditional rows, image tokens."""
        return self._call.texts[text].attend(self._call, self)

    def _all(self, name: str, new: Tensor | None) -> Tensor:
        whole: Tensor = getattr(self._tensors, name)[self.where(slice(None))]
        if new is None:
            return whole
        if self.keys == slice(None):
            return new
        return whole.slice_scatter(new.to(whole.dtype), 2, self.keys.start, self.keys.stop)


def ignored(call: AttentionCall, blends: Sequence[BlendOutputs], heads: int) -> bool:
    """Whether blends that do not look at the kernel's output fill all of it."""
    filling = [r for r in blends if r.ignores_output and (r.tokens == ALL or (r.tokens == IMAGE and call.kind == "self"))]
    if not filling or call.kind == "cross":
        return False
    filled = torch.zeros(call.batch, heads, dtype=torch.bool)
    for r in filling:
        chosen = r.where[call.site.name, call.kind]
        rows = filled[call.rows(r.rows)]
        rows[:, slice(None) if chosen is None else list(chosen)] = True
        filled[call.rows(r.rows)] = rows
    return bool(filled.all())


def blend(call: AttentionCall, request: BlendOutputs, tensors: CallTensors, out: Tensor, kernel: Kernel) -> Tensor:
    """Write the blend of some rows, heads and tokens over the output ``[B, H, M, d]``."""
    if call.rows(request.rows) == []:
        return out
    if call.run is not None:
        call.run.acted.add(request.effect)
    heads = ChosenHeads(call, request, tensors, out, kernel)
    mixed = request.blend(call, heads)
    if out.requires_grad or mixed.requires_grad:
        out = out.clone()
    out[heads.where(heads.tokens)] = mixed
    return out
