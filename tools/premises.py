"""Premises: facts about SD1.5 and SDXL that a bundled model must share before any method is judged on it (``run.py premises``).

P1 leakage; P2 simple prompts are easier; P3 layout comes early; P4 attention finds its own thing early; P5 the text encoder is
close to a bag of words; P6 heads differ. No method runs here, and all prompts are of the split ``tune``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.sample
import numpy as np
import torch
from torch import Tensor

from ..demo.worlds import WORLDS, World
from ..methods.detail import subject_masks
from ..patches import headfilter
from ..patches.hook.install import model_sites
from ..patches.hook.sites import Heads
from ..patches.maps import recorder
from ..patches.maps.record import Settings as Kept
from ..prove.statistics import interval
from .benchmarks.shared.pictures import generate

CFG, STEPS, SEED = 5.0, 20, 5000


def share(name: str, answers: Sequence[bool], gate: str) -> None:
    """One line: a share with its 95 % interval, and what it should be."""
    if not answers:
        print(f"{name:72} no cases   {gate}", flush=True)
        return
    low, high = interval(sum(answers), len(answers))
    mean = 100 * sum(answers) / len(answers)
    print(f"{name:72}{mean:6.1f} % ({100 * low:.0f}–{100 * high:.0f} of {len(answers)})   {gate}", flush=True)


def mean_line(name: str, values: Sequence[float], gate: str) -> None:
    """One line: a mean with its 95 % interval."""
    found = np.asarray(values, float)
    half = 1.96 * found.std() / max(len(found), 1) ** 0.5
    mean = found.mean() if len(found) else float("nan")
    print(f"{name:72}{mean:6.2f} (±{half:.2f}, {len(found)} cases)   {gate}", flush=True)


class Premises:
    """One bundled model and its pictures of ``count`` prompts of two things."""

    def __init__(self, of: World, count: int):
        self.of, self.captions = of, [of.say(c, c.things) for c in of.world.prompts("tune", count)]
        self.model, self.clip, self.vae = of.load()
        self.family, self.sites = model_sites(self.model)
        self.pictures = self.draw(self.captions)
        self.verdicts = of.verdicts(self.pictures, self.captions)

    def draw(self, captions: Sequence[Any], model: Any = None, batch: int = 25) -> Tensor:
        texts = [c.text for c in captions]
        side = self.of.world.SIZE
        return generate(model or self.model, self.clip, self.vae, texts, CFG, SEED, STEPS, batch=batch, side=side)

    def leakage(self) -> None:
        share("P1 both things drawn", [v.all_present for v in self.verdicts], "≥ 80 %")
        share("P1 all details right, where both are drawn", [v.all_bound for v in self.verdicts if v.all_present], "40–70 %")

    def simple_is_easier(self) -> None:
        whole, alone, bare = [], [], [self.of.say(c, [self.of.bare(t) for t in c.things]) for c in self.captions]
        for i in range(2):
            parts = [self.of.say(c, [c.things[i]]) for c in self.captions]
            found = self.of.verdicts(self.draw(parts), parts)
            for v, one in zip(self.verdicts, found, strict=True):
                if v.present[i] and one.present[0]:
                    whole.append(v.bound[i])
                    alone.append(one.bound[0])
        share("P2 a drawn thing's details right, whole prompt", whole, "")
        share("P2 the same things' details right, sub-prompt", alone, "≥ 10 points more")
        share("P2 every noun drawn, whole prompt", [v.all_present for v in self.verdicts], "")
        share(
            "P2 every noun drawn, prompt without details",
            [v.all_present for v in self.of.verdicts(self.draw(bare), bare)],
            "as often",
        )

    @torch.inference_mode()
    def layout_comes_early(self) -> None:
        """Every colour is exchanged for another after 60 % of the steps."""
        colours, rng = list(self.of.world.COLOURS), np.random.default_rng(3)
        changed = []
        for c in self.captions:
            things = [
                replace(t, colour=str(rng.choice([k for k in colours if k != t.colour]))) if t.colour else t for t in c.things
            ]
            changed.append(self.of.say(c, things))
        empty = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(""))
        overlaps: list[float] = []
        recoloured: list[bool] = []
        for i, (before, after) in enumerate(zip(self.captions, changed, strict=True)):
            if before.text == after.text:
                continue
            positive = []
            for caption, start, end in ((before, 0.0, 0.6), (after, 0.6, 1.0)):
                cond, pooled = self.clip.encode_from_tokens(self.clip.tokenize(caption.text), return_pooled=True)
                positive.append([cond, {"pooled_output": pooled, "start_percent": start, "end_percent": end}])
            side = self.of.world.SIZE // 8
            latent = torch.zeros(1, 4, side, side)
            noise = comfy.sample.prepare_noise(latent, SEED + i)
            samples = comfy.sample.sample(
                self.model, noise, STEPS, CFG, "euler", "normal", positive, empty, latent, seed=SEED, disable_pbar=True
            )
            both = torch.cat((self.pictures[i : i + 1], self.vae.decode(samples)))
            (old, new), (masks, moved) = self.of.read(both), self.of.regions(both)
            for thing, mask in zip(old.things, masks, strict=True):
                wanted = {(a.noun, a.colour): b.colour for a, b in zip(before.things, after.things, strict=True)}
                ious = [float((mask & m).sum() / (mask | m).sum().clamp(min=1)) for m in moved]
                overlaps.append(max(ious, default=0.0))
                if ious and wanted.get((thing.noun, thing.colour)) not in (None, thing.colour):
                    recoloured.append(new.things[int(np.argmax(ious))].colour == wanted[thing.noun, thing.colour])
        mean_line("P3 a thing's mask before and after a late change of colours, IoU", overlaps, "≥ 0.8")
        share("P3 things recoloured by it", recoloured, "< 10 %")

    def attention_finds_things(self) -> None:
        """Thresholded as Detail++ publishes it, at a third of the steps; mean of all heads of the layers at half the latent's size."""
        chosen = [s for s in self.sites if s.stride == 2 and "cross" in s.kinds]
        heads = Heads(self.family, tuple((s.name, tuple(range(s.heads))) for s in chosen))
        patched, maps = recorder.apply(self.model, Kept("cross", "every step", "fp32", limit_mb=4096), heads)
        own: list[float] = []
        others: list[float] = []
        for i, caption in enumerate(self.captions):
            picture = generate(patched, self.clip, self.vae, [caption.text], CFG, SEED + i, STEPS, side=self.of.world.SIZE)
            (reading,), (masks,) = self.of.read(picture), self.of.regions(picture)
            drawn = {t.noun: m for t, m in zip(reading.things, masks, strict=True)}
            kept = maps.record()
            frames = torch.stack([p.frames[kept.steps[STEPS // 3]].float().mean(dim=1) for p in kept.cross.values()]).mean(
                dim=0
            )
            grid = next(iter(kept.cross.values())).grid
            places = self.columns(caption)
            for thing in caption.things:
                if thing.noun not in drawn:
                    continue
                column = frames[0, :, places[thing.noun]].mean(dim=-1).reshape(1, 1, *grid)
                large = torch.nn.functional.interpolate(column, size=masks.shape[1:], mode="bilinear")[0, 0]
                mask = subject_masks(large)
                own.append(float((mask & drawn[thing.noun]).sum() / (mask | drawn[thing.noun]).sum().clamp(min=1)))
                for noun, other in drawn.items():
                    if noun != thing.noun:
                        others.append(float((mask & other).sum() / other.sum().clamp(min=1)))
        mean_line("P4 a noun's map and its thing, IoU", own, "≥ 0.5")
        mean_line("P4 share of another thing that it covers", others, "≤ 0.2")

    def columns(self, caption: Any) -> dict[str, list[int]]:
        """The columns of each noun's tokens in the prompt's conditioning."""
        out: dict[str, list[int]] = {}
        column = 1
        for word in caption.text.replace(",", " ,").split():
            tokens = [t for t, *_ in next(iter(self.clip.tokenize(word).values()))[0] if t not in (49406, 49407)]
            if any(word == t.noun for t in caption.things):
                out.setdefault(word, list(range(column, column + len(tokens))))
            column += len(tokens)
        return out

    def heads_differ(self, heads: int = 24, seeds: int = 8) -> None:
        """How much silencing a head changes the picture: between heads, and between seeds of the same head."""
        every = [(s, h) for s in self.sites for h in range(s.heads)]
        rng = np.random.default_rng(4)
        some = [every[i] for i in rng.choice(len(every), min(heads, len(every)), replace=False)]
        captions, plain = self.captions[:seeds], self.pictures[:seeds]
        effects = []
        for site, head in some:
            rest = tuple(h for h in range(site.heads) if h != head)
            patched = headfilter.apply(self.model, Heads(self.family, ((site.name, rest),)), headfilter.BOTH)
            effects.append([float(d) for d in (self.draw(captions, patched) - plain).abs().mean(dim=(1, 2, 3))])
        found = np.log(np.asarray(effects) + 1e-6)
        between = found.mean(axis=1).var(ddof=1)
        within = (found - found.mean(axis=0)).var(axis=1, ddof=1).mean()
        boot = []
        for _ in range(500):
            rows = found[rng.integers(len(found), size=len(found))]
            boot.append(rows.mean(axis=1).var(ddof=1) / (rows - found.mean(axis=0)).var(axis=1, ddof=1).mean())
        low, high = np.percentile(boot, (2.5, 97.5))
        name = "P6 variance of a head's effect between heads, over that between seeds"
        print(f"{name:72}{between / within:6.2f} ({low:.2f}–{high:.2f})   > 1", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py premises", description=__doc__)
    parser.add_argument("world", nargs="?", choices=(*WORLDS,), default="stickers")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument(
        "--only", nargs="+", choices=("P1", "P2", "P3", "P4", "P5", "P6"), default=["P1", "P2", "P3", "P4", "P5", "P6"]
    )
    args = parser.parse_args(argv)
    of = WORLDS[args.world]()
    premises = Premises(of, args.prompts)
    print(f"{args.world}: {args.prompts} prompts of two things (tune), {STEPS} steps, cfg {CFG:g}, euler, seeds from {SEED}")
    steps = {
        "P1": premises.leakage,
        "P2": premises.simple_is_easier,
        "P3": premises.layout_comes_early,
        "P4": premises.attention_finds_things,
        "P5": lambda: print(f"P5 {of.bag_of_words or 'was not measured: only training has the tower of pictures'}"),
        "P6": premises.heads_differ,
    }
    for name in args.only:
        steps[name]()
    return 0
