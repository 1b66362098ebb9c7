"""Real ComfyUI model classes with small numbers and seeded random weights, ways to sample from them, and whole runs in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.supported_models as supported
import pytest
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams
from torch import Tensor

from attune.language.words import Phrase, Words
from attune.patches.hook.install import model_sites
from attune.patches.hook.sites import Heads, Site, select

WIDTH = 32  # of text tokens, and of the pooled text vector
_NEWER = {"txt_ids_dims": []} if any(f.name == "txt_ids_dims" for f in fields(FluxParams)) else {}  # after ComfyUI 0.3.75
_UNET = {
    "image_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "use_spatial_transformer": True,
    "context_dim": WIDTH,
    "legacy": False,
}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "sd15": (
        supported.SD15,
        {
            **_UNET,
            "channel_mult": [1, 2],
            "num_res_blocks": [1, 1],
            "num_heads": 4,
            "num_head_channels": -1,
            "transformer_depth": [1, 1],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1],
            "use_linear_in_transformer": False,
        },
    ),
    "sdxl": (
        supported.SDXL,
        {
            **_UNET,
            "channel_mult": [1, 2],
            "num_res_blocks": [1, 1],
            "num_heads": -1,
            "num_head_channels": 16,
            "transformer_depth": [0, 2],
            "transformer_depth_middle": 2,
            "transformer_depth_output": [0, 0, 2, 2],
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": WIDTH + 6 * 256,
        },
    ),
    "sd3": (
        supported.SD3,
        {
            "input_size": None,
            "in_channels": 16,
            "depth": 3,
            "adm_in_channels": WIDTH,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 192}},
            "pos_embed_scaling_factor": None,
            "pos_embed_max_size": 16,
            "num_patches": 256,
            "qk_norm": "rms",
        },
    ),
    "flux": (
        supported.Flux,
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": WIDTH,
            "context_in_dim": WIDTH,
            "hidden_size": 64,
            "mlp_ratio": 2.0,
            "num_heads": 4,
            "depth": 2,
            "depth_single_blocks": 3,
            "axes_dim": [4, 6, 6],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
            **_NEWER,
        },
    ),
}
# Families that the contract in tests/patches/test_models.py runs on; a class that this ComfyUI lacks is not here.
MORE: dict[str, tuple[type, dict[str, Any]]] = {
    "chroma": (
        supported.Chroma,
        {
            **{k: v for k, v in CONFIGS["flux"][1].items() if k in ChromaParams.__dataclass_fields__},
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 64,
            "hidden_dim": 64,
            "n_layers": 1,
        },
    ),
    "qwen_image": (
        supported.QwenImage,
        {
            "image_model": "qwen_image",
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "lumina2": (
        supported.Lumina2,
        {
            "image_model": "lumina2",
            "in_channels": 16,
            "dim": 64,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 2,
            "multiple_of": 16,
            "cap_feat_dim": WIDTH,
            "axes_dims": [4, 6, 6],
            "axes_lens": [300, 512, 512],
            "qk_norm": True,
        },
    ),
}
if hasattr(supported, "Flux2"):
    MORE["flux2"] = (
        supported.Flux2,
        {
            **CONFIGS["flux"][1],
            "image_model": "flux2",
            "in_channels": 128,
            "out_channels": 128,
            "vec_in_dim": None,
            "axes_dim": [4, 4, 4, 4],
            "theta": 2000,
            "patch_size": 1,
            "qkv_bias": False,
            "global_modulation": True,
            "mlp_silu_act": True,
            "ops_bias": False,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
            **({"txt_ids_dims": [3]} if _NEWER else {}),
        },
    )
if hasattr(supported, "ZImage"):
    MORE["z_image"] = (
        supported.ZImage,
        {
            **MORE["lumina2"][1],
            "dim": 256,  # its modulation is not smaller
            "axes_dims": [16, 24, 24],
            "n_kv_heads": 4,
            "z_image_modulation": True,
            "pad_tokens_multiple": 8,
            "time_scale": 1000.0,
        },
    )
if hasattr(supported, "Krea2"):
    MORE["krea2"] = (
        supported.Krea2,
        {
            "image_model": "krea2",
            "features": 64,
            "tdim": 32,
            "txtdim": WIDTH // 2,
            "txtlayers": 2,
            "heads": 4,
            "kvheads": 2,
            "txtheads": 2,
            "txtkvheads": 2,
            "layers": 3,
        },
    )
if hasattr(supported, "QwenImage21"):
    MORE["qwen_image21"] = (
        supported.QwenImage21,
        {
            "image_model": "qwen_image21",
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "context_in_dim": WIDTH,
            "axes_dims_rope": (4, 6, 6),
        },
    )
MORE["wan"] = (
    supported.WAN21_T2V,
    {
        "image_model": "wan2.1",
        "model_type": "t2v",
        "dim": 64,
        "ffn_dim": 128,
        "num_heads": 4,
        "num_layers": 3,
        "text_dim": WIDTH,
        "freq_dim": 32,
    },
)
_COSMOS = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 64,
    "concat_padding_mask": True,
    "crossattn_emb_channels": WIDTH,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
    "num_blocks": 3,
    "num_heads": 4,
    "extra_per_block_abs_pos_emb": False,
}
MORE["cosmos_predict2"] = (supported.CosmosT2IPredict2, {"image_model": "cosmos_predict2", **_COSMOS})
if hasattr(supported, "Anima"):
    MORE["anima"] = (supported.Anima, {"image_model": "anima", **_COSMOS})
SEPARATE = ("sd15", "sdxl", "wan", "cosmos_predict2", "anima")  # self- and cross-attention, not joint
CONFIGS["sd35"] = (supported.SD3, {**CONFIGS["sd3"][1], "x_block_self_attn_layers": [0, 1]})
NAMES = ("sd15", "sdxl", "sd3", "sd35", "flux")
EVERY = (*NAMES, *MORE)  # for the tests that hold each method against itself written out
_OUTSIDE = {"lumina2": 2, "z_image": 2, "krea2": 4}  # calls of attention in a forward before those at sites
TEXT_APART = ("qwen_image21",)
_MULTIPLE = {"z_image": 8}  # text and image are padded to
_BEFORE = {"flux2": 512}  # tokens that text is lengthened to, by zeros before it


def text_tokens(model: Any, words: int = 7) -> slice:
    """Which keys of joint attention are the prompt's."""
    end = max(_BEFORE.get(model_sites(model)[0], 0), words)
    return slice(end - words, end)


