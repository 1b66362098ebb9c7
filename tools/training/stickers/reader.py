"""The reader's training on drawn and on spoiled pictures, and its accuracy on held-out ones."""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ....demo.stickers import reader as reading
from ....demo.stickers import world
from ....demo.stickers.reader import CELL, SURE, WIDTH, Maps, Reader
from ..stage import DEVICE, Stage, mixed
from . import dataset

IGNORED = -100
STYLE_WEIGHTS = torch.tensor([0.2, *(1.0 for _ in world.STYLES)])  # three things in four have no style of their own
SHARES = ("recall", "precision", "noun", "colour", "accessory", "style", "place", "place's style")


def labels(scenes: list[world.Scene], fates: np.ndarray) -> tuple[Tensor, Tensor]:
    """Things ``float [N, 3, 8]``: is real, x, y, width, noun, colour, accessory, style; and places ``int [N, 2]``."""
    things, places = torch.zeros(len(scenes), 3, 8), torch.full((len(scenes), 2), IGNORED)
    for i, scene in enumerate(scenes):
        places[i, 0] = reading.PLACES.index(scene.place)
        if scene.place in world.SCENES:
            places[i, 1] = reading.STYLES.index(scene.style)
        for k, t in enumerate(scene.things):
            spoiled, mixed = fates[i, k] == 2, fates[i, k] == 1
            colour = reading.COLOURS.index("unclear" if mixed else t.colour) if t.colour else IGNORED
            if t.style in world.COLOURLESS:
                colour = IGNORED
            details = colour, reading.ACCESSORIES.index(t.accessory), reading.STYLES.index(t.style)
            noun = reading.NOUNS.index("none" if spoiled else t.noun)
            numbers = 1.0, t.x, t.y, t.width, noun, *((IGNORED, IGNORED, details[2]) if spoiled else details)
            things[i, k] = torch.tensor(numbers)
    return things, places


def wear(images: Tensor, rng: torch.Generator) -> Tensor:
    """Random wear of ``[B, 3, H, W]`` in [0, 1]: lost detail, blur, noise, light, contrast and colour shifts."""
    b, _, h, w = images.shape

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng).to(images)

    def some(share: float, *shape: int) -> Tensor:
        """Uniform in [-1, 1) for a share of the pictures, else 0: ``[B, *shape]``."""
        chosen = random(b, *(1 for _ in shape)) < share
        return (2 * random(b, *shape) - 1) * chosen

    if torch.rand((), generator=rng) < 0.5:
        scale = 0.55 + 0.4 * torch.rand((), generator=rng).item()
        small = F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
        soft = F.interpolate(small, size=(h, w), mode="bilinear")
        images = torch.where(random(b, 1, 1, 1) < 0.5, soft, images)
    blotches = F.interpolate(torch.randn((b, 3, 24, 24), generator=rng).to(images), size=(h, w), mode="bilinear")
    images = images + 0.06 * (some(0.4, 1, 1, 1) * torch.randn_like(images) + some(0.4, 1, 1, 1) * blotches)
    light = 0.06 * some(0.5, 1, 1, 1) + 0.04 * some(0.5, 3, 1, 1)
    return ((images - 0.5) * (1 + 0.12 * some(0.5, 1, 1, 1)) + 0.5 + light).clamp(0, 1)


