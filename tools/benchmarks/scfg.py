"""What semantic-aware CFG and captured maps cost, as ratios to a plain CFG step of the same SD1.5-shaped UNet, in one process."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import comfy.model_patcher

from ...demo import world
from ...patches import scfg
from ...patches.maps import recorder
from ...patches.maps.record import Settings as Kept
from .shared import speed
from .shared.pictures import Variant, table
from .shared.records import recorded
from .shared.speed import PLAIN

LIMITS = {"S-CFG": 1.10}


def variants(plain: comfy.model_patcher.ModelPatcher) -> dict[str, comfy.model_patcher.ModelPatcher]:
    """The plain model, and everything that is compared with it."""
    return {
        PLAIN: plain,
        "S-CFG": scfg.apply(plain)[0],
        "S-CFG without completion": scfg.apply(plain, scfg.Settings(completion=0))[0],
        "S-CFG outside its span": scfg.apply(plain, scfg.Settings(start_percent=1.0))[0],
        "capture, words": recorder.apply(plain, Kept(kind="cross"))[0],
        "capture, words and pixels": recorder.apply(plain)[0],
    }


def _patched(reference: str, model: Any) -> Any:
    return scfg.apply(model, scfg.Settings(reference))[0]


@recorded
def main(argv: list[str]) -> int:
    """Print the cost at SD1.5's size, then the effect on the bundled model's pictures."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cost-only", action="store_true", help="skip the effect")
    parser.add_argument("--effect-only", action="store_true", help="skip the cost")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--split", choices=("test", "tune"), default="test")
    parser.add_argument("--cfg", type=float, default=5.0)
    own, rest = parser.parse_known_args(argv)
    if not own.effect_only:
        about = f"{__doc__} Also: --cost-only, --effect-only; --prompts, --split, --cfg of the second table."
        speed.main("scfg", about, variants, LIMITS, rest, with_flops=False)
    if not own.cost_only:
        print(f"\nThe bundled model, {own.prompts} held-out prompts of two things, 20 steps, the same seeds:")
        rows = [Variant("plain", lambda m: m, own.cfg)]
        rows += [Variant(f"S-CFG, {r}", partial(_patched, r), own.cfg) for r in scfg.REFERENCES]
        table(rows, world.prompts(own.split, own.prompts), 1000, 20)
    return 0
