"""Structure-aware refinement of a latent: a dense CRF that evens it out inside its regions and not across its contours.

The note that the idea is from says ``dense_crf(latents, guidance=attention × edges)``, with Canny edges "of the latents". A dense CRF
(Krähenbühl and Koltun, arXiv 1210.5644) labels pixels with classes, and a latent has none; nor does the note say what the guidance
does, what the terms are, or on which image Canny runs. Computed here is:

- structure ``s``: the latent's channels projected on their first principal component, over its own range, 0 to 1;
- edges ``e``: kornia's Canny on ``s``, 0 or 1 (its thresholds are in the units of the Sobel gradient: a full step from 0 to 1 has 2.6);
- guidance ``g = attention · e``, 0 to 1; without attention maps it is ``e``;
- the CRF, with the latent itself as continuous labels ``z`` (a Gaussian CRF, so that mean field has a closed form):

    ``E(z) = ½ Σ_i ‖z_i − x_i‖² + ½ · strength · Σ_{i<j} w_ij ‖z_i − z_j‖²``,
    ``w_ij = exp(−‖p_i − p_j‖²/2σ_s² − ((s_i − s_j)² + (g_i − g_j)²)/2σ_f²) / S``

  with ``p`` the place in latent pixels, and ``S`` the sum of the spatial part over an endless grid without ``i`` itself, so that in a flat
  region all neighbours together weigh ``strength`` times what the pixel's own value does. Pixels of a contour that the prompt's words look
  at differ by ``g`` from what lies on either side of it, and are evened out along it only.
- mean field: the factors are Gaussians of fixed precision ``1 + strength · Σ_j w_ij`` whose means follow, all at once,

    ``z_i ← (x_i + strength · Σ_{j≠i} w_ij z_j) / (1 + strength · Σ_{j≠i} w_ij)``.

  Each iteration sums over all pairs, exactly: no grid of features is sampled. The fixed point is the minimum of ``E``.

Shapes: ``B`` pictures, ``c`` channels, ``h × w`` the latent's grid, ``P = h·w``. Work is ``O(P²)``, memory ``O(P)`` beside one block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .maps import minmax

BLOCK_ELEMENTS = 1 << 24  # pairs looked at at once, about: 64 MiB in float32, and never three times that
REACH = 14.5  # in sigmas: beyond it exp(−d²/2) is 0 in float32, so rows further away are not looked at


def structure(latent: Tensor) -> Tensor:
    """The channels' first principal component over its own range: ``[B, c, h, w]`` to ``[B, 1, h, w]`` in [0, 1]; flat ones are 0."""
    flat = latent.flatten(2)
    centred = flat - flat.mean(dim=2, keepdim=True)
    axis = torch.linalg.eigh((centred @ centred.transpose(1, 2)).cpu().double()).eigenvectors[..., -1:]
    axis = axis * axis.gather(1, axis.abs().argmax(dim=1, keepdim=True)).sign()  # which end is up is a matter of rounding
    return minmax((axis.to(flat).transpose(1, 2) @ centred).unflatten(2, latent.shape[-2:]))


def edges(structure: Tensor, low: float, high: float) -> Tensor:
    """Canny's edges of ``[B, 1, h, w]`` in [0, 1]: 0 or 1, same shape."""
    from kornia.filters import canny

    if min(structure.shape[-2:]) < 3:  # its blur mirrors two pixels at the border
        return torch.zeros_like(structure)
    return canny(structure, low, high)[1]


def spread(sigma: float) -> float:
    """``S``: the spatial Gaussian summed over an endless grid, without its middle."""
    side = 1 + 2 * sum(math.exp(-(k * k) / (2 * sigma * sigma)) for k in range(1, math.ceil(REACH * sigma) + 1))
    return side * side - 1


def refine(
    latent: Tensor,
    guides: Tensor,
    strength: float,
    iterations: int,
    spatial_sigma: float,
    feature_sigma: float,
) -> Tensor:
    """The means of mean field after some iterations from ``z = x``.

    Args:
        latent: ``x [B, c, h, w]``, float32 or float64.
        guides: features that differ across contours, ``[B, f, h, w]``: ``s`` and ``g``.

    Returns:
        ``z``, as ``latent``.
    """
    height, width = latent.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([y, x], dim=-1).flatten(0, 1).to(latent) / spatial_sigma
    weight = strength / spread(spatial_sigma)
    return torch.stack(
        [
            _mean_field(
                x, torch.cat([place, f.flatten(1).T.to(latent) / feature_sigma], dim=1), weight, iterations, spatial_sigma
            )
            for x, f in zip(latent, guides, strict=True)
        ]
    )


def _mean_field(x: Tensor, features: Tensor, weight: float, iterations: int, spatial_sigma: float) -> Tensor:
    """One picture: ``x [c, h, w]``, scaled places and guides ``[P, 2 + f]``."""
    channels, height, width = x.shape
    own = x.flatten(1).T
    z = torch.cat([own, torch.ones_like(own[:, :1])], dim=1)  # the last column counts the neighbours
    reach = math.ceil(REACH * spatial_sigma)
    size = max(1, min(math.isqrt(BLOCK_ELEMENTS), BLOCK_ELEMENTS // (min(height, 2 * reach + 1) * width)))
    for _ in range(iterations):
        parts = []
        for first in range(0, height * width, size):
            here = slice(first, min(first + size, height * width))
            top, bottom = here.start // width - reach, (here.stop - 1) // width + 1 + reach
            near = slice(max(0, top) * width, min(height, bottom) * width)
            distance = torch.cdist(features[here], features[near], compute_mode="donot_use_mm_for_euclid_dist")
            kernel = distance.square_().mul_(-0.5).exp_()
            kernel.diagonal(here.start - near.start).zero_()  # the pixel itself
            parts.append(kernel @ z[near])
        message = torch.cat(parts)
        z[:, :channels] = (own + weight * message[:, :channels]) / (1 + weight * message[:, channels:])
    return z[:, :channels].T.reshape(x.shape)
