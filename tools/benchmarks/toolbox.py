"""What the attention tools cost on an SD1.5-shaped UNet, and what they do for prompts on the bundled model.

Presence and binding are the reader's, CLIP-T is the demo scorer's cosine with the prompt, and diversity is its mean distance between the
pictures of a prompt.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_patcher
from torch import Tensor

from ...demo import model, world
from ...demo.scorer import DemoScorer
from ...language.phrases import fusable
from ...language.words import Words, prompt_words
from ...methods import scores
from ...patches import fusion, gate, headfilter, refine, structure
from ...patches.hook.install import model_sites
from ...patches.hook.sites import Heads
from ...scoring.scorers import Scorer
from . import regulation
from .shared import speed
from .shared.pictures import generate, shown_change, verdicts
from .shared.records import recorded
from .shared.speed import PLAIN

FUSION, ZERO, MEAN = "fusion, two phrases", "filter, half of all heads, zero", "filter, half of all heads, mean"
UNIFORM, REFINE, EVERY = "filter, half of all heads, uniform", "refinement, two phrases", "refinement, every token"
LIMITS = dict.fromkeys((FUSION, ZERO, MEAN, UNIFORM, REFINE, EVERY), 1.05)
PHRASES = replace(regulation.WORDS, phrases=tuple(replace(regulation.WORDS.phrases[0], columns=c) for c in ((2, 3), (5, 6, 7))))

GATE = {"threshold": 0.27, "softness": 0.05, "every": 5, "start": 0.2, "end": 0.8, "floor": 0.3}


def half(model: Any) -> Heads:
    """The first half of the heads of every layer."""
    family, sites = model_sites(model)
    return Heads(family, tuple((s.name, tuple(range(-(-s.heads // 2)))) for s in sites))


def variants(plain: comfy.model_patcher.ModelPatcher) -> dict[str, comfy.model_patcher.ModelPatcher]:
    """The plain model, and every tool where it costs most: at every layer and step."""
    return {
        PLAIN: plain,
        FUSION: fusion.apply(plain, PHRASES),
        ZERO: headfilter.apply(plain, half(plain), "both", "zero"),
        MEAN: headfilter.apply(plain, half(plain), "both", "mean"),
        UNIFORM: headfilter.apply(plain, half(plain), "both", "uniform attention"),
        REFINE: refine.apply(plain, PHRASES),
        EVERY: refine.apply(plain),
    }


@dataclass(frozen=True)
class Tool:
    """A row of the effect: what is done to the model for a prompt, and to its finished latents."""

    name: str
    patch: Callable[[Any, Words], Any] = lambda base, words: base
    after: Callable[[Tensor], Tensor] | None = None


def tools(scorer: Scorer, vae: Any, args: argparse.Namespace) -> list[Tool]:
    """The plain model, each tool alone, and the two that the note puts together. Phrases are a prompt's noun phrases."""

    def gated(mode: str) -> Callable[[Any, Words], Any]:
        chosen = (args.threshold, args.softness, args.every, args.start, args.end, args.floor, mode)
        return lambda base, words: gate.apply(base, words, scorer, vae, *chosen)

    def fused(base: Any, words: Words) -> Any:
        return fusion.apply(base, words, args.strength)

    def refined(latents: Tensor) -> Tensor:
        return structure.refine({"samples": latents})["samples"]

    damp, invert = (gated(mode) for mode in gate.MODES)
    return [
        Tool("plain"),
        Tool("fusion", fused),
        Tool("gate, damp", damp),
        Tool("gate, invert", invert),
        Tool("filter, half of the heads, mean", lambda base, words: headfilter.apply(base, half(base), "cross", "mean")),
        Tool("refinement of the phrases", lambda base, words: refine.apply(base, words)),
        Tool("structure refinement", after=refined),
        Tool("fusion + gate, damp", lambda base, words: damp(fused(base, words), words)),
        Tool("fusion + gate, invert", lambda base, words: invert(fused(base, words), words)),
    ]


def effect(args: argparse.Namespace) -> None:
    """Print, per tool, shares over all pictures and paired differences to plain with 95 % intervals over prompts."""
    captions = world.prompts(args.split, args.prompts, args.things)
    base, clip, vae = model.load()
    scorer = DemoScorer()
    chosen = speed.named({t.name: t for t in tools(scorer, vae, args)}, args.rows).values()
    first: dict[str, list[float]] = {}
    seconds = 0.0
    print("| tool | all present | against plain | all bound | against plain | CLIP-T | against plain | diversity kept | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    for tool in chosen:
        found: dict[str, list[float]] = {"present": [], "bound": [], "clip_t": [], "diversity": []}
        began = time.perf_counter()
        pictures = []
        for i, caption in enumerate(captions):
            words = fusable(prompt_words(clip, caption.text))
            patched, texts = tool.patch(base, words), [caption.text] * args.pictures
            seed = args.seed + i * args.pictures
            pictures.append(generate(patched, clip, vae, texts, args.cfg, seed, after=tool.after))
        took = time.perf_counter() - began
        for caption, drawn in zip(captions, pictures, strict=True):
            judged = verdicts(drawn, [caption] * len(drawn))
            seen = scorer.features(drawn)
            found["present"].append(statistics.mean(v.all_present for v in judged))
            found["bound"].append(statistics.mean(v.all_bound for v in judged))
            found["clip_t"].append(float((seen @ scorer.text_features([caption.text]).T).mean()))
            found["diversity"].append(scores.diversity(seen))
        first, seconds = first or found, seconds or took
        cells = []
        for name, percent in (("present", True), ("bound", True), ("clip_t", False)):
            cells.append(f"{100 * statistics.mean(found[name]):.1f} %" if percent else f"{statistics.mean(found[name]):.3f}")
            cells.append("" if found is first else shown_change(first[name], found[name], percent))
        kept = 100 * statistics.mean(found["diversity"]) / statistics.mean(first["diversity"])
        print(f"| {tool.name} | {' | '.join(cells)} | {kept:.0f} % | {took / seconds:.2f} |", flush=True)


def settings(parser: argparse.ArgumentParser) -> None:
    """Options of the effect."""
    parser.add_argument("--cost-only", action="store_true", help="skip the effect")
    parser.add_argument("--effect-only", action="store_true", help="skip the cost")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=4, help="of each prompt")
    parser.add_argument("--rows", nargs="*", default=[], help="only rows with these words in their names, and plain")
    parser.add_argument("--things", type=int, default=2, help="objects in a prompt, 1 to 3")
    parser.add_argument("--split", choices=("test", "tune"), default="test", help="tune is for choosing settings")
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--strength", type=float, default=0.5, help="of the fusion")
    for name, value in GATE.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="of the gate")


@recorded
def main(argv: list[str]) -> int:
    """Print the cost at SD1.5's size, then the effect on the bundled model's pictures."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    settings(parser)
    own, rest = parser.parse_known_args(argv)
    if not own.effect_only:
        about = (
            f"{__doc__} Also: --cost-only, --effect-only; of the effect --prompts, --pictures, --things, --split, --cfg, --seed, "
            "--strength of the fusion, and the gate's settings; of both --rows."
        )
        speed.main("toolbox", about, lambda plain: speed.named(variants(plain), own.rows), LIMITS, rest)
    if not own.cost_only:
        print(
            f"\nThe bundled model, {own.prompts} prompts of {own.things} things ({own.split}), {own.pictures} pictures each, 20 steps, cfg "
            f"{own.cfg:g}, the same seeds:"
        )
        effect(own)
    return 0
