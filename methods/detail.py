"""Detail++: a prompt's branches painted one after another, each inside its subject's region (arXiv 2507.17853).

Branch 0 gives the layout; every further branch ``i`` adds its details where a binary mask ``B_i`` from cross-attention says its
subject is, and takes the rest from the branch before it. A loss on the layout branch's maps, small for compact regions, moves its
latent.

Shapes: ``n + 1`` branches, ``B`` pictures, ``S`` subjects, maps ``[..., h, w]``, latents ``[n + 1, B, c, H, W]``.

Where the released code departs from the paper: masks come from maps summed over the steps so far (the paper takes the step's own), each
from the branch before (the paper: a sub-prompt's); it weighs entropy by 2 and alignment by 0.05 of the mean squared distance
(``released=True`` in `objective`; the paper: 1 and the sum), re-softmaxes maps over the prompt's tokens before the loss, and repeats the
update until the loss is under a threshold. Here maps are the attention itself, and a step is updated once, as in equation (9).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .maps import minmax

TINY = 1e-8
KERNEL = 5  # pixels, of the Gaussian before the brightest point is sought
SIGMA = 1.0
RELEASED = (0.05, 2.0)  # weights of the mean squared distance and of entropy
RELEASED_STEP = 1750 / (4 * 128 * 128)  # step per number in a latent: SDXL's, at 1024×1024


def subject_masks(maps: Tensor, threshold: float = 0.5) -> Tensor:
    """``B = 1[minmax(M) > τ]`` (equation 3), boolean."""
    return minmax(maps) > threshold


def accumulate(latents: Tensor, masks: Tensor) -> Tensor:
    """``z_i ← z_{i-1} + B_i ⊙ (z_i − z_{i-1})`` for ``i = 1 … n`` in order (equation 4), exact for binary masks.

    It is linear in ``latents`` and leaves alone what is the same in all branches, and doing it twice is doing it once.

    Args:
        latents: ``[n + 1, B, c, H, W]``; the first stays.
        masks: boolean ``[n, B, 1, H, W]``; all ones keep a branch as it is.
    """
    out = [latents[0]]
    for latent, mask in zip(latents[1:], masks, strict=True):
        out.append(torch.where(mask, latent, out[-1]))
    return torch.stack(out)


def centroid(maps: Tensor) -> Tensor:
    """The maps' centres of mass (equation 6) in pixels, ``[..., 2]`` as ``(x, y)``; the first pixel is 0."""
    weights = maps / (maps.sum(dim=(-2, -1), keepdim=True) + TINY)
    x = torch.arange(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    y = torch.arange(maps.shape[-2], dtype=maps.dtype, device=maps.device)
    return torch.stack([(weights.sum(dim=-2) * x).sum(dim=-1), (weights.sum(dim=-1) * y).sum(dim=-1)], dim=-1)


def brightest(maps: Tensor) -> Tensor:
    """The brightest pixel after a 5×5 Gaussian, ``[..., 2]`` as ``(x, y)``; no gradient flows through it."""
    from kornia.filters import gaussian_blur2d

    flat = maps.detach().reshape(-1, 1, *maps.shape[-2:])
    if min(maps.shape[-2:]) > KERNEL // 2:  # mirrored at the border, which smaller maps cannot be
        flat = gaussian_blur2d(flat, (KERNEL, KERNEL), (SIGMA, SIGMA), border_type="reflect")
    place = flat.flatten(1).argmax(dim=1)
    width = maps.shape[-1]
    return torch.stack([place % width, place // width], dim=-1).to(maps.dtype).reshape(*maps.shape[:-2], 2)


def entropy(maps: Tensor) -> Tensor:
    """``−Σ m log m`` of each map as a distribution over space (equation 8): ``[..., h, w]`` to ``[...]``."""
    m = maps / (maps.sum(dim=(-2, -1), keepdim=True) + TINY)
    return -(m * (m + TINY).log()).sum(dim=(-2, -1))


def alignment(maps: Tensor) -> Tensor:
    """Squared distance of each map's centroid from its brightest point (one term of equation 7): ``[..., h, w]`` to ``[...]``."""
    return (centroid(maps) - brightest(maps)).square().sum(dim=-1)


def objective(maps: Tensor, align: bool = True, weight: float = 1.0, released: bool = False) -> Tensor:
    """The loss of each picture: ``Σ_i ‖p_centroid − p_max‖² + λ Σ_i L_ent``.

    Args:
        maps: subjects' maps ``[B, S, h, w]``.
        align: with the first term.
        weight: ``λ``.
        released: with the released code's weights in place of ``λ``.

    Returns:
        ``[B]``.
    """
    first, second = RELEASED if released else (1.0, weight)
    loss = second * entropy(maps).sum(dim=1)
    if align:
        distances = alignment(maps)
        loss = loss + first * (distances.mean(dim=1) if released else distances.sum(dim=1))
    return loss


def step_length(step: int, steps: int, size: float, numbers: int) -> float:
    """``α_t`` falls as ``√(1 − t/T)`` over the optimised steps.

    Each of the ``numbers`` in a latent has its share of a map's entropy, so that the gradient's falls with their number; the released
    code's step for SDXL is scaled to it, which moves latents of all sizes alike. ``size`` 1 is that step.
    """
    return size * RELEASED_STEP * numbers * (1 - step / steps) ** 0.5
