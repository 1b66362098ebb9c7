"""What a SoftPAG step costs, as a ratio to a plain CFG step of the same SD1.5-shaped UNet, in one process."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..patches import softpag
from ..patches.attention import model_sites
from ..patches.sites import select

SD15 = {
    **comfy.supported_models.SD15.unet_config,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "legacy": False,
}
PLAIN = "plain CFG"
LIMITS = {"SoftPAG, middle block": 1.38, "SoftPAG, last block": 1.10, "SoftPAG, outside its span": 1.0}


class Weightless(comfy.model_patcher.ModelPatcher):
    """A MODEL whose parameters have shapes and no data, so that there is nothing to load."""

    def load(self, *args: Any, **kwargs: Any) -> None:
        pass


def sd15(width: int, device: torch.device) -> Any:
    """ComfyUI's SD1.5 class with ``width`` model channels (320 is the real one)."""
    config = comfy.supported_models.SD15({**SD15, "model_channels": width})
    config.set_inference_dtype(torch.float16 if device.type == "cuda" else torch.float32, None)
    return config.get_model({}, "", device=device)


def with_data(width: int, device: torch.device) -> comfy.model_patcher.ModelPatcher:
    """A MODEL with small random weights."""
    model = sd15(width, device)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            parameter.normal_(0, 0.02)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def without_data(width: int) -> comfy.model_patcher.ModelPatcher:
    """A MODEL to count with: the sampler works on the CPU as ever, the UNet only on shapes, and it predicts zeros."""
    model = sd15(width, torch.device("meta"))
    forward = model.diffusion_model.forward

    def on_shapes(x: Tensor, timesteps: Tensor, context: Tensor, **kwargs: Any) -> Tensor:
        forward(x.to("meta"), timesteps.to("meta"), context.to("meta"), **kwargs)
        return torch.zeros_like(x)

    def attend(function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return (q @ k.transpose(-1, -2) @ v).transpose(1, 2).flatten(2)

    model.diffusion_model.forward = on_shapes
    patcher = Weightless(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    patcher.model_options["transformer_options"] = {"optimized_attention_override": attend}
    return patcher


def variants(plain: comfy.model_patcher.ModelPatcher) -> dict[str, comfy.model_patcher.ModelPatcher]:
    """The plain model, and everything that is compared with it."""
    family, sites = model_sites(plain)
    last = select(sites[-1].name, sites, family)
    return {
        PLAIN: plain,
        "SoftPAG, middle block": softpag.apply(plain, 3.0, 1.0, 0.0, 1.0, 0.0),
        "SoftPAG, last block": softpag.apply(plain, 3.0, 1.0, 0.0, 1.0, 0.0, last),
        "SoftPAG, outside its span": softpag.apply(plain, 3.0, 1.0, 1.0, 1.0, 0.0),
        "ComfyUI's own PAG node": PerturbedAttentionGuidance.execute(plain, 3.0).args[0],
    }


def stepper(model: comfy.model_patcher.ModelPatcher, steps: int, latent: int) -> Callable[[], Tensor]:
    """A function that samples ``steps`` CFG steps of one picture, as a KSampler does."""
    context = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1))
    positive, negative = ([[context * sign, {"pooled_output": context[:, 0]}]] for sign in (1, -1))
    noise = torch.randn(1, 4, latent, latent, generator=torch.Generator().manual_seed(2))
    options = model.model_options
    sampler = comfy.samplers.KSampler(model, steps, model.load_device, "euler", "normal", 1.0, model_options=options)

    @torch.inference_mode()
    def run() -> Tensor:
        return sampler.sample(noise, positive, negative, 7.0, latent_image=torch.zeros_like(noise), disable_pbar=True)

    return run


def count(width: int, latent: int) -> dict[str, int]:
    """FLOPs of one step of each variant."""
    flops = {}
    for name, model in variants(without_data(width)).items():
        with FlopCounterMode(display=False) as counter:
            stepper(model, 1, latent)()
        flops[name] = counter.get_total_flops()
    return flops


def measure(width: int, latent: int, steps: int, rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of a step, and (on CUDA) peak bytes, of each variant; rounds are interleaved, so that a busy moment hits all."""
    device = comfy.model_management.get_torch_device()
    runs = {name: stepper(model, steps, latent) for name, model in variants(with_data(width, device)).items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks = dict.fromkeys(runs, 0)
    for turn in range(rounds + 1):  # the first warms up
        print(f"round {turn} of {rounds} on {device}", file=sys.stderr, flush=True)
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            run().cpu()  # waits for the device
            if turn:
                times[name].append((time.perf_counter() - began) / steps)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated()
    return {name: statistics.median(taken) for name, taken in times.items()}, peaks


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="run.py bench softpag", description=__doc__)
    parser.add_argument("--latent", type=int, default=64, help="latent height and width; 64 is 512×512 pixels")
    parser.add_argument("--width", type=int, default=320, help="model channels, a multiple of 32; 320 is SD1.5's")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps in a timed run")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each variant")
    parser.add_argument("--flops-only", action="store_true", help="count FLOPs, measure nothing: seconds instead of minutes")
    args = parser.parse_args(argv)
    flops = count(args.width, args.latent)
    times, peaks = ({}, {}) if args.flops_only else measure(args.width, args.latent, args.steps, args.rounds)

    def ratio(values: dict[str, Any], name: str) -> str:
        return f"{values[name] / values[PLAIN]:.3f}" if values.get(name) else "n/a"

    print(f"SD1.5-shaped UNet, {args.width} channels, latent {args.latent}×{args.latent}: ratios to the plain CFG step")
    if times:
        print(f"{comfy.model_management.get_torch_device()}, plain CFG step {times[PLAIN]:.3f} s, median of {args.rounds}")
    print("| variant | FLOPs | time | peak memory | limit |")
    print("|---|---|---|---|---|")
    for name in flops:
        limit = f"{LIMITS[name]:.2f}" if name in LIMITS else ""
        print(f"| {name} | {ratio(flops, name)} | {ratio(times, name)} | {ratio(peaks, name)} | {limit} |")
    return 0
