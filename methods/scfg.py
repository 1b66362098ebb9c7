"""S-CFG: classifier-free guidance whose scale is evened out over the regions of a picture.

Source: "Rethinking the Spatial Inconsistency in Classifier-Free Diffusion Guidance" (arXiv 2404.05384). From the cross-attention
``C`` and self-attention ``S`` of a step come regions, one per token; every region ``i`` gets its own scale
``γ_i = γ · η_ref / η_i``, where ``η`` is the mean strength of the guidance direction inside a region.

Shapes: ``B`` pictures, ``M = h·w`` image tokens, ``N`` text tokens, latents ``[B, c, H, W]``. Where the released code departs
from the paper, ``released=True`` follows it: its sum of powers is ``(S + 3·S²)/4``, its Gaussian is ``exp(−x²/4σ²)``, and it
renormalises after completion and smoothing, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-8


def renormalise(maps: Tensor) -> Tensor:
    """Every token's map over its mean in space, so that no token wins everywhere: ``[..., h, w]`` to the same."""
    return maps / (maps.mean(dim=(-2, -1), keepdim=True) + TINY)


def complete(self_map: Tensor, cross: Tensor, powers: int, released: bool = False) -> Tensor:
    """Fill holes and sharpen borders with self-attention: ``Ĉ = Ŝ C`` with ``Ŝ = (1/R) Σ_{r=1..R} S^r``.

    No power of ``S`` is formed: ``S^r C = S (S^{r-1} C)``.

    Args:
        self_map: ``S [B, M, M]``, rows sum to one.
        cross: ``C [B, M, N]``.
        powers: ``R``; 0 returns ``cross``.
    """
    if powers == 0:
        return cross
    power = total = self_map @ cross
    for _ in range(powers - 1):
        power = self_map @ (total if released else power)
        if released:  # its loop never gets past the square
            return (total + (powers - 1) * power) / powers
        total = total + power
    return total / powers


def smooth(maps: Tensor, sigma: float, released: bool = False) -> Tensor:
    """3×3 Gaussian over space, mirrored at the border; ``[B, N, h, w]``, sigma in pixels, 0 changes nothing."""
    if sigma == 0 or min(maps.shape[-2:]) < 2:
        return maps
    from kornia.filters import gaussian_blur2d

    deviation = sigma * (2**0.5 if released else 1)
    return gaussian_blur2d(maps, (3, 3), (deviation, deviation), border_type="reflect")


def layer_maps(
    cross: Tensor,
    self_map: Tensor | None,
    grid: tuple[int, int],
    size: tuple[int, int],
    powers: int = 4,
    sigma: float = 0.5,
    released: bool = False,
) -> Tensor:
    """One layer's renormalised map of every token (section 3.2); the regions come from their mean over layers.

    Args:
        cross: ``C [B, M, N]``, heads averaged.
        self_map: ``S [B, M, M]``, heads averaged; None skips the completion.
        grid: the layer's ``(h, w)``.
        size: grid of the result; other grids are resized (bilinear).

    Returns:
        ``[B, N, *size]``.
    """
    if not released:
        cross = cross / (cross.mean(dim=1, keepdim=True) + TINY)
    if self_map is not None:
        cross = complete(self_map, cross, powers, released)
    maps = cross.transpose(1, 2).unflatten(2, grid)
    if grid != size:
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    maps = smooth(maps, sigma, released)
    return renormalise(maps) if released else maps


def against_start(cross: Tensor, start: int | Tensor = 0) -> Tensor:
    """The start token's attention and that of all others together: ``[B, M, N]`` to ``[B, M, 2]``.

    Regions of these two are background (0) and foreground (1). A column that only the device knows is a tensor ``[1]``.
    """
    background = cross.index_select(-1, start)[..., 0] if isinstance(start, Tensor) else cross[..., start]
    return torch.stack([background, cross.sum(dim=-1) - background], dim=-1)


def regions(maps: Tensor) -> Tensor:
    """The token that owns each pixel: ``[B, N, h, w]`` to ``int64 [B, h, w]``. As one-hot masks ``m_i`` they partition the picture."""
    return maps.argmax(dim=1)


