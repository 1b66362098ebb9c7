"""How well attention finds the things of a picture: overlap of word masks with the regions that the reader sees.

Pictures of held-out prompts are made with the bundled model; each noun's mask from Attention Segmentation is held against the
drawn things of that noun.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from ...demo import model, world
from ...demo.reader import load_reader, read, regions
from ...language.words import prompt_words
from ...methods import maps as maths
from ...patches.maps import recorder
from ...patches.maps.reading import token_maps
from ...patches.maps.record import Settings as Kept
from .shared.pictures import generate
from .shared.records import recorded

POWERS = {"with completion": 4, "without completion": 0}


def overlap(mask: Tensor, region: Tensor) -> float:
    """Intersection over union of two boolean masks."""
    return float((mask & region).sum() / (mask | region).sum().clamp_min(1))


def measure(captions: list[world.Caption], seed: int, cfg: float, steps: int, batch: int = 25) -> dict[str, list[float]]:
    """The IoU of every noun that was drawn, per variant."""
    base, clip, vae = model.load()
    reader = load_reader()
    found: dict[str, list[float]] = {name: [] for name in POWERS}
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        patched, held = recorder.apply(base, Kept(precision="fp32"))
        pictures = generate(patched, clip, vae, [c.text for c in part], cfg, seed + start, steps, batch)
        record = held.record()
        drawn = list(zip(read(reader, pictures), regions(reader, pictures), strict=True))
        for name, powers in POWERS.items():
            tokens = token_maps(record, None, powers, 0.5)
            for i, (caption, (reading, areas)) in enumerate(zip(part, drawn, strict=True)):
                nouns = list(dict.fromkeys(t.noun for t in caption.things))
                chosen = prompt_words(clip, caption.text, ", ".join(nouns))
                columns = [p.columns for p in chosen.phrases]
                labels = maths.segment(tokens[i : i + 1], columns, (pictures.shape[1], pictures.shape[2]))[0]
                for j, noun in enumerate(nouns, 1):
                    own = [a for t, a in zip(reading.things, areas, strict=True) if t.noun == noun]
                    if own:
                        found[name].append(overlap(labels == j, torch.stack(own).any(dim=0)))
        print(f"{start + len(part)} of {len(captions)}", flush=True)
    return found


@recorded
def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="run.py bench segmentation", description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--things", type=int, default=2, help="objects in a prompt, 1 to 3")
    parser.add_argument("--split", choices=("test", "tune"), default="test", help="tune is for choosing settings")
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args(argv)
    captions = world.prompts(args.split, args.prompts, args.things)
    found = measure(captions, args.seed, args.cfg, args.steps)
    print("| word masks | mean IoU | nouns drawn |")
    print("|---|---|---|")
    for name, values in found.items():
        overlaps = torch.tensor(values, dtype=torch.float64)
        half = 1.96 * float(overlaps.std()) / math.sqrt(len(overlaps))
        print(f"| {name} | {overlaps.mean():.3f} (±{half:.3f}) | {len(values)} |")
    return 0
