"""Negative Prompt at cfg 1: what it costs on an SD1.5-shaped UNet, and what it keeps out of the bundled model's pictures.

A prompt names two things, and the negative one of them: how often the reader finds that one, and the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import torch

from ...demo import model, world
from ...patches import negative
from ...prove.statistics import shown_change, shown_share
from .shared import speed
from .shared.pictures import generate, verdicts
from .shared.records import recorded
from .shared.speed import PLAIN

TOGETHER = 25  # pictures at once
Strength = tuple[float, float, float]
OWN: Strength = (negative.AUTOMATIC,) * 3


def conditioning(width: int = 768) -> list[Any]:
    """A negative of one chunk for the SD1.5-shaped model."""
    return [[torch.randn(1, 77, width, generator=torch.Generator().manual_seed(3)), {}]]


def variants(plain: comfy.model_patcher.ModelPatcher) -> dict[str, comfy.model_patcher.ModelPatcher]:
    """The plain model, and the negative in every cross-attention of every step."""
    return {PLAIN: plain, "negative": negative.apply(plain, conditioning())}


@dataclass(frozen=True)
class Row:
    """What is done to the model with the negatives of some pictures, and the CFG scale."""

    name: str
    patch: Callable[[Any, list[Any]], Any]
    cfg: float = 1.0


def rows(strengths: Sequence[Strength]) -> list[Row]:
    """The plain model and each strength."""

    def with_strength(strength: Strength) -> Row:
        named = "own" if strength == OWN else " / ".join(f"{number:g}" for number in strength)
        return Row(f"negative, {named}", lambda base, texts: negative.apply(base, texts, *strength))

    return [Row("plain", lambda base, texts: base), *map(with_strength, strengths)]


def _strength(text: str) -> Strength:
    scale, tau, alpha = map(float, text.split(","))
    return scale, tau, alpha


def unwanted(caption: world.Caption, words: str) -> str:
    """The negative's text: the second thing, as the prompt has it or by its name alone."""
    thing = caption.things[1]
    said = (
        (thing.pattern if thing.pattern != "plain" else None, thing.colour, thing.noun) if words == "phrase" else (thing.noun,)
    )
    return " ".join(["a", *filter(None, said)])


def encoded(clip: Any, texts: Sequence[str]) -> list[Any]:
    """One conditioning of a text for each picture."""
    found = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in texts]
    return [[torch.cat([c for c, _ in found]), {"pooled_output": torch.cat([p for _, p in found])}]]


def effect(args: argparse.Namespace) -> None:
    """Print, per row, how often each of the two things is there, and paired differences to plain with 95 % intervals."""
    captions = world.prompts(args.split, args.prompts, 2)
    base, clip, vae = model.load()
    strengths = [_strength(s) for s in args.strengths] or [OWN]
    first: dict[str, list[bool]] = {}
    print(
        "| variant | the unwanted thing present | against plain | the other present | against plain | the other as said | against plain | time |"
    )
    print("|---|---|---|---|---|---|---|---|")
    seconds = 0.0
    for row in rows(strengths):
        began, drawn = time.perf_counter(), []
        for start in range(0, len(captions), TOGETHER):
            part = captions[start : start + TOGETHER]
            patched = row.patch(base, encoded(clip, [unwanted(c, args.words) for c in part]))
            drawn.append(generate(patched, clip, vae, [c.text for c in part], row.cfg, args.seed + start, args.steps))
        took = time.perf_counter() - began
        found = verdicts(torch.cat(drawn), captions)
        shares = {
            "unwanted": [v.present[1] for v in found],
            "other": [v.present[0] for v in found],
            "as said": [v.bound[0] for v in found],
        }
        first, seconds = first or shares, seconds or took
        cells = []
        for name, share in shares.items():
            cells += [shown_share(share), "" if shares is first else shown_change(first[name], share)]
        print(f"| {row.name} | {' | '.join(cells)} | {took / seconds:.2f} |", flush=True)


def settings(parser: argparse.ArgumentParser) -> None:
    """Options of the effect."""
    parser.add_argument("--cost-only", action="store_true", help="skip the effect")
    parser.add_argument("--effect-only", action="store_true", help="skip the cost")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--split", choices=("test", "tune"), default="test", help="tune is for choosing settings")
    parser.add_argument(
        "--words", choices=("phrase", "noun"), default="phrase", help="what of the unwanted thing the negative says"
    )
    parser.add_argument("--strengths", nargs="*", default=[], help="scale,tau,alpha of each row; the node's own by default")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--effect-steps", dest="steps", type=int, default=20)


@recorded
def main(argv: list[str]) -> int:
    """Print the cost at SD1.5's size, then the effect on the bundled model's pictures."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    settings(parser)
    own, rest = parser.parse_known_args(argv)
    if not own.effect_only:
        speed.main("negative", f"{__doc__} Also the options of the effect.", variants, {"negative": 1.05}, rest)
    if not own.cost_only:
        print(
            f"\nThe bundled model, {own.prompts} prompts of two things ({own.split}), {own.steps} steps, cfg 1, the same seeds:"
        )
        effect(own)
    return 0
