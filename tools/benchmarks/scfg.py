"""What semantic-aware CFG and captured maps cost, as ratios to a plain CFG step of the same SD1.5-shaped UNet, in one process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import comfy.model_patcher

from ...demo import model, world
from ...patches import scfg
from ...patches.hook.install import model_sites
from ...patches.maps import recorder
from ...patches.maps.layers import auto_sites, every_site
from ...patches.maps.reading import token_maps
from ...patches.maps.record import Settings as Kept
from .shared import speed
from .shared.pictures import generate
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


def distance(captions: Sequence[world.Caption], cfg: float, seed: int) -> None:
    """Print how far fewer layers are from all: shares of pixels that go to another token, or to the other side of the foreground.

    By the mean maps of the conditional half. In this model each block has one layer, so that the node's selection is all of them; what leaving
    layers out does is shown by every second one.
    """
    base, clip, vae = model.load()
    family, sites = model_sites(base)
    every = [s.name for s in every_site(sites, family)]
    rows = {"selection": [s.name for s in auto_sites(sites, family)], "every second layer": every[::2]}
    found: dict[str, list[list[float]]] = {name: [] for name in rows}
    for i, caption in enumerate(captions):
        patched, maps = scfg.apply(base, scfg.Settings(layers=scfg.ALL_LAYERS))
        generate(patched, clip, vae, [caption.text], cfg, seed + i)
        record = maps.record()
        for name, names in rows.items():
            part = replace(record, cross={s: record.cross[s] for s in names}, pixels={s: record.pixels[s] for s in names})
            shares = []
            for pair in (False, True):
                few, all_of_them = (token_maps(r, None, 4, 0.5, against_start=pair).argmax(dim=1) for r in (part, record))
                shares.append(float((few != all_of_them).float().mean()))
            found[name].append(shares)
    print(f"\nLayers that are read, against all {len(every)} of the bundled model, on {len(captions)} pictures:")
    print("| layers | of them | token labels that differ | foreground that differs |")
    print("|---|---|---|---|")
    for name, values in found.items():
        cells = [f"{100 * sum(v) / len(v):.0f} % ({100 * min(v):.0f}-{100 * max(v):.0f})" for v in zip(*values, strict=True)]
        print(f"| {name} | {len(rows[name])} | {' | '.join(cells)} |", flush=True)


@recorded
def main(argv: list[str]) -> int:
    """Print the cost at SD1.5's size, then how far fewer layers are from all on the bundled model's pictures."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cost-only", action="store_true", help="skip the layers' distance")
    parser.add_argument("--distance", type=int, default=20, help="pictures on which the selected layers are held against all")
    parser.add_argument("--distance-only", action="store_true", help="skip the cost")
    parser.add_argument("--split", choices=("test", "tune"), default="test")
    parser.add_argument("--cfg", type=float, default=5.0)
    own, rest = parser.parse_known_args(argv)
    if not own.distance_only:
        about = f"{__doc__} Also: --cost-only, --distance-only; --distance, --split, --cfg of the second table."
        speed.main("scfg", about, variants, LIMITS, rest, with_flops=False)
    if not own.cost_only:
        distance(world.prompts(own.split, own.distance), own.cfg, 1000)
    return 0
