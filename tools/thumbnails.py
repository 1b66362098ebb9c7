"""Draws the templates' thumbnails: plain on the left, changed on the right, by the bundled model (``run.py thumbnails``).

A template for a checkpoint has the pictures of the one that shows the same on the bundled model, and says so.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .runtime.client import Client
from .runtime.server import Server
from .runtime.setup import ROOT, Runtime, comfyui_folder
from .runtime.workflow import read, to_prompt

FOLDER = ROOT / "example_workflows"
SIDE, EDGE, LINE = 400, 8, 30  # of a thumbnail, between pictures, height of a line of text, in pixels
INK, PAPER = (240, 240, 240), (32, 34, 38)
PLAIN = "Plain"


@dataclass(frozen=True)
class Card:
    """A thumbnail: the number of its template, which template draws it, the title of the node that saves what is on the right, and
    which pictures of the batch are shown."""

    template: str
    source: str
    changed: str
    shown: tuple[int, int] = (0, 1)


CARDS = (
    Card("01", "01", "Fixed", (1, 0)),
    Card("02", "02", "SoftPAG"),
    Card("03", "03", "Attention Regulation", (0, 2)),
    Card("04", "04", "The heart in its place"),
    Card("05", "05", "Detail++"),
    Card("06", "06", "Detail++"),
    Card("07", "07", "Where each word is"),
    Card("08", "08", "With the negative"),
    Card("09", "09", "Three methods", (0, 2)),
    Card("10", "10", "With the tools"),
    Card("12", "03", "Attention Regulation", (0, 2)),
    Card("13", "02", "SoftPAG"),
    Card("14", "05", "Detail++"),
    Card("15", "02", "SoftPAG"),
    Card("16", "02", "SoftPAG"),
    Card("17", "04", "Without the heart"),
    Card("18", "04", "Without the heart"),
    Card("19", "04", "The heart in its place"),
    Card("20", "04", "The heart in its place"),
    Card("21", "08", "With the negative"),
    Card("22", "04", "Without the heart"),
)


def template(number: str) -> Path:
    """The file of a template."""
    (path,) = FOLDER.glob(f"{number} *.json")
    return path


async def pictures(server: Server, numbers: list[str]) -> dict[str, dict[str, list[Image.Image]]]:
    """What each template's nodes save, by their titles."""
    found = {}
    async with Client(server) as client:
        info = await client.info()
        for number in numbers:
            prompt = to_prompt(read(template(number)), info)
            kept = await client.run(prompt, lambda *_: None)
            found[number] = {
                prompt[node]["_meta"]["title"]: [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
                for node, files in kept.items()
            }
            print(template(number).stem, flush=True)
    return found


def chosen_of(batch: list[Image.Image], card: Card) -> list[Image.Image]:
    """The pictures of a batch that a card shows."""
    return [batch[i] for i in card.shown if i < len(batch)]


def thumbnail(left: list[Image.Image], right: list[Image.Image], title: str, below: str) -> Image.Image:
    """Two columns with titles, a row for each picture of the left one that has room, and a line below."""
    out = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(16)
    wide = (SIDE - 3 * EDGE) // 2
    room = SIDE - LINE * (2 if below else 1)
    rows = max(1, min(len(left), len(right), round(room / wide)))
    high = min(wide, (room - EDGE * rows) // rows)
    for column, (name, shown) in enumerate(((PLAIN, left), (title, right))):
        x = EDGE + column * (wide + EDGE)
        draw.text((x + wide / 2, LINE / 2), name, INK, font, anchor="mm")
        for row, picture in enumerate(shown[:rows]):
            scale = min(wide / picture.width, high / picture.height)
            small = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
            top = LINE + (room - rows * (high + EDGE) + EDGE) // 2 + row * (high + EDGE) + (high - small.height) // 2
            out.paste(small, (x + (wide - small.width) // 2, top))
    draw.text((SIDE / 2, SIDE - LINE / 2), below, INK, ImageFont.load_default(13), anchor="mm")
    return out


def main(argv: list[str]) -> int:
    """Draw all thumbnails, or those of the templates with the numbers given."""
    parser = argparse.ArgumentParser(prog="run.py thumbnails", description=__doc__)
    parser.add_argument("numbers", nargs="*", help="of templates, such as 01 (default: all)")
    chosen = [card for card in CARDS if card.template in (parser.parse_args(argv).numbers or [c.template for c in CARDS])]
    with Server(Runtime(Path(sys.executable), comfyui_folder()), cpu=True) as server:
        found = asyncio.run(pictures(server, sorted({card.source for card in chosen})))
    for card in chosen:
        shown = found[card.source]
        below = "" if card.source == card.template else "Drawn by the small bundled model, not by this checkpoint"
        path = template(card.template).with_suffix(".jpg")
        thumbnail(chosen_of(shown[PLAIN], card), chosen_of(shown[card.changed], card), card.changed, below).save(
            path, quality=88, optimize=True
        )
    return 0
