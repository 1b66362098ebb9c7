"""The bundled models as real ComfyUI objects: "shapes", trained on pictures of 128×128, whose weights are one file, and "stickers".

`load` gives what Load Checkpoint gives for an SD1.5 file: a ModelPatcher, a CLIP and a VAE.
"""

from __future__ import annotations

from pathlib import Path

import comfy.model_patcher
import comfy.sd
from torch import Tensor

from . import checkpoint
from .stickers import model as stickers

WEIGHTS = Path(__file__).parent / "weights"
SIDES = {"shapes": 128, "stickers": 256}  # pixels of the pictures that each was trained on
VARIANTS = tuple(SIDES)
ARCHITECTURE = checkpoint.Architecture(pixels=128, latents=16, levels=(1, 2), blocks=(1, 2), autoencoder_levels=(1, 1, 2, 2))


def files(variant: str = VARIANTS[0]) -> list[Path]:
    """The files of a model's weights.

    Raises:
        ValueError: for an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"there is no demo model “{variant}”; choose one of: {', '.join(VARIANTS)}")
    if variant == VARIANTS[0]:
        return [WEIGHTS / f"{variant}.safetensors"]
    return [stickers.WEIGHTS / f"{part}.safetensors" for part in stickers.PARTS]


def stored() -> dict[str, dict[str, Tensor]]:
    """The shipped weights of "shapes" in float32: a state for each of denoiser, text and autoencoder, and the preview's colours.

    Raises:
        FileNotFoundError: when the weights are missing from the pack's folder.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.read(files()[0]).items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return {**parts, "text": checkpoint.whole_table(parts["text"])}


def load(variant: str = VARIANTS[0]) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of a bundled model; errors as in `files` and `stored`."""
    if variant != VARIANTS[0]:
        files(variant)
        return stickers.load()
    parts = stored()
    model = ARCHITECTURE.model(parts["denoiser"], parts["preview"]["factors"])
    return model, checkpoint.clip(parts["text"]), ARCHITECTURE.vae(parts["autoencoder"])
