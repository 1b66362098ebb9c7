"""The bundled "shapes" model as real ComfyUI objects: UNetModel, SD1-style CLIP-L and AutoencoderKL, only smaller.

`load` gives what Load Checkpoint gives for an SD1.5 file: a ModelPatcher, a CLIP and a VAE. `unet`, `text_tower` and
`autoencoder` build the bare modules for training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy.clip_model import CLIPTextModel
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

WEIGHTS = Path(__file__).parent / "weights"
VARIANTS = ("shapes",)
LATENT_SCALE = 0.18215  # SD1.5's, met by scaling the autoencoder's own latents
TOKEN_ROWS = "text_model.embeddings.token_embedding.weight"

TEXT_CONFIG: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "projection_dim": 128,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "eos_token_id": 49407,
    "layer_norm_eps": 1e-5,
}

UNET_CONFIG: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 2],
    "num_heads": 4,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1],
    "context_dim": TEXT_CONFIG["hidden_size"],
    "use_linear_in_transformer": False,
    "legacy": False,
}

AUTOENCODER_CONFIG: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 128,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def unet() -> UNetModel:
    """The bare denoiser, weights not initialised."""
    return UNetModel(**UNET_CONFIG, dtype=torch.float32, device=None, operations=comfy.ops.disable_weight_init)


def text_tower() -> CLIPTextModel:
    """The bare text encoder, weights not initialised."""
    return CLIPTextModel(TEXT_CONFIG, torch.float32, None, comfy.ops.disable_weight_init)


def autoencoder() -> AutoencoderKL:
    """The bare autoencoder, weights not initialised."""
    return AutoencoderKL(ddconfig=AUTOENCODER_CONFIG, embed_dim=4)


class LatentFormat(comfy.latent_formats.SD15):
    """SD1.5's latents, with our own colours for previews."""

    def __init__(self) -> None:
        super().__init__()
        self.taesd_decoder_name = None


class Shapes(comfy.supported_models.SD15):
    """SD1.5 with smaller numbers."""

    unet_config = UNET_CONFIG
    unet_extra_config: ClassVar = {"num_heads": UNET_CONFIG["num_heads"], "num_head_channels": -1}
    latent_format = LatentFormat


def stored(variant: str = VARIANTS[0]) -> dict[str, dict[str, torch.Tensor]]:
    """The shipped weights in float32: a state for each of denoiser, text and autoencoder, and the preview's colours.

    Raises:
        ValueError: for an unknown variant.
        FileNotFoundError: when the weights are missing from the pack's folder.
    """
    if variant not in VARIANTS:
        raise ValueError(f"there is no demo model “{variant}”; choose one of: {', '.join(VARIANTS)}")
    path = WEIGHTS / f"{variant}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"the demo model's weights are missing ({path}); install the pack again, they come with it")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in comfy.utils.load_torch_file(str(path), safe_load=True).items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor.float()
    # Only the token rows of the world's own words are stored; every other word of CLIP's vocabulary means their average.
    numbers, rows = parts["text"].pop("token_numbers").long(), parts["text"].pop("token_rows")
    table = rows.mean(0, keepdim=True).repeat(TEXT_CONFIG["vocab_size"], 1)
    table[numbers] = rows
    parts["text"][TOKEN_ROWS] = table
    return parts


def load(variant: str = VARIANTS[0]) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the bundled model; errors as in `stored`."""
    parts = stored(variant)
    return _model(parts["denoiser"], parts["preview"]["factors"]), _clip(parts["text"]), _vae(parts["autoencoder"])


def _model(weights: dict[str, torch.Tensor], preview: torch.Tensor) -> comfy.model_patcher.ModelPatcher:
    config = Shapes(UNET_CONFIG)
    device = comfy.model_management.get_torch_device()
    count = sum(t.numel() for t in weights.values())
    dtype = comfy.model_management.unet_dtype(model_params=count, supported_dtypes=config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes))
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model(weights, "", device=offload)
    model.load_model_weights(dict(weights), "")
    model.latent_format.latent_rgb_factors = preview[:4].tolist()
    model.latent_format.latent_rgb_factors_bias = preview[4].tolist()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def _clip(weights: dict[str, torch.Tensor]) -> comfy.sd.CLIP:
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    folders = folder_paths.get_folder_paths("embeddings")
    clip = comfy.sd.CLIP(target, embedding_directory=folders, model_options={"clip_l_model_config": TEXT_CONFIG})
    clip.load_sd({**weights})
    return clip


def _vae(weights: dict[str, torch.Tensor]) -> comfy.sd.VAE:
    return comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": AUTOENCODER_CONFIG, "embed_dim": 4}})
