"""Layers and heads of a model before it is loaded: from the names and shapes in its file, or from a published architecture.

Models are built on torch's meta device, which gives every module and no weights, and asked for their sites as a real one is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.supported_models
import folder_paths
import torch
from comfy.ldm.flux.model import FluxParams

from ..patches.head_presets import PRESETS as HEAD_PRESETS
from ..patches.head_presets import fits, preset_heads
from ..patches.hook.families import family, sites
from ..patches.hook.sites import Heads, Site
from ..patches.softpag import default_heads

FOLDERS = ("checkpoints", "diffusion_models")
_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
}
_NEWER: dict[str, Any] = (
    {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
)  # asked for after ComfyUI 0.3.75
_FLUX2: dict[str, Any] = {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "context_in_dim": 15360,
    "mlp_ratio": 3.0,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "guidance_embed": True,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    **({"txt_ids_dims": [3]} if _NEWER else {}),
}
# The published numbers, as ComfyUI finds them in the files themselves.
PRESETS: dict[str, tuple[str, type, dict[str, Any]]] = {
    "sd15": (
        "SD1.5",
        comfy.supported_models.SD15,
        {
            **_UNET,
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4],
            "context_dim": 768,
            "num_heads": 8,
            "num_head_channels": -1,
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1] * 9 + [0] * 3,
            "use_linear_in_transformer": False,
        },
    ),
    "sdxl": (
        "SDXL",
        comfy.supported_models.SDXL,
        {
            **_UNET,
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "context_dim": 2048,
            "num_heads": -1,
            "num_head_channels": 64,
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
        },
    ),
    "sd3": (
        "SD3 medium",
        comfy.supported_models.SD3,
        {
            "input_size": None,
            "in_channels": 16,
            "patch_size": 2,
            "depth": 24,
            "adm_in_channels": 2048,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
            "pos_embed_scaling_factor": None,
            "pos_embed_max_size": 192,
            "num_patches": 36864,
        },
    ),
    "flux": (
        "FLUX",
        comfy.supported_models.Flux,
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "depth": 19,
            "depth_single_blocks": 38,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
            **_NEWER,
        },
    ),
    "flux2": (
        "FLUX.2 dev",
        comfy.supported_models.Flux2,
        {**_FLUX2, "hidden_size": 6144, "num_heads": 48, "depth": 8, "depth_single_blocks": 48},
    ),
    "flux2_klein": (
        "FLUX.2 klein 4B",
        comfy.supported_models.Flux2,
        {
            **_FLUX2,
            "context_in_dim": 7680,
            "guidance_embed": False,
            "hidden_size": 3072,
            "num_heads": 24,
            "depth": 5,
            "depth_single_blocks": 20,
        },
    ),
    "qwen_image": (
        "Qwen-Image",
        comfy.supported_models.QwenImage,
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60},
    ),
    "z_image": (
        "Z-Image",
        comfy.supported_models.ZImage,
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 3840,
            "cap_feat_dim": 2560,
            "n_layers": 30,
            "qk_norm": True,
            "n_heads": 30,
            "n_kv_heads": 30,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
    ),
    "wan": (
        "Wan 14B, text to video",
        comfy.supported_models.WAN21_T2V,
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 5120,
            "out_dim": 16,
            "num_heads": 40,
            "ffn_dim": 13824,
            "num_layers": 40,
            "patch_size": (1, 2, 2),
            "freq_dim": 256,
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "in_dim": 16,
        },
    ),
}


class UntoldError(ValueError):
    """A file that is there and does not tell its layers."""


def layout(model_sites: Iterable[Site], model_family: str, title: str = "") -> dict[str, Any]:
    """What the head picker draws, as plain data: every layer's name and number of heads in order, SoftPAG's default, and presets."""
    every = tuple(model_sites)
    mine = [name for name, preset in HEAD_PRESETS.items() if fits(preset, every, model_family)]
    return {
        "title": title,
        "family": model_family,
        "layers": [[site.name, site.heads] for site in every],
        "default": default_heads(model_family, every).text,
        "presets": {name: preset_heads(name, every, model_family).text for name in mine},
    }


def of_config(base: type, numbers: Mapping[str, Any], title: str) -> dict[str, Any]:
    """The layout of a model class of ComfyUI's with these numbers."""
    config = base(dict(numbers))
    config.set_inference_dtype(torch.float16, None)
    return _layout(config.get_model({}, "", device=torch.device("meta")), title)


def _layout(model: Any, title: str) -> dict[str, Any]:
    return layout(sites(model.diffusion_model), family(model.diffusion_model), title)


@cache
def preset(name: str) -> dict[str, Any]:
    """The layout of a published architecture.

    Raises:
        ValueError: for an unknown one.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset “{name}”: choose one of {', '.join(PRESETS)}.")
    title, base, numbers = PRESETS[name]
    return of_config(base, numbers, title)


def of_file(folder: str, name: str) -> dict[str, Any]:
    """The layout of a checkpoint or diffusion model by its file's header; no weight is read.

    Args:
        folder: one of `FOLDERS`, ``name``: as the loader's widget lists it.

    Raises:
        UntoldError: for a file that is no safetensors file, or a model that Attune does not know.
        ValueError: for another folder, or a file that is not in it or is broken.
    """
    if folder not in FOLDERS:
        raise ValueError(f"there is no model folder “{folder}”: choose one of {', '.join(FOLDERS)}.")
    if Path(name).suffix.lower() not in (".safetensors", ".sft"):  # GGUF loaders have folders of their own
        raise UntoldError(f"the layers of “{name}” can only be seen when it is loaded: run the workflow once.")
    if name not in folder_paths.get_filename_list(folder):
        raise ValueError(f"there is no “{name}” in ComfyUI's {folder}.")
    path = Path(folder_paths.get_full_path_or_raise(folder, name))
    return _of_header(path, path.stat().st_mtime_ns)


@cache
def _of_header(path: Path, changed: int) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    except (SafetensorError, OSError):
        raise ValueError(f"“{path.name}” cannot be read as a safetensors file; download it again.") from None
    prefix = comfy.model_detection.unet_prefix_from_state_dict(shapes)
    try:
        config = comfy.model_detection.model_config_from_unet(shapes, prefix, metadata=metadata)
        if config is None:
            raise TypeError
        config.set_inference_dtype(torch.float16, None)
        return _layout(config.get_model(shapes, prefix, device=torch.device("meta")), path.stem)
    except ValueError as error:
        raise UntoldError(str(error)) from None
    except Exception:  # a detector that wants to see weights, or a file of another kind
        raise UntoldError(f"the layers of “{path.name}” can only be seen when it is loaded: run the workflow once.") from None


def scores(values: Mapping[str, Iterable[float | None]], title: str) -> dict[str, Any]:
    """A node's ``ui`` that colours the head pickers of the same model: a score per head of every site, higher is warmer,
    None is not known.

    Args:
        title: what the scores are of, for people.
    """
    numbers = {site: [None if v is None else float(v) for v in row] for site, row in values.items()}
    return {"attune_scores": [{"title": title, "sites": numbers}]}


def shown(model_sites: Iterable[Site], model_family: str, chosen: Heads) -> dict[str, Any]:
    """The ``ui`` of Select Heads: the connected model's layout, and the heads that were chosen."""
    return {"attune_layout": [{**layout(model_sites, model_family), "chosen": chosen.text}]}
