"""What a SoftPAG step costs on each kind of model at its published size, in FLOPs: nothing is loaded, and nothing is timed."""

from __future__ import annotations

import argparse
from types import MethodType
from typing import Any

import comfy.sample
import comfy.supported_models
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...patches import softpag
from ...patches.hook.install import ModelPatcher, model_sites
from ...patches.hook.sites import select
from ...server.layouts import PRESETS
from .shared.records import recorded
from .shared.speed import Weightless

PIXELS = 1024
TOKENS = {
    "sd15": 77,
    "sdxl": 77,
    "sd3": 154,
    "flux": 256,
    "flux2": 512,
    "flux2_klein": 512,
}  # of text; others: a prompt of middle length
USUAL = 128
WIDTHS = {"qwen_image": 3584}  # of text, where it is not in the published numbers; others: T5's


def on_shapes(name: str) -> tuple[ModelPatcher, int]:
    """A published model to count with, and the width of its text: the sampler works as ever, the model only on shapes; it predicts zeros."""
    _, base, numbers = PRESETS[name]
    config = base(dict(numbers))
    config.set_inference_dtype(torch.float16, None)
    model = config.get_model({}, "", device=torch.device("meta"))

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
        kwargs = {n: a.to("meta") if isinstance(a, Tensor) else a for n, a in kwargs.items()}
        type(self).forward(self, x.to("meta"), *args, **kwargs)
        return torch.zeros_like(x)

    model.diffusion_model.forward = MethodType(forward, model.diffusion_model)
    patcher = Weightless(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    patcher.model_options["transformer_options"] = {"optimized_attention_override": attend}
    return patcher, next(
        (numbers[key] for key in ("context_dim", "context_in_dim", "cap_feat_dim") if key in numbers), WIDTHS.get(name, 4096)
    )


def attend(function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
    """Attention by its two products."""
    if not kwargs.get("skip_reshape"):
        q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    out = q @ k.transpose(-1, -2) @ v
    return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


@torch.inference_mode()
def count(model: ModelPatcher, name: str, width: int, cfg: float) -> int:
    """FLOPs of one step of one picture."""
    form = model.model.latent_format
    side = PIXELS // {"flux2": 16, "flux2_klein": 16}.get(name, 8)
    empty = torch.zeros(1, form.latent_channels, *([1] if form.latent_dimensions == 3 else []), side, side)
    pooled = torch.zeros(1, 2048 if name == "sd3" else 1280 if name == "sdxl" else 768)
    text = [[torch.zeros(1, TOKENS.get(name, USUAL), width), {"pooled_output": pooled}]]
    with FlopCounterMode(display=False) as counter:
        comfy.sample.sample(model, empty, 1, cfg, "euler", "simple", text, text, empty, disable_pbar=True)
    return int(counter.get_total_flops())


@recorded
def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="run.py bench models", description=__doc__)
    parser.add_argument(
        "names", nargs="*", default=list(PRESETS), help="models, by the head picker's names; all if none is given"
    )
    print(f"One step of one picture of {PIXELS}×{PIXELS} pixels: SoftPAG's FLOPs as ratios to the plain step")
    print("| model | plain step at cfg 1, TFLOPs | default layer | first layer | last layer | default layer with cfg |")
    print("|---|---|---|---|---|---|")
    for name in parser.parse_args(argv).names:
        plain, width = on_shapes(name)
        family, sites = model_sites(plain)
        own = softpag.apply(plain)
        first, last = (softpag.apply(plain, heads=select(sites[i].name, sites, family)) for i in (0, -1))
        one, two = (count(plain, name, width, cfg) for cfg in (1.0, 4.0))
        ratios = [count(m, name, width, 1.0) / one for m in (own, first, last)] + [count(own, name, width, 4.0) / two]
        print(f"| {PRESETS[name][0]} | {one / 1e12:.1f} | {' | '.join(f'{r:.2f}' for r in ratios)} |")
    return 0
