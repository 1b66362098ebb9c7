"""Attention in pieces: the parts of ``A = softmax(QKᵀ/√d)`` that a method needs, and no more.

Shapes: ``B`` rows, ``H`` heads, ``M`` queries, ``N`` keys, ``d`` head dimension, ``T`` chosen key columns. Queries, keys
and values are ``[B, H, M or N, d]``. All functions are differentiable and work in blocks of queries, so that nothing of
size ``M × N`` outlives a block unless the result itself is that large.

Two identities make methods cheap. Neither is of a paper: both follow from the definition of attention, row by row.

1. A map edited in a few key columns ``T``, with a factor ``r`` on all others, is a low-rank correction of the fast kernel's output
   (`replace_columns`): ``O' = Σ_{j∈T} a'_j v_j + r·Σ_{j∉T} a_j v_j = r·(O − Σ_{j∈T} a_j v_j) + Σ_{j∈T} a'_j v_j``. For logits raised by ``S`` on
   ``T``: ``a'_j = a_j e^{S_j}/Z`` and ``r = 1/Z`` with ``Z = 1 + Σ_{j∈T} a_j (e^{S_j} − 1)``.
   Where the kernel also tells ``L = log Σ_j e^{l_j}`` of each row (`attend`), ``a_j = e^{l_j − L}`` needs no other column (`of_columns`).
2. Rows that share a map attend once, with their values side by side (`shared`): ``A [V_1 | … | V_n] = [A V_1 | … | A V_n]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # logits held at once: 64 MiB in float32


def logits(q: Tensor, k: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """Scaled logits ``QKᵀ/√d + mask`` in float32 (float64 stays), ``[B, H, M, N]``; a boolean mask keeps what is true.

    The argument of the softmax in equation 1 of "Attention Is All You Need" (arXiv 1706.03762).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        return out
    return out.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else out + mask.to(dtype)


def _query_blocks(q: Tensor, k: Tensor) -> list[slice]:
    per_query = q.shape[0] * q.shape[1] * k.shape[2]
    size = max(1, BLOCK_ELEMENTS // max(per_query, 1))
    return [slice(start, min(start + size, q.shape[2])) for start in range(0, q.shape[2], size)]


def _mask_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]


def probabilities(
    q: Tensor,
    k: Tensor,
    columns: Tensor | slice | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    mean_heads: bool = False,
) -> Tensor:
    """Attention weights of some key columns: ``softmax(QKᵀ/√d)`` of equation 1 of arXiv 1706.03762.

    Args:
        q: queries ``[B, H, M, d]``.
        k: keys ``[B, H, N, d]``.
        columns: key indices ``[T]``, or a slice of them; ``None`` is every key.
        scale: factor on ``QKᵀ``; ``None`` is ``1/√d``.
        mask: additive or boolean, broadcastable to ``[B, H, M, N]``.
        mean_heads: average over heads block by block, so that single heads are never stored.

    Returns:
        ``[B, H, M, T]``, or ``[B, M, T]`` with ``mean_heads``; float32 or float64. Rows sum to one over all keys.
    """
    blocks = []
    for rows in _query_blocks(q, k):
        part = logits(q[:, :, rows], k, scale, _mask_rows(mask, rows)).softmax(dim=-1)
        part = part if columns is None else part[..., columns]
        blocks.append(part.mean(dim=1) if mean_heads else part)
    return torch.cat(blocks, dim=-2)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor] | None:
    """Attention's output ``[B, H, M, d]`` and ``L [B, H, M]``, the logarithm of what each row's exponentials sum to, by one fast kernel.

    None where PyTorch has no such kernel for these tensors: it may not be there, or not take their precision or width.
    """
    same = q.shape[1] == k.shape[1] == v.shape[1] and q.shape[-1] == k.shape[-1] == v.shape[-1]
    if not same or q.requires_grad or k.requires_grad or v.requires_grad:
        return None
    if q.device.type == "cpu":
        kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    elif _flash(q):
        kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)
    else:
        kernel = None
    if kernel is None:
        return None
    try:
        out, total, *_ = kernel(q, k, v, scale=scale)
    except (NotImplementedError, RuntimeError):  # a build, or a GPU, without it
        return None
    return (out, total) if total.shape == q.shape[:3] else None


def _flash(q: Tensor) -> bool:
    """Whether CUDA's kernel is for these queries; not AMD's, also ``cuda`` by name: versions of it told their sums to base 2."""
    return (
        q.device.type == "cuda"
        and not torch.version.hip
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] in (64, 128)
    )


def of_columns(q: Tensor, k: Tensor, total: Tensor, scale: float | None = None) -> Tensor:
    """Weights ``[B, H, M, T]`` of keys ``k [B, H, T, d]`` only, where ``total [B, H, M]`` is the ``L`` of `attend` over all keys."""
    part = logits(q, k, scale)
    return (part - total.to(part)[..., None]).exp()


def replace_columns(out: Tensor, value: Tensor, before: Tensor, after: Tensor, rest: Tensor | None = None) -> Tensor:
    """Correct an attention output for new weights in a few columns: ``O' = r·(O − Σ_j a_j v_j) + Σ_j a'_j v_j`` (identity 1 above).

    Args:
        out: the fast kernel's output ``O``, ``[B, H, M, d]``.
        value: values of the columns, ``[B, H, T, d]``.
        before: the columns' weights ``a`` in that output, ``[B, H, M, T]``.
        after: their new weights ``a'``, ``[B, H, M, T]``.
        rest: factor ``r`` on every other column, ``[B, H, M, 1]``; ``None`` is one.

    Returns:
        ``O'`` in the dtype of ``out``; rows of the edited map sum to one where ``Σ a' + r·(1 − Σ a) = 1``.
    """
    dtype = before.dtype
    v = value.to(dtype)
    if rest is None:
        return out + ((after - before) @ v).to(out.dtype)
    return (rest * (out.to(dtype) - before @ v) + after @ v).to(out.dtype)


def shared(q: Tensor, k: Tensor, values: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """One map for many values (identity 2 above): attend once with ``q, k [1, H, M, d]`` and ``values [R, H, N, d]`` laid side by side.

    Returns:
        ``[R, H, M, d]``: what every row's values give under the one map.
    """
    rows, heads, keys, width = values.shape
    if q.device.type == "mps":  # its kernel wants values as wide as queries
        q, k = q.expand(rows, -1, -1, -1), k.expand(rows, -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, values, attn_mask=mask, scale=scale)
    side_by_side = values.permute(1, 2, 0, 3).reshape(1, heads, keys, rows * width)
    out = F.scaled_dot_product_attention(q, k, side_by_side, attn_mask=mask, scale=scale)
    return out.reshape(heads, q.shape[2], rows, width).permute(2, 0, 1, 3)
