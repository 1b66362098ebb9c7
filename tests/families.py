"""Real ComfyUI model classes with small numbers and seeded random weights, ways to sample from them, and whole runs in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.supported_models as supported
import torch
from torch import Tensor

from attune.language.words import Phrase, Words
from attune.patches.hook.install import model_sites
from attune.patches.hook.sites import Heads, Site, select

WIDTH = 32  # of text tokens, and of the pooled text vector
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
        },
    ),
}
CONFIGS["sd35"] = (supported.SD3, {**CONFIGS["sd3"][1], "x_block_self_attn_layers": [0, 1]})
NAMES = ("sd15", "sdxl", "sd3", "sd35", "flux")


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
    """A MODEL on the CPU in float32."""
    base, numbers = CONFIGS[name]
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


def latent(model: comfy.model_patcher.ModelPatcher, height: int = 8, width: int = 8, batch: int = 1) -> Tensor:
    """An empty latent for this model."""
    return torch.zeros(batch, model.model.latent_format.latent_channels, height, width)


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
    **more: Any,
) -> Tensor:
    """KSampler without the node; ``more`` goes to `comfy.sample.sample`."""
    empty = latent(model, *size, batch)
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
    calls = [(s, kind) for s in sites for kind in s.kinds]
    patched = model.clone()
    count = [0]

    def override(func, q, k, v, heads, *rest, **kwargs):
        site, kind = calls[count[0] % len(calls)]
        count[0] += 1
        if not kwargs.get("skip_reshape"):
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        a, b, c = q.double(), k.double(), v.double()
        weights = (a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5).softmax(-1)
        options = kwargs["transformer_options"]
        chunks = options["cond_or_uncond"]
        pictures = len(q) // len(chunks)
        queries, keys = weights.shape[-2:]
        joint = kind == "joint"
        first = words if joint else 0
        shape = options["activations_shape"][-2:] if family == "unet" else [-(-side // 2) for side in size]
        seen = Seen(
            site,
            kind,
            weights,
            c,
            [role for role in chunks for _ in range(pictures)],
            [uuid for uuid in options["uuids"] for _ in range(pictures)],
            (shape[0], shape[1]),
            slice(first, queries),
            slice(0, words) if joint else slice(0, keys),
            slice(first, keys) if joint else slice(0, keys),
            int((options["sample_sigmas"] >= options["sigmas"][0] * (1 - 1e-6)).sum()) - 1,
        )
        return change(seen).transpose(1, 2).flatten(2).to(q.dtype)

    patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    return patched