def enlarge(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Regions or masks at another size, nearest pixel: ``[B, h, w]`` to ``[B, *size]``, same type."""
    if labels.shape[-2:] == size:
        return labels
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0].to(labels.dtype)


class Part(NamedTuple):
    """One conditioning: its maps ``[B, N, h, w]``, its place in the latent ``(top, left)``, and its weight there ``[B, a, b]``."""

    maps: Tensor
    place: tuple[int, int]
    weight: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return (self.weight.shape[-2], self.weight.shape[-1])

    @property
    def where(self) -> tuple[slice, ...]:
        (top, left), (height, width) = self.place, self.size
        return (slice(None), slice(top, top + height), slice(left, left + width))


def ownership(parts: Sequence[Part], like: Tensor) -> tuple[Tensor, int]:
    """Who owns each pixel where several prompts have areas: the token whose map, times its prompt's weight, is largest.

    Args:
        like: the latent ``[B, c, H, W]``.

    Returns:
        ``int64 [B, H, W]``, 0 where no prompt applies, then the tokens of the first prompt from 1, of the second, …; and how many there are.
    """
    best = torch.full((like.shape[0], *like.shape[-2:]), -torch.inf, device=like.device)
    owner = torch.zeros(best.shape, dtype=torch.int64, device=like.device)
    count = 1
    for part in parts:
        top = F.interpolate(part.maps.amax(dim=1, keepdim=True), size=part.size, mode="nearest")[:, 0] * part.weight
        label = enlarge(regions(part.maps), part.size) + count
        count += part.maps.shape[1]
        wins = (top > best[part.where]) & (part.weight > 0)
        owner[part.where] = torch.where(wins, label, owner[part.where])
        best[part.where] = torch.where(wins, top, best[part.where])
    return owner, count


def foreground(parts: Sequence[Part], like: Tensor) -> Tensor:
    """Where all other tokens of the prompts together stand out more than the start token, ``bool [B, H, W]``.

    Args:
        parts: with the two maps of `against_start`.
        like: the latent ``[B, c, H, W]``.
    """
    margin = torch.zeros((like.shape[0], *like.shape[-2:]), device=like.device)
    for part in parts:
        difference = F.interpolate(part.maps[:, 1:] - part.maps[:, :1], size=part.size, mode="nearest")[:, 0]
        margin[part.where] += difference * part.weight
    return margin > 0


def guidance_norm(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """``δ = ‖ε_c − ε_u‖`` per pixel: ``[B, c, H, W]`` twice to ``[B, H, W]``.

    Any prediction that is a fixed multiple of the noise's (the denoised picture, v, a flow's velocity) gives the same ratios.
    """
    return torch.linalg.vector_norm((conditional - unconditional).float(), dim=1)


def ratios(
    delta: Tensor,
    owner: Tensor,
    reference: Tensor,
    min_ratio: float = 0.8,
    max_ratio: float = 3.0,
    limit: float = float("inf"),
    sigma: float = 0.5,
    count: int | None = None,
    released: bool = False,
) -> Tensor:
    """``γ_i / γ = η_ref / η_i`` for the region of every pixel.

    Args:
        delta: ``δ [B, H, W]``.
        owner: the region of each pixel, ``int64 [B, H, W]``.
        reference: the reference region, ``bool [B, H, W]``; where it is empty, every ratio is 1.
        min_ratio, max_ratio: bounds of the ratio.
        limit: a second upper bound (the highest scale wanted over ``γ``).
        sigma: smoothing of the result in pixels, 0 for none.
        count: number of regions; given, it spares a wait for the device.

    Returns:
        ``[B, H, W]``, float32.
    """
    count = int(owner.max()) + 1 if count is None else count
    flat, values = owner.flatten(1), delta.flatten(1)
    area = torch.zeros(len(flat), count, device=delta.device, dtype=values.dtype).scatter_add_(1, flat, torch.ones_like(values))
    eta = torch.zeros_like(area).scatter_add_(1, flat, values) / area.clamp_min(1)
    inside = reference.flatten(1).to(values.dtype)
    eta_reference = (values * inside).sum(1, keepdim=True) / (inside.sum(1, keepdim=True) + TINY)
    ratio = (eta_reference / (eta + TINY)).gather(1, flat).unflatten(1, owner.shape[1:])
    ratio = torch.where(reference.flatten(1).any(1)[:, None, None], ratio, torch.ones_like(ratio))
    excess = ratio.clamp(min_ratio, max_ratio).clamp_max(limit) - 1
    return 1 + smooth(excess[:, None], sigma, released)[:, 0]


def evened(conditional: Tensor, unconditional: Tensor, scale: float, ratio: Tensor) -> Tensor:
    """The unconditional prediction with which CFG at scale ``γ ≠ 1`` is S-CFG: ``x_u − γ(r − 1)/(γ − 1)·(x_c − x_u)``.

    So whatever CFG is done by, a rescale to the conditional's deviation for one, has the regions' scales in it. A ratio of 1 changes nothing.
    """
    factor = scale / (scale - 1) * (ratio - 1)[:, None].to(unconditional.dtype)
    return unconditional - factor * (conditional - unconditional)
