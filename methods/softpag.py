"""SoftPAG: guidance from a copy of the conditional pass whose attention is pulled towards the identity.

Source: "Fine-Grained Perturbation Guidance via Attention Head Selection" (arXiv 2506.10978). Per chosen head,
``A' = (1 − u)·A + u·I``, which needs no map: the head's output is ``O' = (1 − u)·(A V) + u·V``. u = 0 changes nothing,
u = 1 is perturbed-attention guidance (PAG, arXiv 2403.17377).
"""

from __future__ import annotations

import torch
from torch import Tensor


def soften(out: Tensor, value: Tensor, perturbation: Tensor | float) -> Tensor:
    """Pull heads towards their own value: ``(1 − u)·O + u·V``.

    Args:
        out: attention output ``A V`` of some heads, ``[..., M, d]``.
        value: the same tokens' values ``V``, ``[..., M, d]``.
        perturbation: ``u`` in [0, 1], a number or broadcastable to ``out``; 0 gives ``out`` and 1 gives ``value`` exactly.

    Returns:
        the perturbed heads' output, ``[..., M, d]``, in the dtype of ``out``.
    """
    if isinstance(perturbation, Tensor):
        u = perturbation.to(out.dtype)
        return torch.where(u == 1, value, torch.where(u == 0, out, torch.lerp(out, value, u)))  # lerp is not exact at its ends
    return out if perturbation == 0 else value if perturbation == 1 else torch.lerp(out, value, perturbation)


def guide(guided: Tensor, conditional: Tensor, perturbed: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Move a prediction away from the perturbed one: ``x̂ = x_cfg + f·s·(x_cond − x_pert)``.

    Args:
        guided: the prediction after CFG, ``[B, ...]`` (after no CFG it is the conditional one: SoftPAG needs no CFG).
        conditional: the conditional prediction ``x_cond``, ``[B, ...]``.
        perturbed: the prediction with perturbed heads ``x_pert``, ``[B, ...]``.
        scale: guidance scale ``s``; 0 returns ``guided`` itself.
        rescale: ``φ`` in [0, 1]: how far the term is shrunk, by ``f = φ·σ(x_cond)/σ(x_cfg + term) + 1 − φ`` per picture, so
            that a picture keeps the contrast of the conditional one (Lin et al., arXiv 2305.08891, section 3.4).

    Returns:
        the guided prediction ``x̂``, ``[B, ...]``.
    """
    if scale == 0:
        return guided
    term = scale * (conditional - perturbed)
    if rescale > 0:
        axes = tuple(range(1, guided.ndim))
        spread = (guided + term).std(dim=axes, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)
        term = term * (rescale * conditional.std(dim=axes, keepdim=True) / spread + 1 - rescale)
    return guided + term
