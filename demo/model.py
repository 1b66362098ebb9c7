"""The bundled "shapes" model as real ComfyUI objects, trained on pictures of 128×128; its weights are one file.

`load` gives what Load Checkpoint gives for an SD1.5 file: a ModelPatcher, a CLIP and a VAE.
"""

from __future__ import annotations

from pathlib import Path

import comfy.model_patcher
import comfy.sd
from torch import Tensor

from . import checkpoint

WEIGHTS = Path(__file__).parent / "weights"
VARIANTS = ("shapes",)
ARCHITECTURE = checkpoint.Architecture(pixels=128, latents=16, levels=(1, 2), blocks=(1, 2), autoencoder_levels=(1, 1, 2, 2))


def stored(variant: str = VARIANTS[0]) -> dict[str, dict[str, Tensor]]:
    """The shipped weights in float32: a state for each of denoiser, text and autoencoder, and the preview's colours.

    Raises:
        ValueError: for an unknown variant.
        FileNotFoundError: when the weights are missing from the pack's folder.
    """
    if variant not in VARIANTS:
        raise ValueError(f"there is no demo model “{variant}”; choose one of: {', '.join(VARIANTS)}")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.read(WEIGHTS / f"{variant}.safetensors").items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return {**parts, "text": checkpoint.whole_table(parts["text"])}


def load(variant: str = VARIANTS[0]) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the bundled model; errors as in `stored`."""
    parts = stored(variant)
    model = ARCHITECTURE.model(parts["denoiser"], parts["preview"]["factors"])
    return model, checkpoint.clip(parts["text"]), ARCHITECTURE.vae(parts["autoencoder"])
