"""A page of pictures with their captions, to look at: drawn by the renderer, by the autoencoder from it, or by the model."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ....demo.stickers import world


def page(path: Path, pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8) -> None:
    """Write pictures ``uint8 [SIZE, SIZE, 3]`` with a caption under each."""
    side, text = world.SIZE, 44
    sheet = Image.new("RGB", (columns * (side + 6), -(-len(pictures) // columns) * (side + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * (side + 6), i // columns * (side + text)
        sheet.paste(Image.fromarray(picture), (x, y))
        pen.text((x + 2, y + side + 2), textwrap.fill(caption, 44), fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"saved {path}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--by", choices=("renderer", "autoencoder", "model"), default="renderer")
    parser.add_argument("--number", type=int, default=64)
    parser.add_argument("--split", choices=world.SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(argv)
    if args.by == "model":
        from ....demo.stickers import model
        from ...benchmarks.shared.pictures import generate

        captions = [c.text for c in world.prompts(args.split, args.number, seed=args.seed)]
        drawn = generate(*model.load(), captions, cfg=5.0, seed=args.seed, side=world.SIZE)
        page(args.path, [(255 * p.numpy()).round().astype(np.uint8) for p in drawn], captions)
        return 0
    from .renderer import render

    scenes = list(itertools.islice(world.scenes(args.split, args.seed), args.number))
    pictures = [render(scene)[0] for scene in scenes]
    if args.by == "autoencoder":
        from .autoencoder import reconstructed, shipped

        pictures = list(reconstructed(shipped(), np.stack(pictures)))
    rng = np.random.default_rng(args.seed)
    page(args.path, pictures, [world.describe(scene, rng).text for scene in scenes])
    return 0
