"""What attention regulation costs on an SD1.5-shaped UNet, and what it does for prompts of several things on the bundled model.

The effect: pictures of held-out prompts with and without it at the same seeds, read back by the reader. The words are the nouns.
How much a picture changes is said twice, in place of LPIPS, for which the bundled model's world has no trained network: the root mean
square difference of pixels in [0, 1], and the mean squared distance of the reader's features, each pixel's scaled to length 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_patcher
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...demo import model, world
from ...demo.reader import Reader, Verdict, load_reader
from ...language.words import Phrase, Words, prompt_words
from ...methods import regulation as maths
from ...patches import regulation
from ...patches.hook.install import model_sites
from ...patches.hook.sites import select
from .shared import speed
from .shared.pictures import generate, shown_change, shown_share, verdicts
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


# --- the effect -------------------------------------------------------------------------------------------------------


def draw(base: Any, clip: Any, vae: Any, captions: Sequence[world.Caption], cfg: float, seed: int, patch: Callable) -> Tensor:
    """One picture per caption, each with its own words: ``patch(model, words)``."""
    out = []
    for i, caption in enumerate(captions):
        words = prompt_words(clip, caption.text, ", ".join(dict.fromkeys(t.noun for t in caption.things)))
        out.append(generate(patch(base, words), clip, vae, [caption.text], cfg, seed + i))
    return torch.cat(out)


@torch.inference_mode()
def change(reader: Reader, before: Tensor, after: Tensor) -> tuple[float, float]:
    """How much pictures ``[B, H, W, 3]`` differ: RMS of pixels, and distance of the reader's features."""
    features = []
    for pictures in (before, after):
        cells = reader.cells(pictures.permute(0, 3, 1, 2).float() * 2 - 1)
        wide = F.interpolate(reader.wide(cells), scale_factor=2.0, mode="nearest")
        features.append(F.normalize(reader.merge(torch.cat((wide, cells), dim=1)), dim=1))
    pixels = (before - after).float().square().mean(dim=(1, 2, 3)).sqrt().mean()
    return float(pixels), float((features[0] - features[1]).square().sum(dim=1).mean())


def table(captions: Sequence[world.Caption], cfg: float, seed: int, rows: Sequence[tuple[str, Callable]]) -> None:
    """Shares with 95 % intervals, paired differences to the first row, and the change of the pictures."""
    base, clip, vae = model.load()
    reader = load_reader()
    print("| variant | objects present | against plain | all bound | against plain | pixels | features | s a picture |")
    print("|---|---|---|---|---|---|---|---|")
    first: tuple[Tensor, list[Verdict]] | None = None
    for name, patch in rows:
        began = time.perf_counter()
        pictures = draw(base, clip, vae, captions, cfg, seed, patch)
        seconds = (time.perf_counter() - began) / len(captions)
        found = verdicts(pictures, captions)
        plain, known = first = first or (pictures, found)
        cells = []
        for what in ("all_present", "all_bound"):
            answers, before = ([getattr(v, what) for v in verdicts] for verdicts in (found, known))
            cells += [shown_share(answers), "" if found is known else shown_change(before, answers)]
        pixels, features = change(reader, plain, pictures)
        print(f"| {name} | {' | '.join(cells)} | {pixels:.3f} | {features:.3f} | {seconds:.2f} |", flush=True)


def settings(parser: argparse.ArgumentParser) -> None:
    """Options of the second table; several values of one make a row each, of several ones a row for every combination."""
    parser.add_argument("--cost-only", action="store_true", help="skip the effect")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--things", type=int, default=2, help="objects in a prompt, 1 to 3")
    parser.add_argument("--split", choices=("test", "tune"), default="test", help="tune is for choosing settings")
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--effect-only", action="store_true", help="skip the cost")
    parser.add_argument("--layers", nargs="+", default=["auto"], help="auto, or site selections")
    for name, value in (("strength", 1.0), ("mass-weight", 80.0), ("deviation-weight", 0.1), ("ema", 0.25), ("decay", 0.99)):
        parser.add_argument(f"--{name}", type=float, nargs="+", default=[value])
    parser.add_argument("--end-percent", type=float, nargs="+", default=[0.5])
    parser.add_argument("--iterations", type=int, nargs="+", default=[20])
    parser.add_argument("--effort-only", action="store_true", help="count launches and the quantile reached, measure nothing")


def rows(args: argparse.Namespace) -> list[tuple[str, Callable]]:
    """The plain row, and one for every combination of settings."""
    names = ("strength", "layers", "iterations", "mass_weight", "deviation_weight", "ema", "decay", "end_percent")
    values = [getattr(args, n) for n in names]
    out: list[tuple[str, Callable]] = [("plain", lambda base, words: base)]
    for combination in itertools.product(*values):
        chosen = dict(zip(names, combination, strict=True))
        said = [f"{n} {v}" for n, v in chosen.items() if len(getattr(args, n)) > 1]
        layers = chosen.pop("layers")

        def patch(base: Any, words: Words, chosen: dict[str, Any] = chosen, layers: str = layers) -> Any:
            family, sites = model_sites(base)
            heads = None if layers == "auto" else select(layers, sites, family)
            return regulation.apply(base, words, Settings(**chosen), heads)

        out.append((", ".join(["regulation", *said]), patch))
    return out


@recorded
def main(argv: list[str]) -> int:
    """Print the cost at SD1.5's size, the launches, then the effect on the bundled model's pictures."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    settings(parser)
    own, rest = parser.parse_known_args(argv)
    if own.effort_only:
        effort()
        return 0
    if not own.effect_only:
        about = (
            f"{__doc__} Also: --cost-only, --effect-only, --effort-only; of the second table --prompts, --things, --split, --cfg, --seed, and "
            "the node's settings."
        )
        speed.main("regulation", about, variants, LIMITS, rest, with_flops=False)
        effort()
    if not own.cost_only:
        print(
            f"\nThe bundled model, {own.prompts} held-out prompts of {own.things} things ({own.split}), 20 steps, cfg {own.cfg:g}, the same "
            "seeds:"
        )
        table(world.prompts(own.split, own.prompts, own.things), own.cfg, own.seed, rows(own))
    return 0
