"""Iterative refinement of attention: each word's map keeps its peaks, with soft edges.

A round does to the map ``a_j`` of every refined token (one row, one head, the ``h × w`` grid)

1. suppress: ``a_j ← a_j · [a_j ≥ keep · max_p a_j(p)]``;
2. smooth: a Gaussian of ``sigma`` grid cells over the grid, cut off at three sigma, the border repeated;
3. renormalise: every pixel's weights, those of the tokens that are not refined included, are divided by their sum: rows sum to one.

The maximum is over the token's own map. (The note that the idea is from takes it over the last axis of the attention, the tokens of a
pixel; then smooths over tokens. Its stated aim, contours, is about space, and so is this.) What suppressed places lose goes to whatever else
their pixels look at; above all CLIP's start token, which is never refined.

Shapes: ``B`` maps (rows × heads), ``T`` refined tokens, ``M = h·w`` pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 23  # weights refined at once


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian over space, ``[B, T, h, w]``; 0 changes nothing."""
    if sigma == 0:
        return maps
    from kornia.filters import gaussian_blur2d

    size = 2 * math.ceil(3 * sigma) + 1
    # A small one is quicker in one go.
    return gaussian_blur2d(maps, (size, size), (sigma, sigma), border_type="replicate", separable=size > 7)


def refine(maps: Tensor, rest: Tensor, grid: tuple[int, int], rounds: int, keep: float, sigma: float) -> tuple[Tensor, Tensor]:
    """Refine the maps of some tokens.

    Args:
        maps: their weights ``[B, T, M]``.
        rest: what each pixel gives to all other tokens together, ``[B, M]``.
        grid: ``(h, w)``.

    Returns:
        the new weights ``[B, T, M]``, and the factor ``[B, M]`` on every other token's weight.
    """
    size = max(1, BLOCK_ELEMENTS // max(1, maps[0].numel()))
    if size >= len(maps):
        return _refine(maps, rest, grid, rounds, keep, sigma)
    parts = [_refine(m, r, grid, rounds, keep, sigma) for m, r in zip(maps.split(size), rest.split(size), strict=True)]
    new, factors = zip(*parts, strict=True)
    return torch.cat(new), torch.cat(factors)


def _refine(maps: Tensor, rest: Tensor, grid: tuple[int, int], rounds: int, keep: float, sigma: float) -> tuple[Tensor, Tensor]:
    factor = torch.ones_like(rest)
    for _ in range(rounds):
        maps = maps * (maps >= keep * maps.amax(dim=-1, keepdim=True))
        maps = smooth(maps.unflatten(-1, grid), sigma).flatten(-2)
        total = maps.sum(dim=1) + rest * factor
        total = torch.where(total > 0, total, torch.ones_like(total))  # a pixel of which nothing is left looks at nothing
        maps, factor = maps / total[:, None], factor / total
    return maps, factor
