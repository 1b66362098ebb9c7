"""What the machines hand to the nodes: small random models of every family, and what the pack's own nodes make on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from torch import Tensor

from ...demo import checkpoint
from ...demo import model as demo
from ...demo.scorer import scorer
from ...nodes import AttuneAttentionMaps, AttuneDecompose, AttuneEncodeBranches, AttuneHeads, AttuneWords
from ...tests import families

# Of text tokens and of the pooled text, so that the demo model's CLIP goes with every model.
WIDTH = checkpoint.TEXT["hidden_size"]
CHANGES: dict[str, dict[str, Any]] = {
    "sd15": {"context_dim": WIDTH},
    "sdxl": {"context_dim": WIDTH, "adm_in_channels": WIDTH + 6 * 256},
    "sd3": {
        "adm_in_channels": WIDTH,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 192}},
    },
    "flux": {"vec_in_dim": WIDTH, "context_in_dim": WIDTH},
}
FAMILIES = tuple(CHANGES)
PROMPT = "a red striped star and a blue circle"
SIZE = 8  # of latents


@cache
def model(family: str) -> comfy.model_patcher.ModelPatcher:
    """A small random MODEL; its users clone it."""
    return families.build(family, **CHANGES[family])


@cache
def foreign() -> comfy.model_patcher.ModelPatcher:
    """A MODEL of a family that the pack has no sites for."""
    numbers = {"dim": 32, "n_layers": 1, "n_double_layers": 1, "n_heads": 2, "global_conddim": 32, "cond_seq_dim": WIDTH}
    kind = type("AuraFlow", (comfy.supported_models.AuraFlow,), {"unet_config": numbers, "unet_extra_config": {}})(numbers)
    kind.set_inference_dtype(torch.float32, None)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(kind.get_model({}, ""), load_device=device, offload_device=device)


def channels(family: str) -> int:
    return int(model(family).model.latent_format.latent_channels)


@cache
def clip() -> comfy.sd.CLIP:
    return demo.load("shapes")[1]


@cache
def vae(family: str) -> comfy.sd.VAE:
    """A small random VAE for the family's latents."""
    numbers = {**demo.ARCHITECTURE.autoencoder_config, "z_channels": channels(family), "ch_mult": [1, 1, 1, 1]}
    config = {"params": {"ddconfig": numbers, "embed_dim": channels(family)}}
    weights = AutoencoderKL(ddconfig=numbers, embed_dim=channels(family))
    families.initialise(weights)
    return comfy.sd.VAE(sd=weights.state_dict(), config=config)


@cache
def words(chosen: str = "star, circle") -> tuple[Any, list[Any]]:
    """Words of the prompt, and the prompt's conditioning."""
    found, _, conditioning = AttuneWords.execute(clip(), PROMPT, chosen).args
    return found, conditioning


@cache
def conditioning(text: str) -> list[Any]:
    return clip().encode_from_tokens_scheduled(clip().tokenize(text))


@cache
def branches() -> Any:
    return AttuneDecompose.execute(PROMPT, manual="*|a star and a circle\nstar|a red striped star and a circle").args[0]


@cache
def encoded_branches() -> list[Any]:
    return AttuneEncodeBranches.execute(clip(), branches()).args[0]


def heads(family: str, selection: str) -> Any:
    return AttuneHeads.execute(model(family), selection).args[0]


def latent(family: str, height: int = SIZE, width: int = SIZE, batch: int = 1) -> Tensor:
    return torch.zeros(batch, channels(family), height, width)


@cache
def maps(family: str) -> Any:
    """The attention of a run of two steps."""
    patched, held = AttuneAttentionMaps.execute(model(family), "auto", "both", "mean", "fp32", "device", 1024).args
    sample(patched, family)
    return held


judge = cache(scorer)


def sample(
    patched: comfy.model_patcher.ModelPatcher,
    family: str,
    steps: int = 2,
    sampler: str = "euler",
    callback: Callable[..., None] | None = None,
) -> Tensor:
    """A run of a few steps with CFG on the prompt that the words are of."""
    empty = latent(family)
    noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(1))
    return comfy.sample.sample(
        patched,
        noise,
        steps,
        3.0,
        sampler,
        "normal",
        words()[1],
        conditioning("a grey wall"),
        empty,
        disable_pbar=True,
        seed=1,
        callback=callback,
    )
