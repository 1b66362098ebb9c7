"""What Detail++ costs against a KSampler batch of as many pictures on an SD1.5-shaped UNet; and what it rests on, on the bundled model."""

from __future__ import annotations

import argparse
import statistics
import unittest.mock as mock
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...demo import model, world
from ...demo.reader import Reading, load_reader, read
from ...language.decompose import decompose
from ...methods import detail as maths
from ...patches.detail import sampler as detail
from ...patches.detail.branches import BRANCH, EncodedBranch, SubjectColumns
from ...patches.detail.session import MASKS, OPTIMIZE, Session, Settings
from ...prove.statistics import shown_share
from .shared import speed
from .shared.pictures import generate
from .shared.records import recorded

COUNT = 4  # branches in the cost table: a base, one without details, two subjects
SHARED, UNSHARED = "Detail++, every step shared", "Detail++, no step shared"
UPDATED = "Detail++, every step optimised"
LIMITS = {SHARED: 1.0}
RUN = 30  # steps of the run whose cost is added up

# --- the cost -----------------------------------------------------------------------------------------------------------


def runs(patcher: Any, steps: int, latent: int) -> dict[str, Callable[[], Tensor]]:
    """Functions that sample ``steps`` CFG steps of `COUNT` pictures."""
    contexts = [torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(i)) for i in range(COUNT + 1)]
    subjects = [(), (), *((SubjectColumns(c, c, c),) for c in ((2, 3), (7,)))]
    positive = [
        [c, {BRANCH: EncodedBranch(i, COUNT, 77, subjects[i], content=tuple(range(1, 13)))}]
        for i, c in enumerate(contexts[:COUNT])
    ]
    negative = [[contexts[COUNT], {}]]
    image = torch.zeros(1, 4, latent, latent)
    noise = torch.randn(COUNT, *image.shape[1:], generator=torch.Generator().manual_seed(1))
    sampler = comfy.samplers.KSampler(patcher, steps, patcher.load_device, "euler", "normal", 1.0, patcher.model_options)
    batch = [[torch.cat(contexts[:COUNT]), {}]]

    @torch.inference_mode()
    def plain() -> Tensor:
        many = torch.zeros_like(noise)
        return sampler.sample(noise, batch, negative, 7.0, latent_image=many, disable_pbar=True, seed=1)

    def ours(**changes: Any) -> Callable[[], Tensor]:
        settings = {"optimize": OPTIMIZE[0], **changes}

        @torch.inference_mode()
        def run() -> Tensor:
            return detail.sample(
                patcher,
                positive,
                negative,
                {"samples": image},
                1,
                steps,
                7.0,
                "euler",
                "normal",
                settings=Settings(**settings),
                disable_pbar=True,
            )[0]

        return run

    return {
        f"KSampler, {COUNT} pictures": plain,
        SHARED: ours(share_until=1.0),
        "Detail++, exclusive masks": ours(share_until=1.0, masks=MASKS[1]),
        "Detail++, no layout shared": ours(share_until=1.0, share_max_tokens=1),
        UNSHARED: ours(share_until=0.0),
        "Detail++, one branch at a time": ours(share_until=1.0, branches_at_once=1),
        UPDATED: ours(share_until=1.0, optimize=OPTIMIZE[2], optimize_steps=steps),
    }


