"""The curve of Word Weights as a picture, drawn from the benchmark's results by ``run.py measurements``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.sax.saxutils import escape

from .benchmarks.shared.records import load
from .runtime.setup import ROOT

PICTURE = ROOT / "web" / "docs" / "pictures" / "weights.svg"
WIDTH, HEIGHT, LEFT, TOP, SIDE, GAP = 860, 330, 56, 44, 350, 60  # of the picture, and of its two panels
BOTTOM = HEIGHT - 52
COLOURS = {"attention": "#2563b8", "value": "#c2410c"}
SHARE = re.compile(r"([\d.]+) % \((\d+)-(\d+)\)")


def _text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle", colour: str = "#1e1e1e") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def _panel(left: float, what: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Shares with their 95 % intervals over the weight, and how often the other things are there."""
    weights = sorted({float(row[1]) for row in rows})

    def across(weight: float) -> float:
        return left + SIDE * (weight - weights[0]) / (weights[-1] - weights[0])

    def down(share: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * share / 100

    out = [_text(left + SIDE / 2, TOP - 18, f"weight of a {what}", 15)]
    for share in (0, 25, 50, 75, 100):
        out.append(f'<path d="M{left} {down(share):.1f}h{SIDE}" stroke="#e2e2e2"/>')
        out.append(_text(left - 8, down(share) + 4, f"{share} %", 12, "end", "#666666"))
    for weight in weights:
        out.append(_text(across(weight), BOTTOM + 18, f"{weight:g}".replace("-", "−"), 12, colour="#666666"))
    for mode, colour in COLOURS.items():
        mine = sorted((float(row[1]), row) for row in rows if row[0] == mode)
        for column, style in ((2, ""), (4, ' stroke-dasharray="2 5"')):
            points = []
            for weight, row in mine:
                found = SHARE.match(row[column])
                assert found is not None
                mean, low, high = (float(n) for n in found.groups())
                points.append(f"{across(weight):.1f} {down(mean):.1f}")
                if column == 2:
                    out.append(
                        f'<path d="M{across(weight):.1f} {down(low):.1f}V{down(high):.1f}" stroke="{colour}" opacity=".35"/>'
                    )
                    out.append(f'<circle cx="{across(weight):.1f}" cy="{down(mean):.1f}" r="3" fill="{colour}"/>')
            out.append(f'<path d="M{"L".join(points)}" fill="none" stroke="{colour}" stroke-width="2"{style}/>')
    return out


def drawn() -> str:
    """The SVG: of a thing's phrase on the left, of its colour on the right."""
    parts = []
    for i, what in enumerate(("thing", "colour")):
        parts += _panel(LEFT + i * (SIDE + GAP), what, load(f"weights_{what}").tables[0].rows)
    for i, (mode, colour) in enumerate(COLOURS.items()):
        parts.append(_text(LEFT + i * 410, HEIGHT - 8, f"— mode {mode}: it is drawn", 13, "start", colour))
        parts.append(_text(LEFT + i * 410 + 205, HEIGHT - 8, "··· the other thing is", 13, "start", colour))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fafaf8"/>', *parts, "</svg>"]) + "\n"
