"""Word weights: a phrase is looked at more, less, not at all or in one part of the picture only.

With ``g_p`` the gain of phrase ``p`` at a pixel, a column's gain ``g_j`` the product of the gains of the phrases that it is in (as nested
brackets multiply in a prompt), and ``a`` the weights of a row of attention:

- attention: ``a'_j = g_j·a_j / Z`` on the phrases' columns, ``Z = 1 + Σ_j a_j·(g_j − 1)``, and ``1/Z`` on every other column: the logits
  raised by ``log g``, and at 0 the softmax without the phrase. Columns with ``g < 0`` count as 0 in ``Z``, and push the output ``O`` that is
  left away from what they would give: ``O + Σ_j |g_j|·a_j·(O − v_j)``. So rows sum to one whatever the gains.
- value: ``a'_j = g_j·a_j``, and nothing on the others: the phrase's contribution to the output times ``g``.

A gain of 1 changes nothing in either. With a mask ``m`` in [0, 1], ``g = outside + m·(w − outside)`` for a phrase of weight ``w``.

The formulas are ours; that of attention for ``g > 0`` is what adding ``log g`` to a token's logits has always been.

Shapes: ``P`` phrases, ``T`` columns, ``S`` sets of masks (pictures that differ; 1 where none do), ``M`` pixels, ``R`` rows, ``H`` heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def least(dtype: torch.dtype) -> float:
    """The least ``Z`` of outputs in some precision: under it, what would take a silenced phrase's place is rounding error for the most part."""
    return max(2 * torch.finfo(dtype).eps, 2.0**-14)


def placed(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Masks ``[S, P, height, width]`` on a layer's grid, ``[S, P, M]``: the mean over what each of its cells covers, in [0, 1]."""
    return F.adaptive_avg_pool2d(masks.clamp(0, 1), grid).flatten(-2)


def gains(weights: Tensor, masks: Tensor | None = None, outside: float = 0.0) -> Tensor:
    """``g [S, P, M]`` of weights ``[P]`` and masks ``[S, P, M]``; without masks ``[1, P, 1]``."""
    weights = weights[:, None]
    return weights[None] if masks is None else outside + masks * (weights - outside)


def of_columns(gain: Tensor, members: Sequence[Sequence[int]], count: int) -> Tensor:
    """Each column's gain ``[S, M, T]``, of gains ``[S, P, M]``.

    Args:
        members: the columns of each phrase, as places among the ``T = count``.
    """
    out = gain.new_ones(gain.shape[0], gain.shape[2], count)
    for p, columns in enumerate(members):
        out[..., list(columns)] *= gain[:, p, :, None]
    return out


def attention(weights: Tensor, gain: Tensor, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Weights ``[R, H, M, T]`` with gains ``[R or 1, M or 1, T]``, and the factor ``1/Z [R, H, M, 1]`` that all other columns take.

    Args:
        least: of ``Z``; where it is less, the row sums to less than one.
    """
    gain = gain[:, None]
    raised, away = weights * gain.clamp_min(0), weights * gain.clamp_max(0)
    factor = 1 / (1 + (raised - weights).sum(dim=-1, keepdim=True)).clamp_min(least)
    factor = factor * (1 - away.sum(dim=-1, keepdim=True))
    return raised * factor + away, factor


def value(weights: Tensor, gain: Tensor) -> tuple[Tensor, None]:
    """Weights ``[R, H, M, T]`` times gains ``[R or 1, M or 1, T]``; the other columns stay."""
    return weights * gain[:, None], None
