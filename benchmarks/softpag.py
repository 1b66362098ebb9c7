"""What a SoftPAG step costs, as a ratio to a plain CFG step of the same SD1.5-shaped UNet, in one process."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from torch.utils.flop_counter import FlopCounterMode

from ..patches import softpag
from ..patches.attention import model_sites
from ..patches.sites import select

SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768,
    "use_linear_in_transformer": False,
    "legacy": False,
}


def sd15_shaped(width: int, device: torch.device, dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    """ComfyUI's SD1.5 classes with random weights, ``width`` model channels (320 is the real one)."""
    config = comfy.supported_models.SD15({**SD15, "model_channels": width})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def stepper(model: Any, steps: int, latent: int) -> Callable[[], torch.Tensor]:
    """A function that samples ``steps`` CFG steps of one picture, as a KSampler does."""
    context = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1))
    positive, negative = ([[context * sign, {"pooled_output": context[:, 0]}]] for sign in (1, -1))
    noise = torch.randn(1, 4, latent, latent, generator=torch.Generator().manual_seed(2))
    sampler = comfy.samplers.KSampler(
        model, steps, model.load_device, "euler", "normal", 1.0, model_options=model.model_options
    )

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return sampler.sample(noise, positive, negative, 7.0, latent_image=torch.zeros_like(noise), disable_pbar=True)

    return run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench softpag", description=__doc__)
    parser.add_argument("--latent", type=int, default=64, help="latent height and width; 64 is 512×512 pixels")
    parser.add_argument("--width", type=int, default=320, help="model channels; 320 is SD1.5's")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flops-only", action="store_true")
    args = parser.parse_args(argv)
    device = comfy.model_management.get_torch_device()
    plain = sd15_shaped(args.width, device, torch.float16 if device.type == "cuda" else torch.float32)
    family, sites = model_sites(plain)
    last = select(f"{sites[-1].name}:*", sites, family)
    variants = {
        "plain CFG": (plain, 1.0),
        "SoftPAG, middle block": (softpag.apply(plain, 3.0, 1.0, 0.0, 1.0, 0.0), 1.38),
        "SoftPAG, last block": (softpag.apply(plain, 3.0, 1.0, 0.0, 1.0, 0.0, last), 1.10),
        "SoftPAG, outside its span": (softpag.apply(plain, 3.0, 1.0, 1.0, 1.0, 0.0), 1.0),
        "ComfyUI's own PAG node": (PerturbedAttentionGuidance.execute(plain, 3.0).args[0], 1.5),
    }
    runs = {name: stepper(model, args.steps, args.latent) for name, (model, _) in variants.items()}
    flops, peaks = {}, {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with FlopCounterMode(display=False) as counter:
            run()
        flops[name] = counter.get_total_flops()
        peaks[name] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    for _ in range(0 if args.flops_only else args.rounds):
        for name, run in runs.items():  # interleaved, so that a busy moment hits all alike
            began = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - began) / args.steps)
    print(
        f"SD1.5-shaped UNet, {args.width} channels, latent {args.latent}×{args.latent}, {device}, ratios to the plain CFG step"
    )
    print("| variant | multiply-adds | time | peak memory | limit |")
    print("|---|---|---|---|---|")
    for name, (_, limit) in variants.items():
        work = f"{flops[name] / flops['plain CFG']:.3f}"
        took = (
            f"{statistics.median(times[name]) / statistics.median(times['plain CFG']):.3f}" if times[name] else "not measured"
        )
        peak = f"{peaks[name] / peaks['plain CFG']:.3f}" if peaks[name] else "only on CUDA"
        print(f"| {name} | {work} | {took} | {peak} | {limit:.2f} |")
    return 0
