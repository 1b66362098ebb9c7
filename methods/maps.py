"""Attention maps as pictures and masks.

Shapes: ``B`` pictures, ``N`` text tokens, ``h × w`` the maps' grid, pictures ``[B, H, W, 3]`` in [0, 1] as in ComfyUI. Maps are
renormalised over space (`scfg.layer_maps`): a value of 1 is average attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Okabe and Ito's colours, told apart by colour-blind eyes too; grey is the background.
COLOURS = (
    (0.35, 0.35, 0.35),
    (0.90, 0.62, 0.00),
    (0.34, 0.71, 0.91),
    (0.00, 0.62, 0.45),
    (0.94, 0.89, 0.26),
    (0.00, 0.45, 0.70),
    (0.84, 0.37, 0.00),
    (0.80, 0.47, 0.65),
)


def phrase_maps(maps: Tensor, phrases: Sequence[Sequence[int]]) -> Tensor:
    """The mean map of each phrase's columns: ``[B, N, h, w]`` to ``[B, len(phrases), h, w]``."""
    return torch.stack([maps[:, list(columns)].mean(dim=1) for columns in phrases], dim=1)


def folded(cross: Tensor, columns: int) -> Tensor:
    """Text columns of the prompt's own length: ComfyUI repeats a short prompt that shares a batch with a longer one.

    ``[..., k·columns]`` to ``[..., columns]``.

    Raises:
        ValueError: when the maps were made with another prompt.
    """
    have = cross.shape[-1]
    if have % columns:
        raise ValueError(
            f"these words have {columns} text columns and the attention maps have {have}: they are of different prompts. Connect the "
            "prompt and CLIP that the sampler uses to Prompt Words."
        )
    return cross.unflatten(-1, (have // columns, columns)).sum(dim=-2)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, ``[B, n, h, w]`` to ``[B, n, *size]``."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def added(total: Tensor | None, maps: Tensor) -> Tensor:
    """A running sum of maps ``[B, n, h, w]``, whose size may change from layer to layer and from step to step: at the larger size."""
    if total is None:
        return maps
    size = (max(total.shape[-2], maps.shape[-2]), max(total.shape[-1], maps.shape[-1]))
    return sum(m if m.shape[-2:] == size else resize(m, size) for m in (total, maps))  # type: ignore[return-value]


def resize_weights(weights: Tensor, grid: tuple[int, int], size: tuple[int, int], keys: bool = False) -> Tensor:
    """Attention weights of another grid: ``[B, H, h·w, N]`` to ``[B, H, M, N]`` with ``M`` the pixels of ``size``, bilinear.

    Args:
        keys: the keys ``N`` are the grid's pixels too: each then gets its share of what it was a part of, so that rows sum to the same.
    """
    out = resize(weights.transpose(-1, -2).flatten(0, 1).float().unflatten(-1, grid), size).flatten(-2)  # [B·H, N, M]
    out = out.transpose(-1, -2).unflatten(0, weights.shape[:2])
    if keys:
        spread = resize(out.flatten(0, 1).unflatten(-1, grid), size).flatten(-2).unflatten(0, weights.shape[:2])
        out = spread * (out.sum(dim=-1, keepdim=True) / spread.sum(dim=-1, keepdim=True))
    return out.to(weights.dtype)


def minmax(maps: Tensor) -> Tensor:
    """Each map ``[..., h, w]`` over its own range: least 0, most 1; one that is the same everywhere is 0."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def segment(maps: Tensor, phrases: Sequence[Sequence[int]], size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Who owns each pixel: the phrase that stands out most there, or nobody where none is above ``threshold`` of its own range.

    The threshold is Detail++'s mask (arXiv 2507.17853, eq. 3); S-CFG's argmax alone gives every pixel to some word, and words
    whose attention is even all over take the background.

    Returns:
        ``int64 [B, *size]``: 0 background, ``i`` phrase ``i`` (from 1).
    """
    most, owner = minmax(resize(phrase_maps(maps, phrases), size)).max(dim=1)
    return torch.where(most > threshold, owner + 1, 0)


def foreground(pair: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the words together stand out more than the start token: S-CFG's foreground.

    Args:
        pair: the start token's map and that of all others, ``[B, 2, h, w]`` (`scfg.against_start`).

    Returns:
        ``int64 [B, *size]``: 0 background, 1 foreground.
    """
    return resize(pair, size).argmax(dim=1)


def masks(labels: Tensor, count: int) -> Tensor:
    """Labels ``[B, H, W]`` of `segment` to hard masks ``[count, B, H, W]``, one per phrase."""
    return torch.stack([(labels == i + 1).float() for i in range(count)])


def heat(image: Tensor, maps: Tensor, opacity: float = 0.6) -> Tensor:
    """Heat of one map over its picture: ``[B, H, W, 3]`` and ``[B, H, W]`` in [0, 1] to ``[B, H, W, 3]``."""
    from kornia.color import ColorMap, apply_colormap

    colours = ColorMap(base="plasma", num_colors=256, device=maps.device, dtype=torch.float32)
    painted = apply_colormap((maps[:, None] * 255).round(), colours).movedim(1, -1)
    return torch.lerp(image, painted.to(image.dtype), opacity)


def paint(image: Tensor, labels: Tensor, opacity: float = 0.55) -> Tensor:
    """Regions in colour over their picture: ``[B, H, W, 3]`` and ``int64 [B, H, W]`` to ``[B, H, W, 3]``. Colours repeat after seven."""
    table = torch.tensor(COLOURS, device=image.device, dtype=image.dtype)
    painted = table[torch.where(labels == 0, 0, (labels - 1) % (len(COLOURS) - 1) + 1)]
    return torch.lerp(image, painted, opacity)
