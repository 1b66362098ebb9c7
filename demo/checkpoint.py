"""What both bundled models are: SD1.5's own ComfyUI classes (UNetModel, CLIP-L, AutoencoderKL), only with smaller numbers.

A model's file names its `Architecture` and where its weights are; this builds the bare modules for training, and of stored
weights what Load Checkpoint gives for an SD1.5 file.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from torch import Tensor

LATENT_SCALE = 0.18215  # SD1.5's, met by scaling the autoencoder's own latents
TOKEN_ROWS = "text_model.embeddings.token_embedding.weight"
HEADS = 4  # in every layer of the denoiser

TEXT: dict[str, Any] = {
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


class LatentFormat(comfy.latent_formats.SD15):
    """SD1.5's latents, with our own colours for previews."""

    def __init__(self) -> None:
        super().__init__()
        self.taesd_decoder_name = None


class Small(comfy.supported_models.SD15):
    """SD1.5 with smaller numbers."""

    unet_extra_config: ClassVar = {"num_heads": HEADS, "num_head_channels": -1}
    latent_format = LatentFormat


@dataclass(frozen=True)
class Architecture:
    """The numbers in which a bundled model differs from another."""

    pixels: int  # side of the pictures it was trained on
    latents: int  # side of their latents
    levels: tuple[int, ...]  # channels at each of the denoiser's scales, in multiples of 64
    blocks: tuple[int, ...]  # residual blocks, each with a transformer, at each of them
    autoencoder_levels: tuple[int, ...]  # likewise, in multiples of 32

    @property
    def unet_config(self) -> dict[str, Any]:
        return {
            "image_size": self.latents,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 64,
            "channel_mult": list(self.levels),
            "num_res_blocks": list(self.blocks),
            "num_heads": HEADS,
            "num_head_channels": -1,
            "use_spatial_transformer": True,
            "transformer_depth": [1] * sum(self.blocks),
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1] * sum(n + 1 for n in self.blocks),
            "context_dim": TEXT["hidden_size"],
            "use_linear_in_transformer": False,
            "legacy": False,
        }

    @property
    def autoencoder_config(self) -> dict[str, Any]:
        return {
            "double_z": True,
            "z_channels": 4,
            "resolution": self.pixels,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": list(self.autoencoder_levels),
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        }

    def unet(self) -> UNetModel:
        """The bare denoiser, weights not initialised."""
        return UNetModel(**self.unet_config, dtype=torch.float32, device=None, operations=comfy.ops.disable_weight_init)

    def autoencoder(self) -> AutoencoderKL:
        """The bare autoencoder, weights not initialised."""
        return AutoencoderKL(ddconfig=self.autoencoder_config, embed_dim=4)

    def model(
        self, weights: dict[str, Tensor], preview: Tensor, sigmas: Tensor | None = None
    ) -> comfy.model_patcher.ModelPatcher:
        """The MODEL; ``preview [5, 3]`` has the colours of four latent channels and of a constant, ``sigmas`` replace SD1.5's."""
        config = Small(self.unet_config)
        device = comfy.model_management.get_torch_device()
        count = sum(t.numel() for t in weights.values())
        dtype = comfy.model_management.unet_dtype(model_params=count, supported_dtypes=config.supported_inference_dtypes)
        config.set_inference_dtype(
            dtype, comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
        )
        offload = comfy.model_management.unet_offload_device()
        model = config.get_model(weights, "", device=offload)
        if sigmas is not None:
            model.model_sampling.set_sigmas(sigmas)
        model.load_model_weights(dict(weights), "")
        model.latent_format.latent_rgb_factors = preview[:4].tolist()
        model.latent_format.latent_rgb_factors_bias = preview[4].tolist()
        return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)

    def vae(self, weights: dict[str, Tensor]) -> comfy.sd.VAE:
        """The VAE."""
        return comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": self.autoencoder_config, "embed_dim": 4}})


def text_tower() -> CLIPTextModel:
    """The bare text encoder, weights not initialised."""
    return CLIPTextModel(TEXT, torch.float32, None, comfy.ops.disable_weight_init)


def clip(weights: dict[str, Tensor]) -> comfy.sd.CLIP:
    """The CLIP, with CLIP's own tokenizer."""
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    folders = folder_paths.get_folder_paths("embeddings")
    found = comfy.sd.CLIP(target, embedding_directory=folders, model_options={"clip_l_model_config": TEXT})
    found.load_sd({**weights})
    return found


def read(path: Path) -> dict[str, Tensor]:
    """Stored weights, in float32.

    Raises:
        FileNotFoundError: when the file is missing from the pack's folder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the demo model's weights are missing ({path}); install the pack again, they come with it")
    stored = comfy.utils.load_torch_file(str(path), safe_load=True)
    return {name: tensor if name.endswith("token_numbers") else tensor.float() for name, tensor in stored.items()}


def whole_table(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder's weights with CLIP's whole token table.

    Only the rows of the world's own words are stored; every other word of CLIP's vocabulary means their average.
    """
    weights = dict(weights)
    numbers, rows = weights.pop("token_numbers").long(), weights.pop("token_rows")
    table = rows.mean(0, keepdim=True).repeat(TEXT["vocab_size"], 1)
    table[numbers] = rows
    return {**weights, TOKEN_ROWS: table}