def _loss(maps: Maps, things: Tensor, places: Tensor, owners: Tensor) -> dict[str, Tensor]:
    """Every part of the loss of ``B`` pictures; ``owners`` is ``int64 [B, 64, 64]``, each quarter's thing from 1 on."""
    real, x, y, width, *words = things.unbind(dim=2)  # each [B, 3]
    h, w = maps.heat.shape[1:]
    columns, rows = (torch.arange(n, device=things.device) + 0.5 for n in (w, h))
    dx = x[:, :, None, None] / CELL - columns[None, None, None, :]
    dy = y[:, :, None, None] / CELL - rows[None, None, :, None]
    far = (real[:, :, None, None] == 0) * 1e6
    square = dx**2 + dy**2 + far  # [B, 3, h, w]
    heat = torch.exp(-square / (2 * (0.12 * width[:, :, None, None].clamp(min=40) / CELL) ** 2)).amax(dim=1)
    nearest = square.min(dim=1)
    owner, mine = nearest.indices, nearest.values < 1.8**2
    centre = nearest.values < 0.5
    chance = torch.sigmoid(maps.heat)
    hit = (1 - chance) ** 2 * F.logsigmoid(maps.heat) * centre
    miss = (1 - heat) ** 4 * chance**2 * F.logsigmoid(-maps.heat) * ~centre
    parts = {"heat": -(hit + miss).sum() / centre.sum()}
    cells = mine.nonzero(as_tuple=True)
    index = (cells[0], owner[cells])
    scores = maps.noun, maps.colour, maps.accessory
    for name, score, word in zip(("noun", "colour", "accessory"), scores, words[:3], strict=True):
        truth = word[index].long()
        if (truth != IGNORED).any():
            parts[name] = F.cross_entropy(score.permute(0, 2, 3, 1)[cells], truth, ignore_index=IGNORED)
    whole = owners[:, ::2, ::2]  # style is named by every cell of a thing
    inside = (whole > 0) & (whole == owners[:, 1::2, 1::2]) & (whole == owners[:, ::2, 1::2]) & (whole == owners[:, 1::2, ::2])
    at = inside.nonzero(as_tuple=True)
    truth = words[3][at[0], whole[at] - 1].long()
    parts["style"] = F.cross_entropy(maps.style.permute(0, 2, 3, 1)[at], truth, weight=STYLE_WEIGHTS.to(truth.device))
    empty = (heat < 0.02).nonzero(as_tuple=True)
    none = torch.full_like(empty[0], reading.NOUNS.index("none"))
    parts["empty"] = 0.1 * F.cross_entropy(maps.noun.permute(0, 2, 3, 1)[empty], none)
    place = torch.stack((x[index] / CELL - columns[cells[2]], y[index] / CELL - rows[cells[1]]), dim=1)
    parts["offset"] = F.l1_loss(maps.offset.permute(0, 2, 3, 1)[cells], place)
    parts["size"] = F.l1_loss(maps.size[cells], (width[index] / WIDTH).log())
    parts["cover"] = 2 * F.binary_cross_entropy_with_logits(maps.cover, (owners > 0).float())
    parts["place"] = F.cross_entropy(maps.place, places[:, 0])
    if (places[:, 1] != IGNORED).any():
        parts["place's style"] = F.cross_entropy(maps.place_style, places[:, 1], ignore_index=IGNORED)
    return parts


def as_tensor(pictures: np.ndarray, device: torch.device | None = None) -> Tensor:
    """``uint8 [B, H, W, 3]`` to ``float [B, 3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.array(pictures, order="C")).to(device).permute(0, 3, 1, 2).float() / 255


class Pool:
    """Drawn pictures of both kinds with their labels, and random batches of them, mirrored half of the time."""

    def __init__(self) -> None:
        self.shards = []
        for split in ("train", "spoiled", "tune"):  # it has to read pairs of a noun and a detail that the model never sees
            for shard in dataset.shards(split):
                truth = labels(dataset.scenes_of(split, shard), dataset.fates(split, shard))
                self.shards.append((*dataset.load(split, shard), *truth))

    def batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures, things, places, and each quarter's thing, on `DEVICE`."""
        pictures = np.empty((count, world.SIZE, world.SIZE, 3), np.uint8)
        owners = np.empty((count, dataset.OWNER, dataset.OWNER), np.uint8)
        things, places = [], []
        for i in range(count):
            shard = self.shards[rng.integers(len(self.shards))]
            k = int(rng.integers(len(shard[0])))
            pictures[i], owners[i] = shard[0][k], shard[1][k]
            things.append(shard[2][k])
            places.append(shard[3][k])
        drawn, of_things = as_tensor(pictures, DEVICE), torch.stack(things).to(DEVICE)
        of_cells = torch.from_numpy(owners).to(DEVICE).long()
        mirrored = torch.from_numpy(rng.random(count) < 0.5).to(DEVICE)[:, None, None]
        of_things[..., 1] = torch.where(mirrored[..., 0], world.SIZE - of_things[..., 1], of_things[..., 1])
        drawn = torch.where(mirrored[..., None], drawn.flip(3), drawn)
        return drawn, of_things, torch.stack(places).to(DEVICE), torch.where(mirrored, of_cells.flip(2), of_cells)


def train(minutes: float, batch: int) -> Reader:
    """Train for that long in all, going on from the last checkpoint; gives the average of the weights over the last steps."""
    torch.manual_seed(0)
    net, pool = Reader().to(memory_format=torch.channels_last), Pool()
    stage = Stage("stickers_reader", {"reader": net}, minutes, 3e-3, device=DEVICE)
    rng, generator = np.random.default_rng([3, stage.step]), torch.Generator().manual_seed(stage.step)
    compiled = torch.compile(net, dynamic=False)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, things, places, owners = pool.batch(rng, batch)
        with mixed():
            maps = compiled(wear(images, generator).contiguous(memory_format=torch.channels_last))
        parts = _loss(maps, things, places, owners)
        return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}

    stage.run(loss, batch)
    torch.optim.swa_utils.update_bn((wear(pool.batch(rng, 32)[0], generator) for _ in range(30)), stage.average["reader"])
    averaged: Reader = stage.kept("reader")  # type: ignore[assignment]
    return averaged


