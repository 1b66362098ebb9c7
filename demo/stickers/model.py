"""The bundled "stickers" model as real ComfyUI objects, trained on pictures of 256×256; its weights are a file each part.

`load` gives what Load Checkpoint gives for an SD1.5 file: a ModelPatcher, a CLIP and a VAE.
"""

from __future__ import annotations

from pathlib import Path

import comfy.model_patcher
import comfy.sd
import torch
from safetensors import safe_open
from torch import Tensor

from .. import checkpoint

WEIGHTS = Path(__file__).parent / "weights"
PARTS = ("denoiser", "text", "autoencoder")  # a file each
ARCHITECTURE = checkpoint.Architecture(
    pixels=256, latents=32, levels=(1, 2, 3), blocks=(1, 1, 1), autoencoder_levels=(1, 1, 2, 4)
)


def noise_levels() -> Tensor:
    """σ of the 1,000 training steps, ``float32 [1000]``: SD1.5's, halved for latents half as wide, but for the largest.

    The same σ destroys far more of a thing that is small in latent pixels; only the largest level, which has to hide the
    picture's mean, stays as it is, and the last fifth of the levels leads up to it.
    """
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - beta, 0)
    share = ((torch.arange(1000, dtype=torch.float64) - 800) / 199).clamp(0, 1)
    ramp = share**2 * (3 - 2 * share)
    return (((1 - kept) / kept).sqrt() * 0.5 ** (1 - ramp)).float()


def stored(part: str) -> dict[str, Tensor]:
    """The shipped weights of one of `PARTS`, in float32; `FileNotFoundError` when they are missing from the pack's folder."""
    weights = checkpoint.read(WEIGHTS / f"{part}.safetensors")
    return checkpoint.whole_table(weights) if part == "text" else weights


def metadata(part: str) -> dict[str, str]:
    """What the file of one of `PARTS` says of itself."""
    with safe_open(WEIGHTS / f"{part}.safetensors", framework="pt") as file:
        return file.metadata() or {}


def load() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the bundled model; errors as in `stored`."""
    weights = stored("autoencoder")
    preview = weights.pop("preview_factors")
    model = ARCHITECTURE.model(stored("denoiser"), preview, noise_levels())
    return model, checkpoint.clip(stored("text")), ARCHITECTURE.vae(weights)
