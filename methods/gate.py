"""Semantic gate: words speak as loudly as the picture already shows what they say, or the other way round.

With ``c_p`` the score of phrase ``p`` against the estimate of the finished picture, its gate is

    ``g_p = floor + (1 − floor) · σ((c_p − threshold) / softness)``   (a step at the threshold for softness 0),

and the attention to its columns is multiplied by ``g_p`` (or by ``1/g_p``, for phrases that are neglected) and brought back to rows
that sum to one: a logit edit ``S = ±log g`` of a few columns, whose closed form needs no other column,

    ``a'_j = a_j·e^{S_j} / Z``,  ``Z = 1 + Σ_{j ∈ T} a_j·(e^{S_j} − 1)``,  and ``1/Z`` on every other column.

The note that names this idea (“columns of phrases under a threshold are filtered”) gives no formula; this is ours.

Shapes: ``B`` pictures, ``P`` phrases, ``T`` columns, ``H`` heads, ``M`` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gates(scores: Tensor, threshold: float, softness: float, floor: float) -> Tensor:
    """``g [B, P]`` in [floor, 1] of scores ``[B, P]``."""
    distance = scores - threshold
    passed = (distance / softness).sigmoid() if softness > 0 else (distance >= 0).to(scores)
    return floor + (1 - floor) * passed


def of_columns(gate: Tensor, members: Sequence[Sequence[int]], count: int) -> Tensor:
    """Each column's gate ``[B, T]``: that of its phrase; of several ("red car" and "car"), the widest open one.

    Args:
        gate: ``g [B, P]``.
        members: the columns of each phrase, as places among the ``T = count``.
    """
    out = gate.new_zeros(len(gate), count)
    for p, columns in enumerate(members):
        places = list(columns)
        out[:, places] = torch.maximum(out[:, places], gate[:, p, None])
    return out


def scaled(weights: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[B, H, M, T]`` times ``gain [B, T]``, and the factor ``1/Z [B, H, M, 1]`` that all other columns take."""
    raised = weights * gain[:, None, None]
    factor = 1 / (1 + (raised - weights).sum(dim=-1, keepdim=True))
    return raised * factor, factor