def measure(net: Reader, split: str, count: int, images: Tensor | None = None) -> dict[str, float]:
    """Accuracies on a split's drawn pictures (or on ``images`` in their place); a thing is found within half its width."""
    tally: dict[str, list[float]] = defaultdict(list)
    for shard in dataset.shards(split)[: -(-count // dataset.SHARD)]:
        pictures, owners = dataset.load(split, shard)
        for start in range(0, min(count, dataset.SHARD), 50):
            part = slice(start, start + 50)
            shown = as_tensor(pictures[part]) if images is None else images[part]
            for i, (scene, (found, cover)) in enumerate(
                zip(dataset.scenes_of(split, shard)[part], reading._look(net, shown), strict=True)
            ):
                sure = [t for t in found.things if t.confidence >= SURE]
                masks = dict(zip(found.things, reading._split_cover(found, cover), strict=True))
                for k, thing in enumerate(scene.things, 1):
                    near = min(sure, key=lambda t: math.hypot(t.x - thing.x, t.y - thing.y), default=None)
                    if near is None or math.hypot(near.x - thing.x, near.y - thing.y) > thing.width / 2:
                        tally["recall"].append(0.0)
                        continue
                    sure.remove(near)
                    tally["recall"].append(1.0)
                    tally["precision"].append(1.0)
                    for word in ("noun", "accessory", "style"):
                        tally[word].append(getattr(near, word) == getattr(thing, word))
                    if thing.colour and thing.style not in world.COLOURLESS:
                        tally["colour"].append(near.colour == thing.colour)
                    true, mask = owners[part][i] == k, masks[near].numpy()[2::4, 2::4]
                    tally["region IoU"].append(float((true & mask).sum() / max((true | mask).sum(), 1)))
                tally["precision"] += [0.0] * len(sure)
                tally["place"].append(found.place == scene.place)
                if scene.place in world.SCENES:
                    tally["place's style"].append(found.style == scene.style)
    return {name: float(np.mean(values)) for name, values in tally.items()}


def spoiled_named(net: Reader, count: int = 500) -> float:
    """The share of spoiled things that the reader takes for one of the world's things: lower is better."""
    shard = dataset.shards("spoiled")[-1]
    pictures, fates = dataset.load("spoiled", shard)[0], dataset.fates("spoiled", shard)
    named = []
    for start in range(0, count, 50):
        found = reading.read(net, as_tensor(pictures[start : start + 50]))
        for scene, fate, seen in zip(dataset.scenes_of("spoiled", shard)[start:], fates[start:], found, strict=False):
            for t in (t for t, f in zip(scene.things, fate, strict=False) if f == 2):
                near = [f for f in seen.things if math.hypot(f.x - t.x, f.y - t.y) < t.width / 3]
                named.append(any(f.confidence >= SURE for f in near))
    return float(np.mean(named))


def table(net: Reader, count: int) -> tuple[str, dict[str, float]]:
    """Accuracies on held-out pictures, as text and as numbers."""
    metrics = measure(net, "test", count)
    lines = [f"{count} held-out pictures", *(f"{row:15}{100 * metrics[row]:8.2f} %" for row in (*SHARES, "region IoU"))]
    return "\n".join(lines), metrics


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=45, help="training time in all; 0 only measures the shipped reader")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=2000, help="held-out pictures to measure on")
    parser.add_argument("--weights", type=Path, default=reading.WEIGHTS)
    args = parser.parse_args(argv)
    net = train(args.minutes, args.batch).half().float() if args.minutes else reading.load_reader(args.weights)
    text, metrics = table(net, args.pictures)
    print(text)
    print(f"spoiled things taken for things: {100 * spoiled_named(net):.1f} %", flush=True)
    if args.minutes:
        state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in net.state_dict().items()}
        command = f"run.py train stickers reader --minutes {args.minutes:g} --batch {args.batch}"
        metadata = {"data_version": world.DATA_VERSION, "command": command, "metrics": json.dumps(metrics)}
        args.weights.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, args.weights, metadata=metadata)
        print(f"saved {args.weights}: {args.weights.stat().st_size / 1e6:.1f} MB")
    return 1 if min(metrics[row] for row in SHARES) < 0.97 else 0
