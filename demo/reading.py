"""What the readers of both worlds share: their weights from a file, and pictures as they take them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def trained(reader: Network, path: str | Path, version: str) -> Network:
    """A reader with its trained weights, ready to read.

    Raises:
        ValueError: when they were trained on another version of the world.
    """
    with safe_open(str(path), framework="pt") as file:
        found = (file.metadata() or {}).get("data_version")
        if found != version:
            raise ValueError(f"{path} reads version {found} of the world, which is now {version}")
        reader.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return reader.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def channels_first(images: Tensor, multiple: int) -> Tensor:
    """``float [B, 3, H, W]`` in [0, 1] from that or from ComfyUI's ``[B, H, W, 3]``, with sides divisible by ``multiple``."""
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % multiple or images.shape[3] % multiple:
        raise ValueError(
            f"pictures must be [B, 3, H, W] or [B, H, W, 3] with sides divisible by {multiple}, not {list(images.shape)}"
        )
    return images.float().clamp(0, 1)
