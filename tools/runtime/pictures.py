"""Puts pictures side by side, with captions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = "white", "black", "#555555"
GAP, MARGIN = 4, 24
SMALLEST = 256  # pixels: smaller pictures are enlarged by a whole number

Cell = Sequence[Image.Image]


def grid(rows: Sequence[tuple[str, Sequence[Cell]]], columns: list[str]) -> Image.Image:
    """One row for each caption, with one cell for each column; a cell holds one or more pictures, arranged in a square."""
    first = next(picture for _, cells in rows for cell in cells for picture in cell)
    factor = max(1, round(SMALLEST / max(first.size)))
    width, height = first.width * factor, first.height * factor
    most = max(len(cell) for _, cells in rows for cell in cells)
    across = math.ceil(math.sqrt(most))
    down = math.ceil(most / across)
    cell_width = across * (width + GAP) - GAP
    cell_height = down * (height + GAP) - GAP

    title_font, caption_font = ImageFont.load_default(26), ImageFont.load_default(20)
    header, caption = 44, 34
    page = Image.new(
        "RGB",
        (
            MARGIN + len(columns) * (cell_width + MARGIN),
            MARGIN + header + len(rows) * (caption + cell_height + MARGIN),
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(columns):
        draw.text((MARGIN + column * (cell_width + MARGIN), MARGIN), _fit(title, title_font, cell_width), INK, title_font)
    for row, (text, cells) in enumerate(rows):
        top = MARGIN + header + row * (caption + cell_height + MARGIN)
        draw.text((MARGIN, top), _fit(text, caption_font, page.width - 2 * MARGIN), FAINT, caption_font)
        for column, cell in enumerate(cells):
            left = MARGIN + column * (cell_width + MARGIN)
            for index, picture in enumerate(cell):
                place = (left + index % across * (width + GAP), top + caption + index // across * (height + GAP))
                page.paste(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), place)
    return page


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, cut short with an ellipsis if it is wider than that."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
