"""The bundled "shapes" model as real ComfyUI objects: UNetModel, SD1-style CLIP-L and AutoencoderKL, only smaller.

`load` gives what Load Checkpoint gives for an SD1.5 file: a ModelPatcher, a CLIP and a VAE. `unet`, `text_tower` and
`autoencoder` build the bare modules for training.
"""

from __future__ import annotations

from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import torch
from comfy.clip_model import CLIPTextModel
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

WEIGHTS = Path(__file__).parent / "weights"
VARIANTS = ("shapes",)
TOKEN_ROWS = "text_model.embeddings.token_embedding.weight"

TEXT_CONFIG = {
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

UNET_CONFIG = {
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

AUTOENCODER_CONFIG = {
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
