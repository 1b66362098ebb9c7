"""Pictures of the bundled model at known seeds, what the reader sees in them, and shares with their intervals.

Pictures of held-out prompts are made with ComfyUI's own sampler, read back by the reader, and compared at the same seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from ....demo import model, world
from ....demo.reader import Verdict, judge, load_reader, read

Patch = Callable[[Any], Any]


@dataclass(frozen=True)
class Variant:
    """One row of a table: a name, what is done to the MODEL, and the CFG scale."""

    name: str
    patch: Patch
    cfg: float


def sample(
    patched: Any,
    positive: Any,
    negative: Any,
    latent: Tensor,
    seeds: Sequence[int],
    steps: int,
    cfg: float,
    sampler: str = "euler",
    scheduler: str = "normal",
    seed: int = 0,
) -> Tensor:
    """Finished latents ``[len(seeds), C, h, w]`` from ``latent [1, C, h, w]``; picture ``i`` starts from the noise of ``seeds[i]``.

    Args:
        seed: of what the sampler itself draws.
    """
    noise = torch.cat([comfy.sample.prepare_noise(latent, i) for i in seeds])
    image = latent.repeat(len(seeds), 1, 1, 1)
    return comfy.sample.sample(
        patched, noise, steps, cfg, sampler, scheduler, positive, negative, image, seed=seed, disable_pbar=True
    )


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
        seeds = range(seed + start, seed + start + len(part))
        latent = torch.zeros(1, 4, side // 8, side // 8)
        samples = sample(patched, positive, empty, latent, seeds, steps, cfg, seed=seed)
        out.append(vae.decode(samples if after is None else after(samples)))
    return torch.cat(out)


def verdicts(pictures: Tensor, captions: Sequence[world.Caption]) -> list[Verdict]:
    """What the reader thinks of each picture against its caption."""
    return [judge(r, c) for r, c in zip(read(load_reader(), pictures), captions, strict=True)]


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


def shown_share(answers: Sequence[bool]) -> str:
    """A share in per cent with its 95 % interval, as tables have it."""
    low, high = interval(sum(answers), len(answers)) if answers else (0.0, 1.0)
    return f"{100 * sum(answers) / max(len(answers), 1):.1f} % ({100 * low:.0f}-{100 * high:.0f})"


def shown_change(before: Sequence[float], after: Sequence[float], percent: bool = True) -> str:
    """`paired` as tables have it: in points of per cent, or as it is."""
    factor, form = (100, "+.1f") if percent else (1, "+.3f")
    mean, low, high = (factor * x for x in paired(before, after))
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def each_of(found: Sequence[Verdict], what: str) -> list[bool]:
    """One answer per picture: all of its things have it."""
    return [all(getattr(v, what)) for v in found]


def table(variants: Sequence[Variant], captions: Sequence[world.Caption], seed: int, steps: int) -> dict[str, list[Verdict]]:
    """Print shares with 95 % intervals, and differences to the first variant of the same CFG; returns the verdicts."""
    base, clip, vae = model.load()
    results: dict[str, list[Verdict]] = {}
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
        cells = [shown_share(each_of(found, what)) for what in ("present", "colour", "pattern", "bound")]
        plain = results[first.setdefault(variant.cfg, f"{variant.name} {variant.cfg:g}")]
        change = "" if plain is found else shown_change(each_of(plain, "bound"), each_of(found, "bound"))
        print(f"| {variant.name} | {variant.cfg:g} | {' | '.join(cells)} | {change} | {seconds:.2f} |", flush=True)
    return results
