"""Normalised attention guidance (NAG, arXiv 2505.21179): away from what attention to another text says, in the space of its outputs.

For one token of the picture, with ``z⁺`` what its attention to the prompt gives and ``z⁻`` what it would give with the negative text:

- ``z̃ = z⁺ + φ·(z⁺ − z⁻)``, the extrapolation. The released code, and this file, count it as ``scale = φ + 1``, as CFG is counted: 1 is nothing.
- ``ẑ = z̃ · min(1, τ·‖z⁺‖₁ / ‖z̃‖₁)``: its L1 norm is at most τ times that of ``z⁺``. (The code for diffusers takes L2 norms; the paper, and the
  authors' code for ComfyUI, L1.)
- ``z = α·ẑ + (1 − α)·z⁺``.

A token's norm is over all heads together, as in the released code. Shapes: ``R`` rows, ``H`` heads, ``M`` image tokens, ``d`` head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6  # of a norm, as in the released code


def away(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """``z``, from ``z⁺`` and ``z⁻``.

    Args:
        positive, negative: ``[R, H, M, d]``.
        scale: φ + 1.
        tau: the most that a token's L1 norm may grow.
        alpha: how much of the result is taken.

    Returns:
        ``[R, H, M, d]`` in the dtype of ``positive``; computed in float32 at least.
    """
    wide = torch.promote_types(positive.dtype, torch.float32)
    plus, minus = positive.to(wide), negative.to(wide)
    beyond = torch.lerp(minus, plus, scale)
    limit = tau * _norm(plus) / _norm(beyond)
    return torch.lerp(plus, beyond * limit.clamp(max=1), alpha).to(positive.dtype)


def _norm(z: Tensor) -> Tensor:
    """A token's L1 norm over heads and their widths, ``[R, 1, M, 1]``."""
    return z.abs().sum(dim=(1, 3), keepdim=True).clamp_min(EPSILON)
