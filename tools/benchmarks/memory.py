"""What choosing layers saves when attention maps are kept: bytes of the maps, and peak memory of a run beside the weights.

"Every layer" is what a pack does that keeps whatever attention makes; "auto" is Capture Attention Maps as it comes. The counted peak is of
all tensors that are alive at once, the maps among them. Attention is torch's fused one, as on a GPU: ComfyUI's own choice for CPUs holds
whole maps for a moment and would hide everything else.
"""

from __future__ import annotations

import argparse
from typing import Any

import comfy.model_management
import comfy.model_patcher
from comfy.ldm.modules.attention import attention_pytorch

from ...patches.hook.install import model_sites
from ...patches.hook.sites import select
from ...patches.maps import record, recorder
from ...patches.maps.record import Settings as Kept
from .shared import speed
from .shared.records import recorded

AIM = 0.4
UNLIMITED = 1 << 20  # MB


def fused(function: Any, *args: Any, **kwargs: Any) -> Any:
    """An ``optimized_attention_override``."""
    return attention_pytorch(*args, **kwargs)


def measure(model: comfy.model_patcher.ModelPatcher, latent: int, steps: int) -> int:
    """Peak bytes of a run beside the weights."""
    with speed.Live() as live:
        speed.stepper(model, steps, latent)()
    return live.peak


def captured(plain: comfy.model_patcher.ModelPatcher, kind: str, kept: str) -> dict[str, tuple[Any, record.Maps]]:
    """The model with the default layers captured, and with every layer that has attention of that kind."""
    family, sites = model_sites(plain)
    having = [s.name for s in sites if kind == "self" or "cross" in s.kinds]
    choices = {"auto": None, "every layer": select(" ".join(having), sites, family)}
    return {name: recorder.apply(plain, Kept(kind, kept, limit_mb=UNLIMITED), heads) for name, heads in choices.items()}


@recorded
def main(argv: list[str]) -> int:
    """Print the table and what is saved."""
    parser = argparse.ArgumentParser(prog="run.py bench memory", description=__doc__)
    parser.add_argument("--latent", type=int, default=64, help="latent height and width; 64 is 512×512 pixels")
    parser.add_argument("--width", type=int, default=320, help="model channels, a multiple of 32; 320 is SD1.5's")
    parser.add_argument("--steps", type=int, default=1, help="sampling steps of a run")
    parser.add_argument("--kinds", nargs="+", choices=record.KINDS, default=["both", "cross"])
    parser.add_argument("--kept", choices=list(record.STEPS), default="mean", help="which steps' maps are kept, as in the node")
    args = parser.parse_args(argv)
    device = comfy.model_management.get_torch_device()
    plain = speed.with_data(args.width, device)
    plain.model_options["transformer_options"] = {"optimized_attention_override": fused}
    steps = f"{args.steps} step{'' if args.steps == 1 else 's'}"
    print(
        f"SD1.5-shaped UNet, {args.width} channels, latent {args.latent}×{args.latent}, {steps} ({args.kept}), {device}, maps in fp16:"
    )
    print(f"{measure(plain, args.latent, args.steps) / 2**20:.0f} MB beside the weights at the most without maps", flush=True)
    print("| maps | layers | kept, MB | peak beside the weights, MB |")
    print("|---|---|---|---|")
    saved = {}
    for kind in args.kinds:
        found = {}
        for name, (model, held) in captured(plain, kind, args.kept).items():
            peak = measure(model, args.latent, args.steps)
            found[name] = (held.record().bytes, peak)
            print(f"| {kind} | {name} | {found[name][0] / 2**20:.1f} | {peak / 2**20:.0f} |", flush=True)
        saved[kind] = [100 * (1 - few / all) for few, all in zip(found["auto"], found["every layer"], strict=True)]
    print()
    for kind, (less_kept, less_peak) in saved.items():
        print(
            f"{kind}: the default layers save {less_kept:.0f} % of the maps and {less_peak:.0f} % of the peak (aim {100 * AIM:.0f} %)"
        )
    return 0