class _ToShapes(torch.autograd.Function):
    """Latents to tensors without data, on which a UNet is counted; gradients come back as zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty(x.shape, device="meta")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros(gradient.shape)


class _ToData(torch.autograd.Function):
    """Attention weights without data to random ones, which Detail++ can make masks and losses of."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor) -> Tensor:
        return torch.rand(weights.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.empty(gradient.shape, device="meta")


def flops(args: argparse.Namespace) -> None:
    """Count one step of each kind and one update, and add them up to whole runs."""
    patcher = speed.without_data(args.width)
    network = patcher.model.diffusion_model
    shapes = network.forward.__func__

    def forward(self: Any, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        shapes(self, _ToShapes.apply(x), *rest, **kwargs)
        return torch.zeros_like(x)

    def reader(self: Session, columns: Any, prompt_columns: int, act: Callable[..., None]) -> Any:
        return whole(self, columns, prompt_columns, lambda call, weights: act(call, _ToData.apply(weights)))

    network.forward = MethodType(forward, network)
    whole, counted = Session.reader, {}
    variants = {name: run for name, run in runs(patcher, 1, args.latent).items() if "exclusive" not in name}
    with mock.patch.object(Session, "reader", reader), mock.patch.object(maths, "UPDATES", (1, 1)):
        for name, run in variants.items():
            with FlopCounterMode(display=False) as counter:
                run()
            counted[name] = counter.get_total_flops()
    plain = counted[next(iter(variants))]
    update = counted[UPDATED] - counted[SHARED]
    print(
        f"SD1.5-shaped UNet, {args.width} channels, latent {args.latent}×{args.latent}: FLOPs to a step of {next(iter(variants))}"
    )
    print("| a step | FLOPs |\n|---|---|")
    for name, count in counted.items():
        print(f"| {name} | {count / plain:.3f} |")
    print(f"| one update of the optimisation, beside it | {update / plain:.3f} |")
    sigmas = comfy.samplers.KSampler(patcher, RUN, "cpu", "euler", "normal").sigmas
    sampling = patcher.get_model_object("model_sampling")
    early = sum(float(sigma) > float(sampling.percent_to_sigma(maths.EARLY)) for sigma in sigmas[: Settings.optimize_steps])
    most = early * maths.UPDATES[0] + (Settings.optimize_steps - early) * maths.UPDATES[1]
    shared = int(Settings.share_until * RUN + 0.5)
    steps = shared * counted[SHARED] + (RUN - shared) * counted[UNSHARED]
    print(f"\n| a run of {RUN} steps | updates | FLOPs | limit |\n|---|---|---|---|")
    for name, updates in (
        ("without the optimisation", 0),
        ("the whole method, every threshold met at once", Settings.optimize_steps),
        ("half of the updates that there may be", (most + Settings.optimize_steps) // 2),
        ("no threshold ever met", most),
    ):
        print(f"| {name} | {updates} | {(steps + updates * update) / (RUN * plain):.3f} | 1.30 |")


def cost(argv: list[str]) -> None:
    """Print ratios of time and memory to the batch, rounds interleaved, the first one to warm up and to take the peaks."""
    parser = argparse.ArgumentParser(prog="run.py bench detail", description=f"{__doc__} Also: --premise.")
    parser.add_argument("--latent", type=int, default=64, help="latent height and width; 64 is 512×512 pixels")
    parser.add_argument("--width", type=int, default=320, help="model channels, a multiple of 32; 320 is SD1.5's")
    parser.add_argument("--steps", type=int, default=1, help="sampling steps in a timed run")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each variant; 0 takes only the memory's peaks")
    parser.add_argument("--variants", nargs="*", default=[], help="only variants with one of these words in their names")
    parser.add_argument("--flops-only", action="store_true", help="count FLOPs, measure nothing: seconds instead of minutes")
    args = parser.parse_args(argv)
    flops(args)
    if args.flops_only:
        return
    device = comfy.model_management.get_torch_device()
    variants = speed.named(runs(speed.with_data(args.width, device), args.steps, args.latent), args.variants)
    first = next(iter(variants))
    times, peaks = speed.interleaved(variants, args.steps, args.rounds, device)
    print(f"SD1.5-shaped UNet, {args.width} channels, latent {args.latent}×{args.latent}, {device}: ratios to {first},")
    taking = f"takes {statistics.median(times[first]):.2f} s (median of {args.rounds}) and " if args.rounds else "needs "
    print(f"whose step {taking}{peaks[first] / 2**20:.0f} MB beside the weights")
    print("| variant | time | memory beside the weights | limit |")
    print("|---|---|---|---|")
    for name, taken in times.items():
        limit = f"{LIMITS[name]:.2f}" if name in LIMITS else ""
        time_of = f"{speed.paired(taken, times[first]):.3f}" if taken else "n/a"
        print(f"| {name} | {time_of} | {peaks[name] / peaks[first]:.3f} | {limit} |")


# --- the premise -------------------------------------------------------------------------------------------------------


def premise(captions: Sequence[world.Caption], cfg: float = 5.0, seed: int = 1000) -> None:
    """Does the model draw simpler prompts better? Detail++ rests on it. Each thing is looked for alone, whatever else was drawn."""
    base, clip, vae = model.load()
    reader = load_reader()

    def readings_of(texts: Sequence[str]) -> list[Reading]:
        return read(reader, generate(base, clip, vae, texts, cfg, seed))

    parts = [decompose(c.text, "subject").branches for c in captions]
    asked = [  # of which prompt, in which branch, which thing
        (i, branch.text, thing)
        for i, (caption, branches) in enumerate(zip(captions, parts, strict=True))
        for branch in branches[2:]
        for thing in caption.things
        if any(thing.noun in subject.text.split() for subject in branch.subjects)
    ]
    whole, bare = readings_of([c.text for c in captions]), readings_of([b[1].text for b in parts])
    alone = readings_of([text for _, text, _ in asked])
    details = {
        "the whole prompt": [_drawn(whole[i], thing) for i, _, thing in asked],
        "the sub-prompt with its details only": [_drawn(r, thing) for r, (_, _, thing) in zip(alone, asked, strict=True)],
    }
    print("\n| prompt | a thing and its details are right |\n|---|---|")
    for name, hits in details.items():
        print(f"| {name} | {shown_share(hits)} |")
    print("\n| prompt | every noun is drawn |\n|---|---|")
    for name, readings in (("the whole prompt", whole), ("p1, without details", bare)):
        there = [
            all(any(f.noun == t.noun for f in r.things) for t in c.things) for r, c in zip(readings, captions, strict=True)
        ]
        print(f"| {name} | {shown_share(there)} |", flush=True)


def _drawn(reading: Reading, thing: world.Stated) -> bool:
    said = {name: getattr(thing, name) for name in ("noun", "colour", "pattern") if getattr(thing, name) is not None}
    return any(all(getattr(found, name) == word for name, word in said.items()) for found in reading.things)


@recorded
def main(argv: list[str]) -> int:
    """Print the cost at SD1.5's size, or whether the method's premise holds on the bundled model."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cost-only", action="store_true", help="the same as without it")
    parser.add_argument("--premise", action="store_true", help="whether simpler prompts are drawn better, in place of the cost")
    parser.add_argument("--prompts", type=int, default=200, help="of the premise, of two things")
    parser.add_argument("--split", choices=("test", "tune"), default="test")
    own, rest = parser.parse_known_args(argv)
    if own.premise:
        premise(world.prompts(own.split, own.prompts))
    else:
        cost(rest)
    return 0
