"""Phrase fusion: the tokens of one phrase share their attention.

"fire truck" is one thing, but each of its tokens has a map of its own, and the two may pull apart. With ``G`` the columns of a phrase,

    ``a'_j = (1 − s)·a_j + s/|G| · Σ_{k ∈ G} a_k``   for ``j`` in ``G``:

a phrase keeps the attention that it has at a pixel, and shares it out. So rows sum to one as before, and no other column changes.

Shapes: ``T`` columns, ``R`` rows, ``H`` heads, ``M`` pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def joined(groups: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    """Groups of columns that share none: those that do ("red car" and "car") become one; groups of a single column go."""
    found: list[set[int]] = []
    for group in groups:
        whole = set(group)
        for other in [g for g in found if g & whole]:
            whole |= other
            found.remove(other)
        found.append(whole)
    return tuple(sorted(tuple(sorted(g)) for g in found if len(g) > 1))


def mixing(groups: Sequence[Sequence[int]], count: int, strength: float) -> Tensor:
    """The fusion as a matrix ``[T, T]`` (float64): fused weights are ``weights @ mixing``.

    Args:
        groups: places among the ``T = count`` columns, no place twice.
        strength: ``s`` in [0, 1].
    """
    out = torch.eye(count, dtype=torch.float64)
    for group in groups:
        places = torch.tensor(group)
        out[places[:, None], places] = strength / len(group)
        out[places, places] += 1 - strength
    return out


def fuse(weights: Tensor, matrix: Tensor) -> Tensor:
    """Weights ``[R, H, M, T]`` of the phrases' columns, fused."""
    return weights @ matrix.to(weights, non_blocking=weights.is_cuda)
