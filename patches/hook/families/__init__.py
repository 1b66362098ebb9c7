"""The kinds of models that the hook knows, one short description each.

To add one: a file with a `Family`, and its line in `FAMILIES`.
"""

from __future__ import annotations

from torch import nn

from ..sites import Site
from .base import Family
from .cosmos import Anima, Cosmos
from .flux import Chroma, Flux, Flux2
from .krea2 import Krea2
from .lumina import Lumina2, ZImage
from .qwen_image import QwenImage
from .qwen_image21 import QwenImage21
from .sd3 import SD3
from .unet import UNet
from .wan import Wan

FAMILIES: tuple[type[Family], ...] = (
    UNet,
    SD3,
    Flux,
    Flux2,
    Chroma,
    QwenImage,
    QwenImage21,
    ZImage,
    Lumina2,
    Krea2,
    Wan,
    Cosmos,
    Anima,
)

WHY = {  # of models that people might expect to work, by ComfyUI's class
    "Flux": "Of the models that share FLUX's class, it knows FLUX.1 and FLUX.2, not Ovis or LongCat.",
    "ChromaRadiance": "It knows Chroma, but not Chroma Radiance, which draws pixels in place of a latent.",
    "NextDiTPixelSpace": "It knows Z-Image, but not its form that draws pixels in place of a latent.",
    "HiDreamImageTransformer2DModel": "HiDream gives every block a text of its own, so that a word has no place that holds for all of them.",
    "HunyuanVideo": "HunyuanVideo and HunyuanImage may put pictures and a second text before, after or into the text, which it "
    "cannot tell apart.",
    "ErnieImageModel": "ComfyUI tells Ernie-Image's attention nothing of the run, so that nothing can be added there.",
    "PixArtMS": "ComfyUI tells PixArt's attention nothing of the run, so that nothing can be added there.",
    "WanModel": "Of Wan's models, it knows those without a CLIP picture or a reference latent.",
}


def family_of(diffusion_model: nn.Module) -> Family:
    """The description of a model.

    Raises:
        ValueError: for a model that this pack has no sites for.
    """
    for kind in FAMILIES:
        if kind.fits(diffusion_model):
            return kind(diffusion_model)
    name = type(diffusion_model).__name__
    why = f" {WHY[name]}" if name in WHY else ""
    raise ValueError(
        f"Attune does not know the model class {name}.{why} "
        "It works with SD1.5, SD2, SDXL, SD3 and SD3.5, FLUX.1, FLUX.2, Chroma, Qwen-Image 1 and 2.1, Z-Image, Lumina 2, Krea 2, Wan from "
        "text, Cosmos Predict 2 and Anima; connect one of these."
    )


def family(diffusion_model: nn.Module) -> str:
    """The name of a model's family, as ``unet`` or ``flux``.

    Raises:
        ValueError: for a model that this pack has no sites for.
    """
    return family_of(diffusion_model).name


def sites(diffusion_model: nn.Module) -> tuple[Site, ...]:
    """Every site of a model in order of execution.

    Raises:
        ValueError: for a model that this pack has no sites for.
    """
    found = family_of(diffusion_model).sites()
    if not found:
        raise ValueError(f"this {type(diffusion_model).__name__} has no attention layers for Attune to work on")
    return tuple(found)
