"""How well the bundled model says what a prompt says, with and without the pack's methods: the table of the README.

Pictures of held-out prompts are made with ComfyUI's own sampler, read back by the evaluator, and compared at the same seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import model, world
from . import reader as evaluator

Patch = Callable[[Any], Any]


@dataclass(frozen=True)
class Variant:
    """One row of a table: a name, what is done to the MODEL, and the CFG scale."""

    name: str
    patch: Patch
    cfg: float


@torch.inference_mode()
def generate(
    patched: Any,
    clip: Any,
    vae: Any,
    texts: Sequence[str],
    cfg: float,
    seed: int,
    steps: int = 20,
    batch: int = 25,
    after: Callable[[Tensor], Tensor] | None = None,
    side: int = world.SIZE,
) -> Tensor:
    """Pictures ``[B, side, side, 3]`` in [0, 1] with euler; picture ``i`` starts from the noise of seed ``seed + i``.

    Args:
        after: what is done to finished latents.
        side: of the pictures, in pixels.
    """
    out = []
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        conds = [clip.encode_from_tokens(clip.tokenize(t), return_pooled=True) for t in part]
        positive = [[torch.cat([c for c, _ in conds]), {"pooled_output": torch.cat([p for _, p in conds])}]]
        latent = torch.zeros(len(part), 4, side // 8, side // 8)
        noise = torch.cat([comfy.sample.prepare_noise(latent[:1], seed + start + i) for i in range(len(part))])
        samples = comfy.sample.sample(
            patched, noise, steps, cfg, "euler", "normal", positive, empty, latent, seed=seed, disable_pbar=True
        )
        out.append(vae.decode(samples if after is None else after(samples)))
    return torch.cat(out)


def verdicts(pictures: Tensor, captions: Sequence[world.Caption]) -> list[evaluator.Verdict]:
    """What the evaluator thinks of each picture against its caption."""
    reader = evaluator.load_evaluator()
    readings = evaluator.read(reader, pictures)
    return [evaluator.judge(r, c) for r, c in zip(readings, captions, strict=True)]


def interval(hits: int, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.96, hits / number
    middle = (p + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(p * (1 - p) / number + z * z / (4 * number * number)) / (1 + z * z / number)
    return middle - half, middle + half


def paired(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference of two answers to the same prompts, with its 95 % interval."""
    differences = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    mean, half = float(differences.mean()), 1.96 * float(differences.std()) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def _each(found: Sequence[evaluator.Verdict], what: str) -> list[bool]:
    """One answer per picture: all of its things have it."""
    return [all(getattr(v, what)) for v in found]


def table(
    variants: Sequence[Variant], captions: Sequence[world.Caption], seed: int, steps: int
) -> dict[str, list[evaluator.Verdict]]:
    """Print shares with 95 % intervals, and differences to the first variant of the same CFG; returns the verdicts."""
    base, clip, vae = model.load()
    results: dict[str, list[evaluator.Verdict]] = {}
    first: dict[float, str] = {}
    print(
        "| variant | cfg | objects present | colours right | patterns right | all bound | bound, against plain | s a picture |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for variant in variants:
        began = time.perf_counter()
        pictures = generate(variant.patch(base), clip, vae, [c.text for c in captions], variant.cfg, seed, steps)
        seconds = (time.perf_counter() - began) / len(captions)
        found = results[f"{variant.name} {variant.cfg:g}"] = verdicts(pictures, captions)
        cells = []
        for what in ("present", "colour", "pattern", "bound"):
            hits = sum(_each(found, what))
            low, high = interval(hits, len(found))
            cells.append(f"{100 * hits / len(found):.1f} % ({100 * low:.0f}-{100 * high:.0f})")
        plain = results[first.setdefault(variant.cfg, f"{variant.name} {variant.cfg:g}")]
        mean, low, high = (100 * x for x in paired(_each(plain, "bound"), _each(found, "bound")))
        change = "" if plain is found else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        print(f"| {variant.name} | {variant.cfg:g} | {' | '.join(cells)} | {change} | {seconds:.2f} |", flush=True)
    return results


def main(argv: list[str]) -> int:
    from ..patches import softpag

    parser = argparse.ArgumentParser(prog="run.py evaluate", description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--things", type=int, default=2, help="objects in a prompt, 1 to 3")
    parser.add_argument("--split", choices=("test", "tune"), default="test", help="tune is for choosing settings")
    parser.add_argument("--cfg", type=float, nargs="+", default=[5.0, 2.0, 1.0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--scale", type=float, default=3.0, help="SoftPAG's scale")
    parser.add_argument("--perturbation", type=float, default=1.0)
    parser.add_argument("--heads", default="middle.*.*", help="SoftPAG's head selection")
    parser.add_argument("--record", action="store_true", help="write the plain model's shares into the weights' metadata")
    args = parser.parse_args(argv)
    captions = world.prompts(args.split, args.prompts, args.things)

    def soft(patched: Any) -> Any:
        family, sites = softpag.model_sites(patched)
        heads = softpag.select(args.heads, sites, family)
        return softpag.apply(patched, args.scale, args.perturbation, 0.0, 1.0, 0.0, heads)

    variants = [v for cfg in args.cfg for v in (Variant("plain", lambda m: m, cfg), Variant("SoftPAG", soft, cfg))]
    print(
        f"{len(captions)} held-out prompts of {args.things} things ({args.split}), {args.steps} steps, euler, seeds from {args.seed}"
    )
    results = table(variants, captions, args.seed, args.steps)
    if args.record:
        plain = results[f"plain {args.cfg[0]:g}"]
        shares = {what: sum(_each(plain, what)) / len(plain) for what in ("present", "colour", "pattern", "bound")}
        record({"prompts": len(plain), "things": args.things, "cfg": args.cfg[0], "steps": args.steps, **shares})
    return 0


def record(metrics: dict[str, float]) -> None:
    """Add figures to the metadata of the shipped weights."""
    path = model.WEIGHTS / f"{model.VARIANTS[0]}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {**(file.metadata() or {}), "metrics": json.dumps(metrics)}
    save_file(load_file(path), path, metadata=metadata)
