"""Published architectures in numbers: what the head picker offers without a file, and what costs are counted with."""

from __future__ import annotations

from typing import Any

import comfy.supported_models
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams

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
# Of FLUX.1 and of Chroma, which is made from it.
_FLUX: dict[str, Any] = {
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
}
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
_COSMOS: dict[str, Any] = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "num_blocks": 28,
    "num_heads": 16,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}
# Of each its title, its class of `comfy.supported_models`, and the numbers that ComfyUI finds in the published files themselves.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd15": (
        "SD1.5",
        "SD15",
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
        "SDXL",
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
        "SD3",
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
        "Flux",
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 768,
            **_FLUX,
            "guidance_embed": True,
            **_NEWER,
        },
    ),
    "flux2": (
        "FLUX.2 dev",
        "Flux2",
        {**_FLUX2, "hidden_size": 6144, "num_heads": 48, "depth": 8, "depth_single_blocks": 48},
    ),
    "flux2_klein": (
        "FLUX.2 klein 4B",
        "Flux2",
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
        "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60},
    ),
    "qwen_image21": (
        "Qwen-Image 2.1",
        "QwenImage21",
        {"image_model": "qwen_image21", "num_layers": 32},
    ),
    "z_image": (
        "Z-Image",
        "ZImage",
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
    "lumina2": (
        "Lumina 2",
        "Lumina2",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 2304,
            "cap_feat_dim": 2304,
            "n_layers": 26,
            "qk_norm": True,
            "n_heads": 24,
            "n_kv_heads": 8,
            "axes_dims": [32, 32, 32],
            "axes_lens": [300, 512, 512],
            "rope_theta": 10000.0,
            "ffn_dim_multiplier": 4.0,
        },
    ),
    "chroma": (
        "Chroma",
        "Chroma",
        {
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 3072,
            "hidden_dim": 5120,
            "n_layers": 5,
            **_FLUX,
            **({**_NEWER, "vec_in_dim": None} if "vec_in_dim" in ChromaParams.__dataclass_fields__ else {}),
        },
    ),
    "krea2": (
        "Krea 2",
        "Krea2",
        {
            "image_model": "krea2",
            "features": 6144,
            "channels": 16,
            "patch": 2,
            "layers": 28,
            "heads": 48,
            "kvheads": 12,
            "txtlayers": 12,
            "txtdim": 2560,
        },
    ),
    "cosmos_predict2": (
        "Cosmos Predict 2, 2B",
        "CosmosT2IPredict2",
        {**_COSMOS, "image_model": "cosmos_predict2"},
    ),
    "anima": ("Anima", "Anima", {**_COSMOS, "image_model": "anima"}),
    "wan": (
        "Wan 14B, text to video",
        "WAN21_T2V",
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
# Those that this ComfyUI has a class for.
PRESETS: dict[str, tuple[str, type, dict[str, Any]]] = {
    name: (title, getattr(comfy.supported_models, kind), numbers)
    for name, (title, kind, numbers) in ARCHITECTURES.items()
    if hasattr(comfy.supported_models, kind)
}