def image_tokens(model: Any, size: tuple[int, int], tokens: int) -> tuple[tuple[int, int], slice]:
    """The image's grid in a transformer's joint attention of so many tokens, and which of them it is."""
    family, sites = model_sites(model)
    grid = -(-size[0] // sites[0].stride), -(-size[1] // sites[0].stride)
    count = grid[0] * grid[1]
    end = tokens - -count % _MULTIPLE.get(family, 1)
    return grid, slice(end - count, end)


def of_text_apart(model: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a call of attention is the text's own, in a model that computes that apart from the image; it is none of `calls_of`."""
    return model_sites(model)[0] in TEXT_APART and settings.get("mask") is not None


def calls_of(model: Any) -> list[tuple[str, str]]:
    """Every call of attention of a forward in order: its site's name and kind, or two empty texts."""
    family, sites = model_sites(model)
    return [("", "")] * _OUTSIDE.get(family, 0) + [(s.name, kind) for s in sites for kind in s.kinds]


@torch.no_grad()
def initialise(module: torch.nn.Module) -> None:
    """Weights that keep activations near 1 everywhere, so that any change of attention shows in the output."""
    generator = torch.Generator().manual_seed(7)
    for name, t in sorted(module.state_dict().items()):
        noise = torch.randn(t.shape, generator=generator)
        if t.ndim > 1:
            t.copy_(noise * (2 if "to_q" in name or "to_k" in name else 1) / t[0].numel() ** 0.5)
        else:
            t.copy_(noise * 0.1 + (1 if "weight" in name or "scale" in name else 0))


def build(name: str, **changes: Any) -> comfy.model_patcher.ModelPatcher:
    """A MODEL on the CPU in float32; the test is skipped where this ComfyUI lacks its class."""
    if name not in EVERY:
        pytest.skip(f"this ComfyUI has no {name}")
    base, numbers = {**CONFIGS, **MORE}[name]
    numbers = {**numbers, **changes}
    config = type(base.__name__, (base,), {"unet_config": numbers, "unet_extra_config": {}})(numbers)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    initialise(model.diffusion_model)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


@cache
def shared(name: str) -> comfy.model_patcher.ModelPatcher:
    """`build`, once for all tests: they clone it."""
    return build(name)


def text(seed: int, tokens: int = 7, **more: Any) -> list[Any]:
    """A conditioning."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, WIDTH, generator=generator)
    return [[torch.randn(1, tokens, WIDTH, generator=generator), {"pooled_output": pooled, **more}]]


def latent(model: comfy.model_patcher.ModelPatcher, height: int = 8, width: int = 8, batch: int = 1, frames: int = 1) -> Tensor:
    """An empty latent for this model; half as wide where a latent pixel is a token, so that text is not lost among them."""
    if model_sites(model)[1][0].stride == 1 and model_sites(model)[0] != "unet":
        height, width = -(-height // 2), -(-width // 2)
    flat = torch.zeros(batch, model.model.latent_format.latent_channels, height, width)
    return flat.unsqueeze(2).repeat(1, 1, frames, 1, 1) if model.model.latent_format.latent_dimensions == 3 else flat


def sample(
    model: comfy.model_patcher.ModelPatcher,
    positive: list[Any] | None = None,
    negative: list[Any] | None = None,
    cfg: float = 3.0,
    steps: int = 2,
    sampler: str = "euler",
    size: tuple[int, int] = (8, 8),
    batch: int = 1,
    seed: int = 0,
    frames: int = 1,
    **more: Any,
) -> Tensor:
    """KSampler without the node; ``more`` goes to `comfy.sample.sample`."""
    empty = latent(model, *size, batch, frames)
    noise = comfy.sample.prepare_noise(empty, seed)
    positive, negative = positive or text(1), negative or text(2)
    more = {"scheduler": "normal", "disable_pbar": True, "seed": seed, **more}
    scheduler = more.pop("scheduler")
    return comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive, negative, empty, **more)


def heads_of(model: Any, selection: str) -> Heads:
    """Heads of this model by the grammar of Select Heads."""
    family, sites = model_sites(model)
    return select(selection, sites, family)


def words(*columns: tuple[int, ...], total: int = 7, content: range = range(1, 5), **counts: int) -> Words:
    """Phrases at these columns of a prompt; ``content`` are the columns of its text."""
    phrases = tuple(Phrase(f"word {i}", c, {"l": c}) for i, c in enumerate(columns))
    special = tuple(sorted(set(range(total)) - set(content)))
    return Words("", phrases, phrases, special, total, counts or {"l": total})


# --- attention written out, for methods that change it at many places ---


@dataclass
class Seen:
    """One call of attention: weights ``[B, H, queries, keys]`` and values in float64, ``out [B, H, queries, d]``, and what is what.

    ``roles`` says of each row whether it is conditional (0); ``image`` are the queries and ``text`` the keys of these, ``pixels`` the keys
    that are image tokens.
    """

    site: Site
    kind: str
    weights: Tensor
    value: Tensor
    roles: list[int]
    uuids: list[Any]
    grid: tuple[int, int]
    image: slice
    text: slice
    pixels: slice
    step: int

    @property
    def out(self) -> Tensor:
        return self.weights @ self.value


def written_out(model: Any, change: Callable[[Seen], Tensor], size: tuple[int, int] = (8, 8), words: int = 7) -> Any:
    """The model with every attention as ``change(seen) -> out``.

    Args:
        size: of the latent, and ``words`` of the text, where attention is joint.
    """
    family, sites = model_sites(model)
    calls, by_name = calls_of(model), {site.name: site for site in sites}
    patched = model.clone()
    count, real = [0], tuple(latent(model, *size).shape[-2:])

    def override(func, q, k, v, heads, *rest, **kwargs):
        apart = of_text_apart(model, kwargs)
        name, kind = ("", "") if apart else calls[count[0] % len(calls)]
        count[0] += not apart
        if not kind:
            return func(q, k, v, heads, *rest, **kwargs)
        if not kwargs.get("skip_reshape"):
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        a, b, c = q.double(), k.double(), v.double()
        weights = (a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5).softmax(-1)
        options = kwargs["transformer_options"]
        chunks = options["cond_or_uncond"]
        pictures = len(q) // len(chunks)
        queries, keys = weights.shape[-2:]
        joint = kind == "joint"
        (shape, image), seen_image = image_tokens(model, real, queries), image_tokens(model, real, keys)[1]
        if family == "unet":
            shape, image = tuple(options["activations_shape"][-2:]), slice(0, queries)
        frames = queries // (shape[0] * shape[1]) if not joint else 1  # of a film, one under the other
        shape, image = (frames * shape[0], shape[1]), image if joint else slice(0, queries)
        seen = Seen(
            by_name[name],
            kind,
            weights,
            c,
            [role for role in chunks for _ in range(pictures)],
            [uuid for uuid in options["uuids"] for _ in range(pictures)],
            shape,
            image,
            text_tokens(model, words) if joint else slice(0, keys),
            seen_image if joint else slice(0, keys),
            int((options["sample_sigmas"] >= options["sigmas"][0] * (1 - 1e-6)).sum()) - 1,
        )
        return change(seen).transpose(1, 2).flatten(2).to(q.dtype)

    patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    return patched
