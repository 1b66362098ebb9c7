"""Measures and trains the reader of pictures (`attune.demo.reader`), on freshly drawn scenes, spoiled ones among them."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from ...demo import world
from ...demo.reader import (
    BACKGROUNDS,
    CELL,
    CHUNK,
    COLOURS,
    NOUNS,
    PATTERNS,
    RADIUS,
    SURE,
    WEIGHTS,
    Found,
    Reader,
    load_reader,
    look,
    read,
    split_foreground,
)
from .stage import Stage

# --- worse pictures -------------------------------------------------------------------------------------------------


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of ``[B, C, H, W]`` by ``sigma [B]`` pixels each."""
    steps = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-0.5 * (steps / sigma.clamp(min=0.05)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(images.shape[1], dim=0)[:, None]
    flat = F.pad(images.flatten(0, 1)[None], (4, 4, 4, 4), mode="replicate")
    flat = F.conv2d(flat, kernel[:, :, None, :], groups=len(kernel))
    return F.conv2d(flat, kernel[:, :, :, None], groups=len(kernel))[0].view_as(images)


def compress(images: Tensor, step: Tensor) -> Tensor:
    """What JPEG does to ``[B, C, H, W]``: 8x8 cosine coefficients rounded to ``step [B]``, coarser at high frequencies."""
    k = torch.arange(8.0)
    basis = torch.cos(math.pi / 8 * k[:, None] * (k + 0.5)) * torch.where(k == 0, 0.125, 0.25).sqrt()[:, None]
    b, c, h, w = images.shape
    coefficients = torch.einsum("ua,bcyaxd,vd->bcyxuv", basis, images.reshape(b, c, h // 8, 8, w // 8, 8), basis)
    steps = step.clamp(min=1e-4).view(b, 1, 1, 1, 1, 1) * (1 + 0.5 * (k[:, None] + k))
    rounded = (coefficients / steps).round() * steps
    return torch.einsum("ua,bcyxuv,vd->bcyaxd", basis, rounded, basis).reshape(b, c, h, w)


def degrade(images: Tensor) -> Tensor:
    """The fixed bad treatment of the accuracy table: blur of 1 pixel, then coarse compression."""
    every = torch.ones(len(images))
    return compress(blur(images, every), 0.06 * every).clamp(0, 1)


def _wear(images: Tensor, rng: torch.Generator) -> Tensor:
    """Random wear of training pictures ``[B, 3, H, W]``: blur, lost detail, compression, noise, light and colour shifts."""
    b, _, h, w = images.shape

    def some(share: float, *shape: int) -> Tensor:
        """Uniform in [0, 1) for a share of the pictures, else 0: ``[B, *shape]``."""
        chosen = torch.rand((b, *(1 for _ in shape)), generator=rng) < share
        return torch.rand((b, *shape), generator=rng) * chosen

    images = blur(images, 1.8 * some(0.4))
    images = torch.where(some(0.3, 1, 1, 1) > 0, _resample(images, 0.4 + 0.5 * torch.rand((), generator=rng).item()), images)
    images = compress(images, 0.12 * some(0.4))
    blotches = F.interpolate(torch.randn((b, 3, 12, 12), generator=rng), size=(h, w), mode="bilinear")
    grain = torch.randn(images.shape, generator=rng)
    images = images + 0.08 * some(0.4, 1, 1, 1) * grain + 0.07 * some(0.4, 1, 1, 1) * blotches
    contrast = 1 + 0.15 * (some(0.5, 1, 1, 1) - some(0.5, 1, 1, 1))
    light = 0.08 * (some(0.5, 1, 1, 1) - some(0.5, 1, 1, 1)) + 0.05 * (some(0.5, 3, 1, 1) - some(0.5, 3, 1, 1))
    return ((images - 0.5) * contrast + 0.5 + light).clamp(0, 1)


def _resample(images: Tensor, scale: float) -> Tensor:
    """Shrink and enlarge again."""
    small = F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
    return F.interpolate(small, size=images.shape[2:], mode="bilinear")


def _warp(images: Tensor, centres: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Push half of the pictures ``[B, C, H, W]`` about by a few pixels, and the centres ``[B, n, 2]`` (x, y) with them."""
    b, _, h, w = images.shape
    strength = 2.2 * torch.rand((b, 1, 1, 1), generator=rng) * (torch.rand((b, 1, 1, 1), generator=rng) < 0.5)
    coarse = torch.randn((b, 2, 5, 5), generator=rng) + torch.randn((b, 2, 1, 1), generator=rng)
    push = F.interpolate(coarse * strength, size=(h, w), mode="bicubic")
    scale = torch.tensor([2 / w, 2 / h])
    columns, rows = torch.meshgrid(torch.arange(w) + 0.5, torch.arange(h) + 0.5, indexing="xy")
    places = torch.stack((columns, rows), dim=-1) + push.permute(0, 2, 3, 1)
    moved = F.grid_sample(images, places * scale - 1, padding_mode="border", align_corners=False)
    new = centres
    for _ in range(3):  # the new place p of a centre c solves p + push(p) = c
        pushed = F.grid_sample(push, (new * scale - 1)[:, None], padding_mode="border", align_corners=False)
        new = centres - pushed[:, :, 0].transpose(1, 2)
    return moved, new


# --- training pictures ----------------------------------------------------------------------------------------------


def _distance(thing: world.Thing, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance, in pixels, to a thing at pixel places ``x``, ``y``."""
    return world.signed_distance(thing.noun, x - thing.x, y - thing.y, thing.radius)


def _pixels(thing: world.Thing) -> Tensor:
    """The pixels of a clean thing: ``bool [SIZE, SIZE]``."""
    return torch.from_numpy(_distance(thing, *np.meshgrid(world.GRID, world.GRID)) < 0)


def _spoil(thing: world.Thing, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance, in pixels, to something that was a thing: half of it, a mixture, a blob or two run together."""
    clean = _distance(thing, x, y)
    other = replace(thing, noun=str(rng.choice([n for n in world.NOUNS if n != thing.noun])))
    kind = rng.choice(("mixture", "half", "blob", "pair"))
    if kind == "mixture":
        share = rng.uniform(0.35, 0.65)
        return (1 - share) * clean + share * _distance(other, x, y)
    if kind == "half":
        for _ in range(20):
            angle, off = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3) * thing.radius
            cut = np.maximum(clean, (x - thing.x) * np.cos(angle) + (y - thing.y) * np.sin(angle) - off)
            if 0.3 < (cut < 0).sum() / (clean < 0).sum() < 0.7:
                break
        return cut
    if kind == "blob":
        turn = np.arctan2(y - thing.y, x - thing.x)
        waves = [rng.uniform(0.05, 0.18) * np.cos(k * turn + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3, 4, 5)]
        softness = np.exp(rng.uniform(0, 2))
        return (np.hypot(x - thing.x, y - thing.y) - thing.radius * (0.75 + sum(waves))) / softness
    towards = np.arctan2(world.SIZE / 2 - thing.y, world.SIZE / 2 - thing.x) + rng.uniform(-0.8, 0.8)
    step = rng.uniform(0.5, 1.0) * thing.radius
    beside = replace(other, x=thing.x + step * np.cos(towards), y=thing.y + step * np.sin(towards))
    return np.minimum(clean, _distance(beside, x, y))


def draw_training_picture(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, world.Scene, list[Found]]:
    """A scene of the splits ``train`` and ``tune`` with some things left out, spoiled or in two surfaces.

    Gives the picture ``float32 [SIZE, SIZE, 3]`` in [0, 1], what things cover of it ``[SIZE, SIZE]``, the scene whose
    background it has, and the things as they should be read (confidence 0 for spoiled ones).
    """
    while (scene := world.sample_scene(rng)).split == "test":
        pass
    picture = world.render(replace(scene, things=())).astype(np.float32)
    covered, truth = np.zeros((world.SIZE, world.SIZE), np.float32), []
    for thing in scene.things:
        if rng.random() < 0.05:
            continue
        x0, y0 = (max(int(v - 2 * thing.radius), 0) for v in (thing.x, thing.y))
        x1, y1 = (min(int(v + 2 * thing.radius) + 1, world.SIZE) for v in (thing.x, thing.y))
        x, y = np.meshgrid(world.GRID[x0:x1], world.GRID[y0:y1])
        read_as = Found(thing.noun, thing.colour, thing.pattern, thing.x, thing.y, thing.radius, 1.0)
        fate = rng.random()
        distance = _spoil(thing, rng, x, y) if fate < 0.2 else _distance(thing, x, y)
        if 0.2 <= fate < 0.3:  # still what it was, with a touch of something else
            share = rng.uniform(0, 0.15)
            distance = (1 - share) * distance + share * _distance(replace(thing, noun=str(rng.choice(world.NOUNS))), x, y)
        alpha = np.clip(0.5 - distance, 0, 1)
        if fate < 0.2:
            u, w = (float((alpha * axis).sum() / max(alpha.sum(), 1)) for axis in (x, y))
            read_as = Found("none", thing.colour, thing.pattern, u, w, thing.radius, 0.0)
        surface = world.surface(thing.colour, world.COLOURS[thing.colour], thing.pattern, x, y)
        if rng.random() < 0.08:  # two surfaces side by side
            colour = thing.colour if rng.random() < 0.4 else str(rng.choice(list(world.COLOURS)))
            pattern = thing.pattern if rng.random() < 0.4 else str(rng.choice(world.PATTERNS))
            angle = rng.uniform(0, 2 * np.pi)
            side = ((x - thing.x) * np.cos(angle) + (y - thing.y) * np.sin(angle) > 0)[..., None]
            surface = np.where(side, world.surface(colour, world.COLOURS[colour], pattern, x, y), surface)
            if colour != thing.colour:
                read_as = replace(read_as, colour="unclear")
            if pattern != thing.pattern:
                read_as = replace(read_as, pattern="unclear")
        box = picture[y0:y1, x0:x1]
        box[:] = box * (1 - alpha[..., None]) + (surface + scene.tint).clip(0, 255) * alpha[..., None]
        covered[y0:y1, x0:x1] = np.maximum(covered[y0:y1, x0:x1], alpha)
        truth.append(read_as)
    return picture / 255, covered, scene, truth


def _loss(reader: Reader, count: int, seed: int) -> tuple[Tensor, dict[str, float]]:
    """The loss on ``count`` fresh pictures, and its parts."""
    images, covered, things, backgrounds = training_batch(count, seed)
    with torch.autocast("cpu", torch.bfloat16):
        maps = reader(images.contiguous(memory_format=torch.channels_last))
    real, x, y, radius, *words = things.unbind(dim=2)  # each [B, 3]
    h, w = maps.heat.shape[1:]
    columns, rows = torch.arange(w) + 0.5, torch.arange(h) + 0.5
    dx = x[:, :, None, None] / CELL - columns[None, None, None, :]  # [B, 3, 1, w], in cells
    dy = y[:, :, None, None] / CELL - rows[None, None, :, None]
    far = (real[:, :, None, None] == 0) * 1e6
    square = dx**2 + dy**2 + far  # [B, 3, h, w]
    heat = torch.exp(-square / (2 * (0.3 * radius[:, :, None, None].clamp(min=8) / CELL) ** 2)).amax(dim=1)
    nearest = square.min(dim=1)
    owner, mine = nearest.indices, nearest.values < 1.5**2
    centre = nearest.values < 0.5

    chance = torch.sigmoid(maps.heat)
    hit = (1 - chance) ** 2 * F.logsigmoid(maps.heat) * centre
    miss = (1 - heat) ** 4 * chance**2 * F.logsigmoid(-maps.heat) * ~centre
    parts = {"heat": -(hit + miss).sum() / centre.sum()}
    cells = mine.nonzero(as_tuple=True)
    index = (cells[0], owner[cells])
    for name, scores, word in zip(("noun", "colour", "pattern"), (maps.noun, maps.colour, maps.pattern), words, strict=True):
        parts[name] = F.cross_entropy(scores.permute(0, 2, 3, 1)[cells], word[index].long())
    empty = (heat < 0.05).nonzero(as_tuple=True)
    parts["empty"] = 0.1 * F.cross_entropy(maps.noun.permute(0, 2, 3, 1)[empty], torch.full_like(empty[0], NOUNS.index("none")))
    place = torch.stack((x[index] / CELL - columns[cells[2]], y[index] / CELL - rows[cells[1]]), dim=1)
    parts["place"] = F.l1_loss(maps.offset.permute(0, 2, 3, 1)[cells], place)
    parts["size"] = F.l1_loss(maps.size[cells], (radius[index] / RADIUS).log())
    parts["cover"] = 2 * F.binary_cross_entropy_with_logits(maps.foreground, covered)
    parts["ground"] = F.cross_entropy(maps.background, backgrounds[:, 0])
    parts["surface"] = F.cross_entropy(maps.background_pattern, backgrounds[:, 1])
    return torch.stack(list(parts.values())).sum(), {name: part.item() for name, part in parts.items()}


def training_batch(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Worn pictures ``[B, 3, S, S]``, what things cover of them ``[B, S, S]``, things and backgrounds.

    Things are ``[B, 3, 7]``: is real, x, y, radius, noun, colour, pattern; backgrounds ``int [B, 2]``: colour, pattern.
    """
    rng, generator = np.random.default_rng([7, seed]), torch.Generator().manual_seed(seed)
    pictures, ignores_output, backgrounds, things = [], [], [], torch.zeros(count, 3, 7)
    for i in range(count):
        picture, covered, scene, truth = draw_training_picture(rng)
        pictures.append(picture)
        ignores_output.append(covered[..., None])
        backgrounds.append((BACKGROUNDS.index(scene.background), world.PATTERNS.index(scene.background_pattern)))
        for j, t in enumerate(truth):
            words = NOUNS.index(t.noun), COLOURS.index(t.colour), PATTERNS.index(t.pattern)
            things[i, j] = torch.tensor((1.0, t.x, t.y, t.radius, *words))
    both = torch.from_numpy(np.concatenate((np.stack(pictures), np.stack(ignores_output)), axis=-1)).permute(0, 3, 1, 2)
    both, centres = _warp(both.contiguous(), things[:, :, 1:3], generator)
    things[:, :, 1:3] = centres
    return _wear(both[:, :3], generator), both[:, 3], things, torch.tensor(backgrounds)


def train(minutes: float, batch: int = 32) -> Reader:
    """Train for that long in all, going on from the last checkpoint; gives the average of the weights over the last steps."""
    torch.manual_seed(0)
    reader = Reader().to(memory_format=torch.channels_last)
    stage = Stage("reader", {"reader": reader}, minutes, 4e-3)
    stage.run(lambda step: _loss(reader, batch, step), batch)
    averaged: Any = stage.average["reader"]
    torch.optim.swa_utils.update_bn((training_batch(batch, 1_000_000 + i)[0] for i in range(60)), averaged)
    return averaged.eval()


# --- measuring ------------------------------------------------------------------------------------------------------

SHARES = ("recall", "precision", "noun", "colour", "pattern", "background colour", "background pattern")


def measure(reader: Reader, scenes: Sequence[world.Scene], worse: bool = False) -> dict[str, float]:
    """Accuracies, shares in [0, 1] but for ``centre error`` (pixels). A thing is found within half its radius."""
    tally: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(scenes), CHUNK):
        part = scenes[start : start + CHUNK]
        images = torch.from_numpy(np.stack([world.render(s) for s in part])).permute(0, 3, 1, 2).float() / 255
        seen = look(reader, degrade(images) if worse else images)
        for scene, (reading, foreground) in zip(part, seen, strict=True):
            masks = split_foreground(reading, foreground)
            sure = [i for i, t in enumerate(reading.things) if t.confidence >= SURE]
            for thing in scene.things:
                gaps = {i: math.hypot(reading.things[i].x - thing.x, reading.things[i].y - thing.y) for i in sure}
                best = min(gaps, key=gaps.__getitem__, default=-1)
                tally["recall"].append(best >= 0 and gaps[best] < thing.radius / 2)
                if not tally["recall"][-1]:
                    continue
                sure.remove(best)
                tally["precision"].append(True)
                for word in ("noun", "colour", "pattern"):
                    tally[word].append(getattr(reading.things[best], word) == getattr(thing, word))
                tally["centre error"].append(gaps[best])
                mask, true = masks[best], _pixels(thing)
                tally["region IoU"].append(((mask & true).sum() / (mask | true).sum()).item())
            tally["precision"] += [False] * len(sure)
            tally["background colour"].append(reading.background == scene.background)
            tally["background pattern"].append(reading.background_pattern == scene.background_pattern)
    return {name: float(np.mean(values)) for name, values in tally.items()}


def spoiled_named(reader: Reader, count: int, seed: int = 5) -> float:
    """The share of spoiled things that the reader takes for a shape: lower is better."""
    rng = np.random.default_rng([11, seed])
    named: list[bool] = []
    while len(named) < count:
        picture, _, _, truth = draw_training_picture(rng)
        (reading,) = read(reader, torch.from_numpy(picture)[None])
        for spoiled in (t for t in truth if t.noun == "none"):
            near = [f for f in reading.things if math.hypot(f.x - spoiled.x, f.y - spoiled.y) < spoiled.radius / 2]
            named.append(any(f.confidence >= SURE for f in near))
    return float(np.mean(named))


def report(reader: Reader, count: int) -> tuple[str, dict[str, dict[str, float]]]:
    """The accuracy table on ``count`` held-out scenes, as text and as numbers."""
    held_out = list(itertools.islice(world.scenes("test", 0), count))
    unseen = [s for s in held_out if any((t.colour, t.noun) in world.HELD_OUT_PAIRS for t in s.things)]
    columns = {
        "clean": measure(reader, held_out),
        "unseen pairs": measure(reader, unseen),
        "degraded": measure(reader, held_out, worse=True),
    }
    lines = [f"{count} held-out scenes, {len(unseen)} with a colour-noun pair that the bundled model never saw"]
    lines.append(f"{'':20}" + "".join(f"{name:>14}" for name in columns))
    for row in (*SHARES, "region IoU", "centre error"):
        cells = (f"{c[row]:.2f} px" if row == "centre error" else f"{100 * c[row]:.2f} %" for c in columns.values())
        lines.append(f"{row:20}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines), columns


def main(argv: list[str]) -> int:
    """Print the accuracy table; with ``--train``, train first."""
    parser = argparse.ArgumentParser(prog="run.py reader", description=__doc__)
    parser.add_argument("--train", action="store_true", help="train it (goes on from a checkpoint) and save the weights")
    parser.add_argument("--minutes", type=float, default=12, help="training time in all")
    parser.add_argument("--scenes", type=int, default=2000, help="held-out scenes to measure on")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    args = parser.parse_args(argv)
    reader = train(args.minutes).half().float() if args.train else load_reader(args.weights)  # rounded as it is kept
    table, metrics = report(reader, args.scenes)
    print(table)
    print(f"spoiled shapes taken for a shape: {100 * spoiled_named(reader, args.scenes // 4):.1f} %")
    if args.train:
        state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in reader.state_dict().items()}
        command = f"run.py reader --train --minutes {args.minutes:g}"
        metadata = {"data_version": world.DATA_VERSION, "command": command, "metrics": json.dumps(metrics)}
        args.weights.parent.mkdir(parents=True, exist_ok=True)
        args.weights.write_bytes(save(state, metadata))
    return 1 if min(metrics["clean"][row] for row in SHARES) < 0.98 else 0
