"""What attention regulation costs on an SD1.5-shaped UNet, in time, memory and launches of kernels, and what its solver reaches."""

from __future__ import annotations

import argparse
import math
from typing import Any

import comfy.model_patcher
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...language.words import Phrase, Words
from ...methods import regulation as maths
from ...patches import regulation
from ...patches.hook.install import model_sites
from .shared import speed
from .shared.records import recorded
from .shared.speed import PLAIN

Settings = regulation.Settings
HALF = "regulation, half of the steps"
LIMITS = {HALF: 1.12}
LAUNCHES = 50  # of a regulated layer, on average over the 25 regulated steps of the paper's 50
BARE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach", "detach_", "lift_fresh", "sym_size"}

# A prompt of the usual length that names two things, one of them of two tokens.
_PHRASES = tuple(Phrase(str(c), c, {"l": c}) for c in ((2,), (6, 7)))
WORDS = Words("", _PHRASES, _PHRASES, (0, *range(12, 77)), 77, {"l": 77})


def variants(plain: comfy.model_patcher.ModelPatcher) -> dict[str, comfy.model_patcher.ModelPatcher]:
    """The plain model, and everything that is compared with it. (0.45: just under half of the steps' noise, so half of the steps.)"""
    return {
        PLAIN: plain,
        HALF: regulation.apply(plain, WORDS, Settings(end_percent=0.45)),
        "regulation, every step": regulation.apply(plain, WORDS, Settings(end_percent=1.0)),
        "released form, every step": regulation.apply(plain, WORDS, Settings(form=regulation.RELEASED, end_percent=1.0)),
        "regulation outside its span": regulation.apply(plain, WORDS, Settings(start_percent=1.0, end_percent=1.0)),
    }


class Launches(TorchDispatchMode):
    """Counts the operations that start a kernel on a GPU: all but views and bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # what is made of other operations counts as those
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not view and func.overloadpacket.__name__ not in BARE
        return func(*args, **(kwargs or {}))


def launches(settings: Settings) -> tuple[float, float]:
    """Kernels that one regulated layer adds to the first step, and to a later one."""
    plain = speed.with_data(32, torch.device("cpu"))
    family, sites = model_sites(plain)
    patched, counts = regulation.apply(plain, WORDS, settings), []
    for steps in (1, 2):
        added = []
        for model_of in (plain, patched):
            run = speed.stepper(model_of, steps, 16)
            run()
            with Launches() as counter:
                run()
            added.append(counter.count)
        counts.append((added[1] - added[0]) / len(regulation.auto_layers(sites, family)))
    return counts[0], counts[1] - counts[0]


def synthetic(size: int, turn: float, maps: int = 8) -> Tensor:
    """Smooth random weights of two words and of all others together, ``[3, maps, size²]``; ``turn`` goes from some maps to others."""
    parts = []
    for seed in (1, 2):
        noise = torch.randn(maps, 12, 16, 16, generator=torch.Generator().manual_seed(seed))
        side = torch.exp(-((torch.arange(16)[:, None] - torch.arange(16)) ** 2) / 6.0)
        smooth = side @ noise @ side
        parts.append(1.5 * smooth / smooth.std())
    scores = math.cos(turn) * parts[0] + math.sin(turn) * parts[1]
    scores[:, 0] += 5.0  # the start token
    large = F.interpolate(scores, (size, size), mode="bilinear").flatten(2).transpose(1, 2)
    return maths.with_others(large.softmax(dim=-1)[:, None], torch.tensor([2, 4]))[:, :, 0]


def reached(size: int, steps: int = 10) -> list[float]:
    """The 90 % quantile of two words on maps that change from step to step: plain, in the first step, on average, and by the released code."""
    p, released = (maths.problem((size, size), 2, 80.0, weight, None, form) for weight, form in ((0.1, False), (0.09, True)))
    average: Tensor | None = None
    out = []
    for step in range(steps):
        weights = synthetic(size, 0.05 * step)
        theta = maths.start(2, weights.shape[1], step, weights)
        if average is None:
            average = maths.solve(weights, maths.additive(theta, p), p)
        else:
            average = maths.average(average, maths.solve(weights, average, p, again=True), regulation.DEFAULTS.ema)
        edits = [torch.zeros_like(average), average, maths.published(weights, theta, released)]
        out.append([float(maths.quantile(maths.regulated(weights.log(), edit)[:-1]).mean()) for edit in edits])
    plain, ours, theirs = (list(values) for values in zip(*out, strict=True))
    return [sum(plain) / steps, ours[0], sum(ours) / steps, sum(theirs) / steps]


def effort() -> None:
    """Print what is started on a GPU, and what it reaches."""
    print("\n| form | launches per layer: first step | later step | average of 10 steps | average of 25 steps | limit |")
    print("|---|---|---|---|---|---|")
    for form in regulation.FORMS:
        first, later = launches(Settings(form=form, end_percent=1.0))
        averages = " | ".join(f"{(first + (steps - 1) * later) / steps:.0f}" for steps in (10, 25))
        print(
            f"| {form} | {first:.0f} | {later:.0f} | {averages} | {LAUNCHES if form == regulation.PAPER else ''} |", flush=True
        )
    print("\n| map | 90 % quantile: plain | first step | average of 10 steps | released code |")
    print("|---|---|---|---|---|")
    for size in (16, 32, 64):
        print(f"| {size}×{size} | " + " | ".join(f"{value:.2f}" for value in reached(size)) + " |", flush=True)


@recorded
def main(argv: list[str]) -> int:
    """Print the cost at SD1.5's size, and the launches with what they reach."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cost-only", action="store_true", help="measure, and skip the launches")
    parser.add_argument("--effort-only", action="store_true", help="count launches and the quantile reached, measure nothing")
    own, rest = parser.parse_known_args(argv)
    if not own.effort_only:
        speed.main("regulation", f"{__doc__} Also: --cost-only, --effort-only.", variants, LIMITS, rest, with_flops=False)
    if not own.cost_only:
        effort()
    return 0
