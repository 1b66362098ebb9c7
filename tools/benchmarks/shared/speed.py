"""What the speed benchmarks share: an SD1.5-shaped model, steps of it, and ratios to the plain CFG step in one process."""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Variants = Callable[[comfy.model_patcher.ModelPatcher], dict[str, comfy.model_patcher.ModelPatcher]]

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

    def on_shapes(self: Any, x: Tensor, timesteps: Tensor, context: Tensor, **kwargs: Any) -> Tensor:
        type(self).forward(self, x.to("meta"), timesteps.to("meta"), context.to("meta"), **kwargs)
        return torch.zeros_like(x)

    def attend(function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        if not kwargs.get("skip_reshape"):
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = q @ k.transpose(-1, -2) @ v
        return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

    model.diffusion_model.forward = MethodType(on_shapes, model.diffusion_model)
    patcher = Weightless(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    patcher.model_options["transformer_options"] = {"optimized_attention_override": attend}
    return patcher


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive at once: what a run needs beside its weights, on a device that does not say."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self.known:  # not a view, and not written in place
                self.known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


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


def count(variants: Variants, width: int, latent: int) -> dict[str, int]:
    """FLOPs of one step of each variant."""
    flops = {}
    for name, model in variants(without_data(width)).items():
        with FlopCounterMode(display=False) as counter:
            stepper(model, 1, latent)()
        flops[name] = counter.get_total_flops()
    return flops


def measure(
    variants: Variants, width: int, latent: int, steps: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int], int]:
    """Seconds of a step in each round and peak bytes beside the weights of each variant, and the weights' bytes."""
    device = comfy.model_management.get_torch_device()
    plain = with_data(width, device)
    weights = sum(p.numel() * p.element_size() for p in plain.model.diffusion_model.parameters())
    runs = {name: stepper(model, steps, latent) for name, model in variants(plain).items()}
    times, peaks = interleaved(runs, steps, rounds, device)
    return times, peaks, weights


def paired(taken: Sequence[float], plain: Sequence[float]) -> float:
    """The median ratio to the plain run of the same round: a busy minute hits both."""
    return statistics.median(t / p for t, p in zip(taken, plain, strict=True))


def named(rows: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The first row, and those with one of these words in their names; all for no words."""
    return {name: row for i, (name, row) in enumerate(rows.items()) if i == 0 or not parts or any(p in name for p in parts)}


ROOM = 16 * 2**30  # bytes that ComfyUI is told are free on a CPU


def keep_memory() -> None:
    """Let the C library keep freed memory: else it gives large tensors back, and the kernel's clearing of new pages is most of the noise."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # glibc
            library.mallopt(-4, 0)  # M_MMAP_MAX
            library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
            if comfy.model_management.cpu_mode():
                # What is kept looks taken, and ComfyUI would split batches and attention by that.
                comfy.model_management.get_free_memory = lambda dev=None, torch_free_too=False: (
                    (ROOM, ROOM) if torch_free_too else ROOM
                )


def interleaved(
    runs: dict[str, Callable[[], Tensor]], steps: int, rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of a step in each round, and peak bytes beside the weights, of each run.

    Rounds are interleaved, so that a busy moment hits all. The first, which is not timed, warms up and takes the peaks.
    """
    keep_memory()
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks = dict.fromkeys(runs, 0)
    for turn in range(rounds + 1):
        print(f"round {turn} of {rounds} on {device}", file=sys.stderr, flush=True)
        for name, run in runs.items():
            if turn == 0:
                with Live() as live:
                    run()
                peaks[name] = live.peak
                continue
            began = time.perf_counter()
            run().cpu()  # waits for the device
            times[name].append((time.perf_counter() - began) / steps)
    return times, peaks


def main(
    command: str, about: str, variants: Variants, limits: dict[str, float], argv: list[str], with_flops: bool = True
) -> int:
    """Print the table of one benchmark; ``limits`` is what each variant's time should stay under."""
    parser = argparse.ArgumentParser(prog=f"run.py bench {command}", description=about)
    parser.add_argument("--latent", type=int, default=64, help="latent height and width; 64 is 512×512 pixels")
    parser.add_argument("--width", type=int, default=320, help="model channels, a multiple of 32; 320 is SD1.5's")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps in a timed run")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each variant")
    if with_flops:
        parser.add_argument(
            "--flops-only", action="store_true", help="count FLOPs, measure nothing: seconds instead of minutes"
        )
    args = parser.parse_args(argv)
    flops = count(variants, args.width, args.latent) if with_flops else {}
    print(f"SD1.5-shaped UNet, {args.width} channels, latent {args.latent}×{args.latent}: ratios to the plain CFG step")
    times: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    if not (with_flops and args.flops_only):
        times, peaks, weights = measure(variants, args.width, args.latent, args.steps, args.rounds)
        device = comfy.model_management.get_torch_device()
        print(
            f"{device}, plain CFG step {statistics.median(times[PLAIN]):.3f} s (median of {args.rounds}), weights {weights / 2**20:.0f} MB,"
        )
        print(f"and {peaks[PLAIN] / 2**20:.0f} MB beside them at the most (memory: the ratio of that part alone)")

    def ratio(values: dict[str, Any], name: str) -> str:
        return f"{values[name] / values[PLAIN]:.3f}" if values.get(name) else "n/a"

    print("| variant | FLOPs | time | memory beside the weights | limit |")
    print("|---|---|---|---|---|")
    for name in times or flops:
        limit = f"{limits[name]:.2f}" if name in limits else ""
        time_of = f"{paired(times[name], times[PLAIN]):.3f}" if times else "n/a"
        print(f"| {name} | {ratio(flops, name)} | {time_of} | {ratio(peaks, name)} | {limit} |")
    return 0
