"""HeadHunter on the bundled model: what a candidate costs, whether what it finds carries over, and what large models cost on paper.

``cost`` compares sampling times in one process. ``effect`` searches on prompts of the tune split and compares the found heads on held-out
prompts (split test) with as many random heads and with the best whole layer, at the same seeds; all scores are in a log, so it can be
stopped and run again. ``paper`` is arithmetic.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...demo import world
from ...hunt import head_files
from ...hunt.batches import HeadSet, joined
from ...hunt.command import engine_of, filled, run
from ...hunt.engine import Engine
from ...hunt.log import Evaluations, Log
from ...hunt.report import report, sheet, story, time_left
from ...methods.headhunter import evaluations
from ...patches import softpag
from .shared.pictures import sample
from .shared.records import recorded

LIMIT = 0.6
GPUS = (1, 8, 64)
# layers, width, heads of a layer, tokens at 1024×1024 (SD3) and 512×512 (FLUX), steps: as in the paper, which searches without CFG
LARGE = {"SD3-medium": (24, 1536, 24, 4096 + 333, 20), "FLUX.1-dev": (57, 3072, 24, 1024 + 512, 15)}


def one_by_one(engine: Engine, sets: Sequence[HeadSet], images: Sequence[int], batch: bool) -> None:
    """What a user does without HeadHunter: SoftPAG and a KSampler for every candidate, picture by picture or all pictures at once."""
    s = engine.settings
    for heads in sets:
        patched = softpag.apply(engine.given, s.scale, s.perturbation, s.start_percent, 1.0, 0.0, engine.heads(heads))
        for part in [images] if batch else [[i] for i in images]:
            positive = joined([engine.positives[i % len(engine.positives)] for i in part])
            sample(
                patched,
                positive,
                engine.negative,
                engine.latent[:1],
                [s.seed + i for i in part],
                s.steps,
                s.cfg,
                s.sampler_name,
                s.scheduler,
                s.seed,
            )


def cost(args: argparse.Namespace) -> float:
    """Print the table of times; returns seconds per candidate's picture in batches, with everything."""
    captions = world.prompts("tune", args.cost_images, args.things)
    config = filled(_config(args, [c.text for c in captions]))
    engines = {start: engine_of({**config, "start_percent": start}) for start in (0.0, 0.2)}
    engine = engines[0.0]
    every = [(s.name, h) for s in engine.sites for h in range(s.heads)]
    sets: list[HeadSet] = [(head,) for head in every[:: max(1, len(every) // args.cost_heads)]]
    images = list(range(args.cost_images))

    def batched(made: Engine) -> Callable[[], None]:
        def run() -> None:
            made.shared.clear()
            for unit, numbers in made.plan(sets, images):
                made.latents(unit, numbers)

        return run

    runs: dict[str, Callable[[], None]] = {
        "one by one": lambda: one_by_one(engine, sets, images, False),
        "a candidate at a time, its pictures in one batch": lambda: one_by_one(engine, sets, images, True),
        "HeadHunter": batched(engine),
        "one by one, SoftPAG from 0.2": lambda: one_by_one(engines[0.2], sets, images, False),
        "HeadHunter, start_percent 0.2": batched(engines[0.2]),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.repeat + 1):  # interleaved; the first warms up
        for name, timed in runs.items():
            began = time.perf_counter()
            with torch.inference_mode():
                timed()
            if turn:
                times[name].append(time.perf_counter() - began)
        print(f"round {turn} of {args.repeat}", file=sys.stderr, flush=True)
    print(
        f"{len(sets)} heads × {len(images)} pictures, {args.steps} steps, cfg {args.cfg:g}, batches of up to {engine.rows}, sampling only"
    )
    print("| | s a picture | ratio | limit |\n|---|---|---|---|")
    for name, taken in times.items():
        base = times["one by one, SoftPAG from 0.2" if "0.2" in name else "one by one"]
        ratio = statistics.median(a / b for a, b in zip(taken, base, strict=True))
        limit = f"{LIMIT:g}" if name.startswith("HeadHunter") else ""
        print(f"| {name} | {statistics.median(taken) / len(sets) / len(images):.3f} | {ratio:.3f} | {limit} |", flush=True)
    return statistics.median(times["HeadHunter"]) / len(sets) / len(images)


# --- effect -------------------------------------------------------------------------------------------------------------


def _config(args: argparse.Namespace, prompts: list[str]) -> dict[str, Any]:
    return {
        "name": "bench headhunter",
        "prompts": prompts,
        "scorer": args.scorer,
        "objective": args.objective,
        "rounds": args.rounds,
        "heads_per_round": args.heads_per_round,
        "images_per_candidate": args.images,
        "steps": args.steps,
        "cfg": args.cfg,
        "scale": args.scale,
        "start_percent": args.start_percent,
        "seed": args.seed,
    }


def _scores(engine: Engine, log: Evaluations, sets: Sequence[HeadSet], count: int) -> list[list[float]]:
    """Every set's scores on the first pictures, from the log or made now."""
    for unit, numbers in engine.plan(list(dict.fromkeys(sets)), range(count)):
        missing = tuple(h for h in unit if not log.has(engine.text(h), numbers))
        if missing:
            log.add(replace(one, picture=None) for one in engine.evaluate(missing, numbers))
            print(f"{len(missing)} sets × {len(numbers)} pictures", file=sys.stderr, flush=True)
    return [log.scores(engine.text(heads), count) for heads in sets]


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), 1.96 * spread / math.sqrt(len(values))


def effect(args: argparse.Namespace) -> None:
    """Search on tune, report on test."""
    args.log.parent.mkdir(parents=True, exist_ok=True)

    def told(done: int, total: int, left: float) -> None:
        print(f"search: {done} of {total} pictures{time_left(left)}", file=sys.stderr, flush=True)

    tune = [c.text for c in world.prompts("tune", min(args.prompts, args.images), args.things)]
    config = _config(args, tune)
    engine, found = run(config, told, args.log)
    about = args.objective or "the prompts"
    print(report(engine, found, about), flush=True)
    sheet(engine, found).save(args.log.with_suffix(".png"))
    if args.preset:
        data = head_files.HeadFile(found.heads.family, found.heads.chosen, story(engine, found, about))
        print(f"preset: {head_files.save(data, engine.sites, engine.family, args.preset, head_files.PRESETS)}")
    halved = run({**config, "halving": 2}, told, args.log)[1]

    layers: list[HeadSet] = [tuple((s.name, h) for h in range(s.heads)) for s in engine.sites]
    log = Log(args.log)
    on_tune = _scores(engine, log.evaluations(engine.identities()), layers, args.images)
    best = max(range(len(layers)), key=lambda i: statistics.fmean(on_tune[i]))

    every = [(s.name, h) for s in engine.sites for h in range(s.heads)]
    draw = random.Random(args.seed)
    chance: list[HeadSet] = [tuple(draw.sample(every, len(found.hunt.heads))) for _ in range(args.random)]
    hunted: HeadSet = tuple(found.hunt.heads)
    quick: HeadSet = tuple(halved.hunt.heads)

    test = [c.text for c in world.prompts("test", args.test_prompts, args.things)]
    held_out = engine_of({**config, "prompts": test, "seed": args.seed + 100_000})
    sets = [(), hunted, quick, layers[best], *chance]
    scores = _scores(held_out, log.evaluations(held_out.identities()), sets, len(test))
    plain, ours, fast, layer = scores[:4]
    anything = [statistics.fmean(column) for column in zip(*scores[4:], strict=True)]
    total = evaluations(len(every), args.rounds, args.heads_per_round, args.images)
    fewer = evaluations(len(every), args.rounds, args.heads_per_round, args.images, 2)
    print(
        f"\n{len(test)} held-out prompts of {args.things} things (test), {args.steps} steps, cfg {args.cfg:g}, SoftPAG {args.scale:g}, "
        f"scorer {engine.scorers[0].name}; searched on {len(tune)} other prompts (tune), {args.images} pictures a candidate"
    )
    print("| variant | heads | score | against no heads | HeadHunter against it |\n|---|---|---|---|---|")
    rows = [
        ("no heads", 0, plain),
        (f"HeadHunter, {total} pictures", len(hunted), ours),
        (f"HeadHunter with halving, {fewer} pictures", len(quick), fast),
        (f"best single layer on tune, {engine.sites[best].name}", len(layers[best]), layer),
        (f"random heads, mean of {len(chance)} sets", len(hunted), anything),
    ]
    for name, count, values in rows:
        changes = [a - b for a, b in zip(values, plain, strict=True)], [a - b for a, b in zip(ours, values, strict=True)]
        cells = [_mean(values), *map(_mean, changes)]
        shown = [f"{cells[0][0]:.3f} (±{cells[0][1]:.3f})", *(f"{m:+.3f} ({m - h:+.3f} to {m + h:+.3f})" for m, h in cells[1:])]
        if values is plain:
            shown[1] = ""
        if values is ours:
            shown[2] = ""
        print(f"| {name} | {count} | {' | '.join(shown)} |")
    print(f"halving chose {len(set(hunted) & set(quick))} of the same {len(hunted)} heads; log: {args.log}")
    log.close()


# --- paper --------------------------------------------------------------------------------------------------------------


def paper(args: argparse.Namespace) -> None:
    """What one round over every head of a large model costs."""
    print(
        f"One round, {args.paper_images} pictures a head (SD3: 1024×1024, 20 steps; FLUX: 512×512, 15 steps), no CFG, batches of "
        f"{args.paper_rows} rows, a GPU that does {args.tflops:g} TFLOP/s here (set --tflops to what yours does)."
    )
    print(
        "A step: the plain forward of each picture, and the perturbed one from the candidate's own layer on; the steps before"
    )
    print(f"start_percent ({args.paper_start:g}) once for all.")
    print(
        "| model | heads | pictures | PFLOP a picture | of that shared before start | "
        + " | ".join(f"{n} GPU" for n in GPUS)
        + " |"
    )
    print("|---" * (5 + len(GPUS)) + "|")
    for name, (layers, width, heads, tokens, steps) in LARGE.items():
        block = 24 * width**2 * tokens + 4 * tokens**2 * width  # projections and MLP; both products of attention
        forward = layers * block
        share = statistics.fmean((layers - i) / layers for i in range(layers))  # of the perturbed pass that is left after reuse
        guided = (1 - args.paper_start) * steps * (1 + share) * forward
        alike = args.paper_start * steps * forward
        pictures = layers * heads * args.paper_images
        batches = math.ceil(pictures / args.paper_rows)
        cells = []
        for gpus in GPUS:
            seconds = math.ceil(batches / gpus) * args.paper_rows * guided / (args.tflops * 1e12)
            seconds += math.ceil(args.paper_images / gpus) * alike / (args.tflops * 1e12)
            cells.append(f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min")
        print(f"| {name} | {layers * heads} | {pictures} | {guided / 1e15:.2f} | {alike / 1e15:.2f} | {' | '.join(cells)} |")


@recorded
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench headhunter", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=("cost", "effect", "paper", []), help="which parts (default: all)")
    parser.add_argument("--things", type=int, default=2, help="objects in a prompt")
    parser.add_argument("--scorer", default="demo: share bound", help="as in a config of run.py hunt")
    parser.add_argument("--objective", default="")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-percent", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads-per-round", type=int, default=2)
    parser.add_argument("--images", type=int, default=32, help="pictures a candidate in the search")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of the search")
    parser.add_argument("--test-prompts", type=int, default=200, help="held-out prompts")
    parser.add_argument("--random", type=int, default=5, help="sets of random heads")
    parser.add_argument("--preset", default="", help="also keep the found heads as a preset of the pack, under this name")
    parser.add_argument("--log", type=Path, default=head_files.PACK / "output" / "bench_headhunter.sqlite")
    parser.add_argument("--cost-heads", type=int, default=12)
    parser.add_argument("--cost-images", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3, help="timed rounds")
    parser.add_argument("--tflops", type=float, default=300.0, help="of one GPU, as it really does them")
    parser.add_argument("--paper-images", type=int, default=20)
    parser.add_argument("--paper-rows", type=int, default=16)
    parser.add_argument("--paper-start", type=float, default=0.0)
    args = parser.parse_args(argv)
    parts = {"cost": cost, "effect": effect, "paper": paper}
    for name in args.parts or parts:
        print(f"--- {name} ---", flush=True)
        parts[name](args)
    return 0
