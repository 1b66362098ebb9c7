"""What attention regulation costs on an SD1.5-shaped UNet, and what it does for prompts of several things on the bundled model.

The effect: pictures of held-out prompts with and without it at the same seeds, read back by the reader. The words are the nouns.
How much a picture changes is said twice, in place of LPIPS, for which the bundled model's world has no trained network: the root mean
square difference of pixels in [0, 1], and the mean squared distance of the reader's features, each pixel's scaled to length 1.
"""

from __future__ import annotations

import argparse
import itertools
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
LAUNCHES = 200
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


def launches() -> float:
    """Kernels that one regulated layer adds to a step."""
    plain = speed.with_data(32, torch.device("cpu"))
    family, sites = model_sites(plain)
    counts = []
    for patched in (plain, regulation.apply(plain, WORDS, Settings(end_percent=1.0))):
        run = speed.stepper(patched, 1, 16)
        run()
        with Launches() as counter:
            run()
        counts.append(counter.count)
    return (counts[1] - counts[0]) / len(regulation.auto_layers(sites, family))


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
    if not own.effect_only:
        about = (
            f"{__doc__} Also: --cost-only, --effect-only; of the second table --prompts, --things, --split, --cfg, --seed, and the node's "
            "settings."
        )
        speed.main("regulation", about, variants, LIMITS, rest, with_flops=False)
        print(f"\nkernel launches per regulated layer and step: {launches():.0f} (limit {LAUNCHES})")
    if not own.cost_only:
        print(
            f"\nThe bundled model, {own.prompts} held-out prompts of {own.things} things ({own.split}), 20 steps, cfg {own.cfg:g}, the same "
            "seeds:"
        )
        table(world.prompts(own.split, own.prompts, own.things), own.cfg, own.seed, rows(own))
    return 0
