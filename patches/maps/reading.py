"""What the maps of a run say of each token: layers and steps brought together."""

from __future__ import annotations

import torch
from torch import Tensor

from ...methods import scfg
from ...methods.maps import folded, resize
from .record import Place, Record


def token_maps(
    record: Record,
    columns: int | None = None,
    powers: int = 0,
    sigma: float = 0.0,
    step: int | None = None,
    against_start: bool = False,
) -> Tensor:
    """Every token's renormalised map from all captured layers, ``[pictures, N, h, w]`` on the finest captured grid.

    Args:
        columns: the prompt's own number of text columns (see `folded`); None takes what is there.
        powers: of the completion by self-attention, where that was captured.
        step: one kept step, or None for the mean of all kept ones.
        against_start: two maps only, the start token's and that of all others together.

    Raises:
        ValueError: when the maps hold no attention to text, or are of another prompt.
    """
    size = _finest(record)
    layers = []
    for name, place in record.cross.items():
        cross = _mean(place, step).mean(dim=1)
        cross = cross if columns is None else folded(cross, columns)
        if against_start:
            cross = scfg.against_start(cross, start_column(record, cross.shape[-1]))
        own = None
        if powers and name in record.pixels:
            own = _mean(record.pixels[name], step)[:, 0]
            own = own / own.sum(dim=-1, keepdim=True)  # in joint attention a pixel also looks at words
        layers.append(scfg.layer_maps(cross, own, place.grid, size, powers, sigma))
    return torch.stack(layers).mean(dim=0)


def _finest(record: Record) -> tuple[int, int]:
    """The finest captured grid."""
    if not record.cross:
        raise ValueError("these maps hold no attention to text: set kind to “cross” or “both” in Capture Attention Maps.")
    return max((p.grid for p in record.cross.values()), key=lambda g: g[0] * g[1])


def attention(record: Record, columns: int) -> Tensor:
    """What each place gives to every token, ``[pictures, N, h, w]`` on the finest captured grid: mean weights, of which a place has 1 in all.

    Raises:
        ValueError: as `token_maps`.
    """
    size = _finest(record)
    layers = []
    for place in record.cross.values():
        cross = folded(_mean(place, None).mean(dim=1), columns)
        layers.append(resize(cross.transpose(1, 2).unflatten(2, place.grid), size))
    return torch.stack(layers).mean(dim=0)


def start_column(record: Record, columns: int) -> int:
    """The column that takes what nothing else wants, the background: CLIP's start token in a UNet, elsewhere the most attended one."""
    if next(iter(record.cross)).startswith(("input.", "middle.", "output.")):
        return 0
    attention = [folded(_mean(place, None), columns).mean(dim=(0, 1, 2)) for place in record.cross.values()]
    return int(torch.stack(attention).sum(dim=0).argmax())


def _mean(place: Place, step: int | None) -> Tensor:
    """A kept step, or the mean of all: ``[pictures, heads, M, N]`` in float32."""
    frames = list(place.frames.values()) if step is None else [place.frames[step]]
    return torch.stack([f.float() for f in frames]).mean(dim=0)
