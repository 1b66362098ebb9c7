"""Scenes of the world of shapes as pictures, and many of them with their latents, kept on disk for the later stages."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ...demo import world
from ...demo.checkpoint import LATENT_SCALE
from .stage import CHECKPOINTS


def pictures(scenes: list[world.Scene]) -> Tensor:
    """``float [B, 3, SIZE, SIZE]`` in [-1, 1]."""
    batch = np.stack([world.render(s) for s in scenes])
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def take(source: Iterator[world.Scene], count: int) -> list[world.Scene]:
    return [next(source) for _ in range(count)]


def make_pool(autoencoder: nn.Module, number: int, split: str = "train") -> tuple[Tensor, list[world.Scene]]:
    """``float16 [number, 4, 16, 16]`` latents of deviation 1, and their scenes; kept on disk."""
    path = CHECKPOINTS / ("pool.pt" if split == "train" else f"pool_{split}.pt")
    source = world.scenes(split, 1)
    scenes = take(source, number)
    if path.exists():
        latents = torch.load(path, weights_only=True)
        if len(latents) == number:
            return latents, scenes
    latents = torch.empty(number, 4, world.SIZE // 8, world.SIZE // 8, dtype=torch.float16)
    encode = torch.compile(lambda x: autoencoder.quant_conv(autoencoder.encoder(x)))
    size, began = 50, time.time()
    for start in range(0, number, size):
        batch = pictures(scenes[start : start + size]).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents[start : start + size] = (encode(batch)[:, :4] * LATENT_SCALE).half()
        if start % 5000 == 0:
            print(f"pool: {start} of {number}, {(start + size) / (time.time() - began):.0f}/s", flush=True)
    torch.save(latents, path)
    return latents, scenes
