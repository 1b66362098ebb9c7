"""A page of pictures with their captions, to look at."""

from __future__ import annotations

import itertools
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ....demo.stickers import world
from .renderer import render


def contact_sheet(path: Path, number: int = 64, seed: int = 7, columns: int = 8) -> None:
    """Write ``number`` training pictures with their captions."""
    rng = np.random.default_rng(seed)
    side, text = world.SIZE, 44
    page = Image.new("RGB", (columns * (side + 6), -(-number // columns) * (side + text)), "white")
    pen = ImageDraw.Draw(page)
    for i, scene in enumerate(itertools.islice(world.scenes("train", seed), number)):
        x, y = i % columns * (side + 6), i // columns * (side + text)
        page.paste(Image.fromarray(render(scene)[0]), (x, y))
        pen.text((x + 2, y + side + 2), textwrap.fill(world.describe(scene, rng).text, 44), fill="black")
    page.save(path)


if __name__ == "__main__":
    contact_sheet(Path(sys.argv[1]))
