"""Detail++: a prompt's branches painted one after another, each inside its subject's region (arXiv 2507.17853).

Branch 0 gives the layout; every further branch ``i`` adds its details where a binary mask ``B_i`` from cross-attention says its
subject is, and takes the rest from the branch before it. A loss on the layout branch's maps, small for compact regions, moves its
latent.

Shapes: ``n + 1`` branches, ``B`` pictures, ``S`` subjects, ``N`` tokens of the prompt itself, maps ``[..., h, w]``, latents
``[n + 1, B, c, H, W]``.

What the paper leaves open is as in the released code (clf28/Detail-plus-plus): maps are summed over the steps so far and enlarged before
they become masks; before the loss they are made distributions over space (`subject_maps`); entropy weighs 2, alignment 0.05 of the mean
squared distance; a step's update is repeated while the loss is above a threshold, here on maps of the latent as it is then (the
released code averages them with those of the updates before). `exclusive_masks` is in neither: subjects compete for
pixels as S-CFG's tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .maps import minmax, resize

TINY = 1e-8
EPSILON = 1e-5  # in the logarithm of entropy
TEMPERATURE = 0.5  # of the softmax over a prompt's tokens
BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)  # OpenCV's 5×5 Gaussian, before the brightest point is sought
ENTROPY, ALIGNMENT = 2.0, 0.05  # weights of the two terms
THRESHOLDS = (26.0, 25.0, 24.0, 23.0, 22.5, 22.0)  # of the loss, step by step; chosen for two subjects on maps of 32×32
EARLY = 0.1  # part of sampling that is early: timesteps above 900 of 1000
UPDATES = (6, 3)  # the most in an early step, and in a later one
STEP = 1750 / (4 * 128 * 128)  # step length per number in a latent: SDXL's, at 1024×1024


# --- masks and accumulation ---------------------------------------------------------------------------------------------


def subject_masks(maps: Tensor, threshold: float = 0.5, size: tuple[int, int] | None = None) -> Tensor:
    """``B = 1[minmax(M) > τ]`` (equation 3): maps ``[..., h, w]`` to boolean ones.

    Args:
        size: of the masks, the latent's; maps ``[B, S, h, w]`` are enlarged to it first. None: their own.
    """
    return minmax(maps if size is None else resize(maps, size)) > threshold


def exclusive_masks(maps: Tensor, threshold: float = 0.5, size: tuple[int, int] | None = None) -> Tensor:
    """`subject_masks` of which no two overlap: a pixel is the subject's whose map is largest there.

    Args:
        maps: ``[B, S, h, w]`` over their means in space, as `scfg.layer_maps` makes them (S-CFG, arXiv 2404.05384, section 3.2).
    """
    maps = maps if size is None else resize(maps, size)
    owner = maps.argmax(dim=1, keepdim=True)
    numbers = torch.arange(maps.shape[1], device=maps.device).reshape(-1, 1, 1)
    return subject_masks(maps, threshold) & (owner == numbers)


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


# --- the optimisation ---------------------------------------------------------------------------------------------------


def subject_maps(attention: Tensor, subjects: Sequence[Sequence[int]]) -> Tensor:
    """The subjects' maps as distributions over space, normalised as in the released code.

    Args:
        attention: of the prompt's own tokens, without start, end and padding: ``[B, h, w, N]``, heads and layers averaged.
        subjects: each one's tokens, numbers below ``N``.

    Returns:
        ``[B, S, h, w]``, each summing to 1.
    """
    tokens = (attention / TEMPERATURE).softmax(dim=-1)
    maps = minmax(torch.stack([tokens[..., list(own)].mean(dim=-1) for own in subjects], dim=1))
    return maps / maps.sum(dim=(-2, -1), keepdim=True).clamp_min(TINY)


def centroid(maps: Tensor) -> Tensor:
    """The maps' centres of mass (equation 6) in pixels, ``[..., 2]`` as ``(x, y)``; the first pixel is 0."""
    weights = maps / (maps.sum(dim=(-2, -1), keepdim=True) + TINY)
    x = torch.arange(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    y = torch.arange(maps.shape[-2], dtype=maps.dtype, device=maps.device)
    return torch.stack([(weights.sum(dim=-2) * x).sum(dim=-1), (weights.sum(dim=-1) * y).sum(dim=-1)], dim=-1)


def brightest(maps: Tensor) -> Tensor:
    """The brightest pixel after a 5×5 Gaussian, ``[..., 2]`` as ``(x, y)``; no gradient flows through it."""
    from kornia.filters import filter2d_separable

    flat = maps.detach().reshape(-1, 1, *maps.shape[-2:])
    if min(maps.shape[-2:]) > len(BINOMIAL) // 2:  # mirrored at the border, which smaller maps cannot be
        kernel = torch.tensor([BINOMIAL], dtype=maps.dtype, device=maps.device) / sum(BINOMIAL)
        flat = filter2d_separable(flat, kernel, kernel, border_type="reflect")
    place = flat.flatten(1).argmax(dim=1)
    width = maps.shape[-1]
    return torch.stack([place % width, place // width], dim=-1).to(maps.dtype).reshape(*maps.shape[:-2], 2)


def entropy(maps: Tensor) -> Tensor:
    """``−Σ m log m`` of each map as a distribution over space (equation 8): ``[..., h, w]`` to ``[...]``."""
    m = maps / (maps.sum(dim=(-2, -1), keepdim=True) + TINY)
    return -(m * (m + EPSILON).log()).sum(dim=(-2, -1))


def alignment(maps: Tensor) -> Tensor:
    """``‖p_centroid − p_max‖²`` of each map, in pixels (a term of equation 7): ``[..., h, w]`` to ``[...]``."""
    return (centroid(maps) - brightest(maps)).square().sum(dim=-1)


def objective(maps: Tensor, align: bool = True) -> Tensor:
    """The loss of each picture: ``2·Σ_i L_ent``, and with ``align`` the mean over subjects of ``0.05·mean((p_centroid − p_max)²)``.

    The mean of a squared distance is over its two coordinates, as in the released code; the paper has sums and one weight ``λ``.

    Args:
        maps: of `subject_maps`, ``[B, S, h, w]``.

    Returns:
        ``[B]``.
    """
    loss = ENTROPY * entropy(maps).sum(dim=1)
    return loss + ALIGNMENT * alignment(maps).mean(dim=1) / 2 if align else loss


def threshold_at(step: int) -> float:
    """The loss above which a step's update is repeated."""
    return THRESHOLDS[min(step, len(THRESHOLDS) - 1)]


def most_updates(early: bool) -> int:
    """How many updates a step has at the most."""
    return UPDATES[0] if early else UPDATES[1]


def step_length(step: int, steps: int, size: float, numbers: int) -> float:
    """``α_t`` (equation 9) falls as ``√(1 − t/T)`` over all steps.

    Each of the ``numbers`` in a latent has its share of a map's entropy, so that the gradient's falls with their number; the released
    code's step for SDXL, 1750, is scaled to it, which moves latents of all sizes alike. ``size`` 1 is that step.
    """
    return size * STEP * numbers * (1 - step / steps) ** 0.5
