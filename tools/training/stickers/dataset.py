"""Pictures drawn ahead of training, in shards of a thousand that are kept on disk: the same numbers, the same pictures."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ....demo.stickers import world
from .renderer import render
from .sources import WORK
from .spoiled import spoil

SHARD = 1000  # pictures
OWNER = 64  # cells, side of the map of who is where


def scenes_of(split: str, shard: int) -> list[world.Scene]:
    """The scenes of a shard; "spoiled" ones are scenes of ``train`` in which some things are spoiled."""
    source = world.scenes("train", 1_000 + shard) if split == "spoiled" else world.scenes(split, shard)
    return list(itertools.islice(source, SHARD))


def _path(split: str, shard: int, what: str) -> Path:
    return WORK / "pictures" / f"{split}_{shard:03d}_{what}.npy"


def draw(split: str, shard: int) -> None:
    """Draw a shard unless it is there."""
    path = _path(split, shard, "pictures")
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = np.empty((SHARD, world.SIZE, world.SIZE, 3), np.uint8)
    owners = np.empty((SHARD, OWNER, OWNER), np.uint8)
    fates = np.zeros((SHARD, 3), np.uint8)  # of each thing: whole, in two colours or not a thing
    step = world.SIZE // OWNER
    rng = np.random.default_rng([5, shard])
    for i, scene in enumerate(scenes_of(split, shard)):
        instead = {}
        if split == "spoiled":
            for k, thing in enumerate(scene.things):
                if rng.random() < 0.4:
                    instead[k], kind = spoil(thing, rng)
                    fates[i, k] = 1 if kind == "two colours" else 2
        pictures[i], owner = render(scene, instead)
        owners[i] = owner[step // 2 :: step, step // 2 :: step]
    np.save(_path(split, shard, "owners"), owners)
    np.save(_path(split, shard, "fates"), fates)
    part = path.with_name(path.stem + "_part.npy")
    np.save(part, pictures)
    part.replace(path)
    print(f"drawn: {split} {shard}", flush=True)


def in_parallel(work: Callable[..., Any], arguments: Iterable[tuple]) -> list[Any]:
    """``[work(*a) for a in arguments]`` on all cores, where processes can be forked."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return list(itertools.starmap(work, arguments))
    with multiprocessing.get_context("fork").Pool() as workers:
        return workers.starmap(work, arguments, chunksize=1)


def shards(split: str) -> list[int]:
    """The shards of a split that have been drawn."""
    return sorted(int(p.stem.split("_")[1]) for p in (WORK / "pictures").glob(f"{split}_???_pictures.npy"))


def load(split: str, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """A drawn shard: pictures ``uint8 [SHARD, SIZE, SIZE, 3]``, left on disk, and owners ``uint8 [SHARD, OWNER, OWNER]``."""
    return np.load(_path(split, shard, "pictures"), mmap_mode="r"), np.load(_path(split, shard, "owners"))


def fates(split: str, shard: int) -> np.ndarray:
    """What became of each thing of a shard, ``uint8 [SHARD, 3]``: 0 whole, 1 in two colours, 2 not a thing."""
    path = _path(split, shard, "fates")
    return np.load(path) if path.exists() else np.zeros((SHARD, 3), np.uint8)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--thousands", type=int, default=24, help="training pictures to draw")
    parser.add_argument("--spoiled", type=int, default=4, help="thousands of pictures with spoiled things, for the reader")
    parser.add_argument("--tune", type=int, default=6, help="thousands of the split tune, for the reader too")
    parser.add_argument("--test", type=int, default=2, help="thousands of the split test")
    args = parser.parse_args(argv)
    counts = {"train": args.thousands, "spoiled": args.spoiled, "tune": args.tune, "test": args.test}
    in_parallel(draw, [(split, shard) for split, count in counts.items() for shard in range(count)])
    return 0
