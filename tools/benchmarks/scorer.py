"""How well the demo scorer tells pictures and texts of the world of shapes apart, on scenes that its training never saw.

Retrieval: the right one among 256 scenes. Nearly true: a caption against the same caption with one thing wrong. Phrases: what
single things of a picture are said to be, true ones and nearly true ones, at one threshold for all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...demo import model, world
from ...demo.scorer import DemoScorer
from ...prove.statistics import shown_share
from ..training.scorer import other, swapped, true
from .shared.pictures import generate, verdicts
from .shared.records import recorded

NEAR = ("colours swapped", "wrong colour", "wrong pattern", "wrong thing", "thing left out")


def held_out(split: str, count: int, seed: int) -> tuple[list[world.Scene], list[world.Caption]]:
    """Scenes of two and three things, and captions that say all of them."""
    source, rng = world.scenes(split, 2_000_003 + seed), np.random.default_rng([5, seed])
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = next(source)
        if len(scene.things) > 1 and len({t.colour for t in scene.things}) > 1 and len({t.noun for t in scene.things}) > 1:
            scenes.append(scene)
    return scenes, [world.describe(s, rng, full=True) for s in scenes]


def renders(scenes: Sequence[world.Scene]) -> Tensor:
    """``[B, 128, 128, 3]`` in [0, 1]."""
    return torch.from_numpy(np.stack([world.render(s) for s in scenes])).float() / 255


def retrieval(cosines: Tensor, holds: Tensor) -> tuple[float, float]:
    """Shares right of texts looking for pictures and of pictures looking for texts; others that also fit do not count against.

    Args:
        cosines: ``[N, N]``, pictures by texts, matching ones on the diagonal.
        holds: ``bool [N, N]``, texts by pictures.
    """
    own = torch.eye(len(cosines), dtype=torch.bool)
    fair = cosines.masked_fill(holds.T & ~own, -torch.inf)
    right = torch.arange(len(cosines))
    return float((fair.argmax(0) == right).float().mean()), float((fair.argmax(1) == right).float().mean())


def near(scorer: DemoScorer, pictures: Tensor, scenes: Sequence[world.Scene], left_out: Tensor | None) -> dict[str, list[bool]]:
    """Does the true caption beat the nearly true one: an answer for every picture and kind of `NEAR`.

    Args:
        left_out: the pictures without one of their things; None leaves the last kind out.
    """

    def say(scene: world.Scene, i: int) -> str:
        return world.describe(scene, np.random.default_rng([9, i]), full=True).text  # the same wording for both

    rng = np.random.default_rng(8)
    seen = scorer.features(pictures)
    mine = (seen * scorer.text_features([say(s, i) for i, s in enumerate(scenes)])).sum(1)
    changes = {
        "colours swapped": lambda s: swapped(s, rng),
        "wrong colour": lambda s: other(s, rng, "colour"),
        "wrong pattern": lambda s: other(s, rng, "pattern"),
        "wrong thing": lambda s: other(s, rng, "noun"),
    }
    out = {}
    for name, change in changes.items():
        wrong = (seen * scorer.text_features([say(change(s), i) for i, s in enumerate(scenes)])).sum(1)
        out[name] = (mine > wrong).tolist()
    if left_out is not None:
        full = scorer.text_features([say(s, i) for i, s in enumerate(scenes)])
        out["thing left out"] = (mine > (scorer.features(left_out) * full).sum(1)).tolist()
    return out


def phrases(scorer: DemoScorer, pictures: Tensor, scenes: Sequence[world.Scene]) -> dict[str, tuple[float, float]]:
    """Shares said right at the cosine `DemoScorer.even`: of true phrases and of false ones, by what a phrase says.

    False ones take a colour or a pattern from nowhere in the picture's thing, or another thing's colour.
    """
    rng = np.random.default_rng(10)
    said: dict[str, tuple[list[tuple[int, str]], list[tuple[int, str]]]] = {
        name: ([], []) for name in ("star", "a red star", "a red striped star")
    }
    for i, scene in enumerate(scenes):
        wrong = {"noun": other(scene, rng, "noun"), "swap": swapped(scene, rng), "pattern": other(scene, rng, "pattern")}
        for name, what, wording in (
            ("star", "noun", "{noun}"),
            ("a red star", "swap", "a {colour} {noun}"),
            ("a red striped star", "pattern", "a {colour} {pattern} {noun}"),
        ):
            told = [[wording.format(**vars(t)) for t in s.things] for s in (scene, wrong[what])]
            said[name][0].extend((i, t) for t in told[0])
            said[name][1].extend((i, t) for t in set(told[1]) - set(told[0]))
    seen, out = scorer.features(pictures), {}
    for name, sides in said.items():
        shares = []
        for pairs, wanted in zip(sides, (True, False), strict=True):
            cosines = (seen[[i for i, _ in pairs]] * scorer.text_features([t for _, t in pairs])).sum(1)
            shares.append(float(((cosines > scorer.even) == wanted).float().mean()))
        out[name] = (shares[0], shares[1])
    return out


def without_one(scene: world.Scene) -> world.Scene:
    return replace(scene, things=scene.things[1:])


@recorded
@torch.inference_mode()
def main(argv: list[str]) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="run.py bench scorer", description=__doc__)
    parser.add_argument("--scenes", type=int, default=256, help="among which the right one is looked for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drawn", type=int, default=256, help="prompts drawn by the bundled model; 0 leaves them out")
    parser.add_argument("--weights", type=Path, default=None, help="another file than the shipped one")
    args = parser.parse_args(argv)
    scorer = DemoScorer(args.weights)
    scenes, captions = held_out("test", args.scenes, args.seed)
    holds = true(captions, scenes)
    clean = renders(scenes)
    loaded = model.load()
    vae = loaded[2]
    back = vae.decode(vae.encode(clean))
    print(f"{len(scenes)} scenes of two and three things (test), an even chance at cosine {scorer.even:.3f}")
    print(f"| pictures | text finds picture | picture finds text | {' | '.join(NEAR)} |")
    print("|---" * (3 + len(NEAR)) + "|")
    for name, pictures in (("rendered", clean), ("through the autoencoder", back)):
        found = retrieval(scorer.scores(pictures, [c.text for c in captions]), holds)
        lacking = renders([without_one(s) for s in scenes])
        answers = near(scorer, pictures, scenes, lacking if name == "rendered" else vae.decode(vae.encode(lacking)))
        cells = [f"{100 * share:.1f} %" for share in found] + [shown_share(answers[kind]) for kind in NEAR]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if args.drawn:
        wanted = world.prompts("test", args.drawn)
        drawn = generate(*loaded, [c.text for c in wanted], 5.0, 1000)
        right = [i for i, v in enumerate(verdicts(drawn, wanted)) if v.all_bound]
        cosines = scorer.scores(drawn, [c.text for c in wanted])
        hits = retrieval(cosines, same(wanted))
        cells = [f"{100 * share:.1f} %" for share in hits]
        print(f"| drawn by the model | {' | '.join(cells)} |{' |' * len(NEAR)}", flush=True)
        own, good = cosines.diagonal(), torch.zeros(len(wanted), dtype=torch.bool)
        good[right] = True
        better = (
            (own[good][:, None] > own[~good][None]).float().mean()
            if (~good).any() and good.any()
            else torch.tensor(float("nan"))
        )
        print(f"\nof drawn pictures, one that the reader finds right beats a wrong one in {100 * better:.1f} % of pairs")
    print("\n| phrases such as | true ones taken for true | false ones for false |\n|---|---|---|")
    for name, shares in phrases(scorer, back, scenes).items():
        print(f"| {name} | {100 * shares[0]:.1f} % | {100 * shares[1]:.1f} % |")
    return 0


def same(captions: Sequence[world.Caption]) -> Tensor:
    """``bool [N, N]``: captions that state the same things of the same background."""
    keys = [(sorted(map(str, c.things)), c.background, c.relation) for c in captions]
    return torch.tensor([[a == b for b in keys] for a in keys])
