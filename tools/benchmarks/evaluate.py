"""How well the bundled model says what a prompt says, plain and with SoftPAG: pictures of held-out prompts at the same seeds."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ...demo import model, world
from ...patches import softpag
from ...patches.hook.install import model_sites
from ...patches.hook.sites import select
from .shared.pictures import Variant, each_of, table
from .shared.records import recorded


@recorded
def main(argv: list[str]) -> int:
    """Print the table of the plain model and SoftPAG at several CFG scales."""
    parser = argparse.ArgumentParser(prog="run.py bench evaluate", description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--things", type=int, default=2, help="objects in a prompt, 1 to 3")
    parser.add_argument("--split", choices=("test", "tune"), default="test", help="tune is for choosing settings")
    parser.add_argument("--cfg", type=float, nargs="+", default=[5.0, 2.0, 1.0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--scale", type=float, default=3.0, help="SoftPAG's scale")
    parser.add_argument("--perturbation", type=float, default=1.0)
    parser.add_argument("--heads", default="middle.*.*", help="SoftPAG's head selection")
    parser.add_argument(
        "--targets", nargs="+", default=["identity"], metavar="TARGET[:u]", help="SoftPAG's targets, a row each, and how far"
    )
    parser.add_argument("--keep", action="store_true", help="write the plain model's shares into the weights' metadata")
    args = parser.parse_args(argv)
    captions = world.prompts(args.split, args.prompts, args.things)

    def soft(named: str) -> Variant:
        target, _, u = named.partition(":")

        def patch(patched: Any) -> Any:
            family, sites = model_sites(patched)
            heads = select(args.heads, sites, family)
            return softpag.apply(patched, args.scale, float(u or args.perturbation), heads=heads, target=target)

        return Variant("SoftPAG" if args.targets == ["identity"] else f"SoftPAG, {named}", patch, 1.0)

    softened = [soft(named) for named in args.targets]
    variants = [
        v for cfg in args.cfg for v in (Variant("plain", lambda m: m, cfg), *(replace(one, cfg=cfg) for one in softened))
    ]
    print(
        f"{len(captions)} held-out prompts of {args.things} things ({args.split}), {args.steps} steps, euler, seeds from {args.seed}"
    )
    results = table(variants, captions, args.seed, args.steps)
    if args.keep:
        plain = results[f"plain {args.cfg[0]:g}"]
        shares = {what: sum(each_of(plain, what)) / len(plain) for what in ("present", "colour", "pattern", "bound")}
        keep({"prompts": len(plain), "things": args.things, "cfg": args.cfg[0], "steps": args.steps, **shares})
    return 0


def keep(metrics: dict[str, float]) -> None:
    """Add figures to the metadata of the shipped weights."""
    path = model.WEIGHTS / f"{model.VARIANTS[0]}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {**(file.metadata() or {}), "metrics": json.dumps(metrics)}
    save_file(load_file(path), path, metadata=metadata)
