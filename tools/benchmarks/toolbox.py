"""What the attention tools cost on an SD1.5-shaped UNet."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import comfy.model_patcher

from ...patches import fusion, headfilter, refine
from ...patches.hook.install import model_sites
from ...patches.hook.sites import Heads
from . import regulation
from .shared import speed
from .shared.records import recorded
from .shared.speed import PLAIN

FUSION, ZERO, MEAN = "fusion, two phrases", "filter, half of all heads, zero", "filter, half of all heads, mean"
UNIFORM, REFINE, EVERY = "filter, half of all heads, uniform", "refinement, two phrases", "refinement, every token"
LIMITS = dict.fromkeys((FUSION, ZERO, MEAN, UNIFORM, REFINE, EVERY), 1.05)
PHRASES = replace(regulation.WORDS, phrases=tuple(replace(regulation.WORDS.phrases[0], columns=c) for c in ((2, 3), (5, 6, 7))))


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


@recorded
def main(argv: list[str]) -> int:
    """Print the cost at SD1.5's size."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cost-only", action="store_true", help="the same as without it")
    parser.add_argument("--rows", nargs="*", default=[], help="only rows with these words in their names, and plain")
    own, rest = parser.parse_known_args(argv)
    about = f"{__doc__} Also: --rows."
    speed.main("toolbox", about, lambda plain: speed.named(variants(plain), own.rows), LIMITS, rest)
    return 0
