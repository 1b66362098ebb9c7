"""What a search for heads found: in words, as the story that a head file keeps, and as one picture (the sheet)."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .engine import Engine
from .search import Found

PAPER, INK, GREY, LINE = (250, 250, 248), (30, 30, 30), (205, 205, 205), (40, 90, 160)
CELL, GAP, SMALL = 22, 16, 128


# --- in words -----------------------------------------------------------------------------------------------------------


def time_left(seconds: float) -> str:
    """``3 h 20 min left``, or nothing where it is not known yet."""
    if not math.isfinite(seconds):
        return ""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f", {minutes // 60} h {minutes % 60} min left"
    return f", {minutes} min left" if minutes else ", a moment left"


def head_scores(engine: Engine, found: Found) -> dict[str, list[float | None]]:
    """Each head's score alone, as the first round found it, for every searched site; None for heads that were no candidates."""
    alone = found.hunt.rounds[0].scores
    searched = {site for site, _ in alone}
    return {
        s.name: [round(alone[s.name, n], 4) if (s.name, n) in alone else None for n in range(s.heads)]
        for s in engine.sites
        if s.name in searched
    }


def scorer_names(engine: Engine) -> str:
    """The scorers, for people."""
    return ", ".join(scorer.name for scorer in engine.scorers)


def story(engine: Engine, found: Found, objective: str) -> dict[str, Any]:
    """What a head set's file says about where it comes from."""
    rounds = [{"chosen": [f"{site}:{number}" for site, number in r.chosen], "score": r.score} for r in found.hunt.rounds]
    ranking = {"ranking": found.plan.text} if len(engine.scorers) > 1 else {}
    return {
        "objective": objective,
        "scorer": scorer_names(engine),
        **ranking,
        "scores": {"no heads": found.hunt.plain, "rounds": rounds},
        "heatmap": head_scores(engine, found),
        "images": found.images,
        "prompts": len(engine.positives),
        "settings": asdict(engine.settings),
    }


def report(engine: Engine, found: Found, objective: str) -> str:
    """The search in words."""
    hunt = found.hunt
    ranked = f", ranked by {found.plan.text}" if len(engine.scorers) > 1 else ""
    lines = [
        f"HeadHunter: {len(hunt.rounds[0].scores)} heads, {found.images} pictures of {len(engine.positives)} prompts for each, "
        f"scorer {scorer_names(engine)}{ranked}, objective: {objective}",
        f"no heads: {hunt.plain:.4f}{_each(found, 0)}",
    ]
    for i, r in enumerate(hunt.rounds, 1):
        tried = sum(1 for n in r.images.values() if n < found.images)
        fewer = f"; {tried} of {len(r.images)} candidates were left early, on fewer pictures" if tried else ""
        joined = ", ".join(f"{site}:{number} ({r.scores[(site, number)]:.4f})" for site, number in r.chosen)
        change = f"{r.score - hunt.plain:+.4f}"
        lines.append(f"round {i}: {joined}; all together {r.score:.4f} ({change}){_each(found, i)}{fewer}")
    if len(hunt.rounds) < found.plan.rounds:
        lines.append(f"The search ended after round {len(hunt.rounds)}: no head is left that may join.")
    best = max(range(len(hunt.rounds)), key=lambda i: hunt.rounds[i].score)
    if hunt.rounds[best].score > hunt.rounds[-1].score:
        lines.append(
            f"The set was worth most after round {best + 1}: search again with that many rounds to get it; all is in the log."
        )
    lines.append(f"heads: {found.heads.text}")
    lines.append(f"{found.computed} pictures made and scored now, {found.known} were in the log.")
    if found.of_others and not found.known:
        lines.append(
            f"The log also holds {found.of_others} pictures of other settings (model, prompts, scorer, numbers), which were not used."
        )
    return "\n".join(lines)


def _each(found: Found, place: int) -> str:
    """Every scorer's own mean, where there are several."""
    means = found.means[place]
    return f" [{', '.join(f'{m:.4f}' for m in means)}]" if len(means) > 1 else ""


# --- as a picture -------------------------------------------------------------------------------------------------------


def _font(size: int = 13) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _colour(value: float) -> tuple[int, int, int]:
    """Blue for -1, white for 0, red for 1."""
    end = np.array((202, 40, 44) if value > 0 else (38, 96, 188))
    mixed = (1 - min(abs(value), 1.0)) * np.array((255, 255, 255)) + min(abs(value), 1.0) * end
    return (int(mixed[0]), int(mixed[1]), int(mixed[2]))


def heatmap(engine: Engine, found: Found) -> Image.Image:
    """Layers (down) by heads (across): what one head alone changes the score by; the chosen ones have their number."""
    first = found.hunt.rounds[0]
    change = {head: score - found.hunt.plain for head, score in first.scores.items()}
    most = max((abs(v) for v in change.values()), default=0) or 1.0
    left = 12 + max(int(_font().getlength(site.name)) for site in engine.sites)
    widest = max(site.heads for site in engine.sites)
    title = f"change of the score by each head alone (±{most:.3g}); numbers: the order of choice"
    width = max(left + widest * CELL, int(_font().getlength(title))) + 8
    out = Image.new("RGB", (width, 44 + len(engine.sites) * CELL), PAPER)
    draw = ImageDraw.Draw(out)
    draw.text((4, 4), title, INK, _font())
    for h in range(widest):
        draw.text((left + h * CELL + CELL // 2, 34), str(h), INK, _font(11), anchor="mm")
    for y, site in enumerate(engine.sites):
        top = 44 + y * CELL
        draw.text((left - 6, top + CELL // 2), site.name, INK, _font(), anchor="rm")
        for h in range(site.heads):
            box = (left + h * CELL, top, left + (h + 1) * CELL - 2, top + CELL - 2)
            known = change.get((site.name, h))
            draw.rectangle(box, GREY if known is None else _colour(known / most))
    order = {head: number for number, head in enumerate(found.hunt.heads, 1)}
    places = {site.name: y for y, site in enumerate(engine.sites)}
    for (name, h), number in order.items():
        x, top = left + h * CELL, 44 + places[name] * CELL
        draw.rectangle((x - 1, top - 1, x + CELL - 1, top + CELL - 1), outline=INK, width=2)
        draw.text((x + CELL // 2 - 1, top + CELL // 2 - 1), str(number), INK, _font(11), anchor="mm")
    return out


def curve(found: Found, width: int = 360, height: int = 240) -> Image.Image:
    """The score of no heads and of the set after every round."""
    scores = [found.hunt.plain, *(r.score for r in found.hunt.rounds)]
    out = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(out)
    draw.text((4, 4), "score after each round (0: no heads)", INK, _font())
    low, high = min(scores), max(scores)
    room = (high - low) or 1.0
    left, right, top, bottom = 62, width - 20, 44, height - 32

    def at(i: int) -> tuple[float, float]:
        return left + (right - left) * i / max(len(scores) - 1, 1), bottom - (bottom - top) * (scores[i] - low) / room

    for value in {low, high}:
        y = bottom - (bottom - top) * (value - low) / room
        draw.line((left, y, right, y), GREY)
        draw.text((left - 6, y), f"{value:.4g}", INK, _font(11), anchor="rm")
    points = [at(i) for i in range(len(scores))]
    draw.line(points, LINE, width=2)
    for i, (x, y) in enumerate(points):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), LINE)
        if len(scores) <= 12 or i % (len(scores) // 10) == 0:
            draw.text((x, bottom + 14), str(i), INK, _font(11), anchor="mm")
    return out


def pictures(found: Found) -> Image.Image | None:
    """A column of pictures without heads, and one of the set after every round."""
    scores = [found.hunt.plain, *(r.score for r in found.hunt.rounds)]
    columns = [(i, column) for i, column in enumerate(found.pictures) if column]
    if not columns:
        return None
    rows = max(len(column) for _, column in columns)
    out = Image.new("RGB", (len(columns) * (SMALL + 6) + 6, 26 + rows * (SMALL + 6)), PAPER)
    draw = ImageDraw.Draw(out)
    for x, (i, column) in enumerate(columns):
        left = 6 + x * (SMALL + 6)
        draw.text((left, 5), f"{'no heads' if i == 0 else f'round {i}'}: {scores[i]:.4g}", INK, _font(12))
        for y, picture in enumerate(column):
            small = picture.copy()
            small.thumbnail((SMALL, SMALL))
            out.paste(small, (left, 26 + y * (SMALL + 6)))
    return out


def sheet(engine: Engine, found: Found) -> Image.Image:
    """All of it: heatmap and curve side by side, pictures below."""
    heat, line, below = heatmap(engine, found), curve(found), pictures(found)
    width = max(heat.width + line.width + 3 * GAP, (below.width if below else 0) + 2 * GAP)
    height = max(heat.height, line.height) + 2 * GAP + (below.height + GAP if below else 0)
    out = Image.new("RGB", (width, height), PAPER)
    out.paste(heat, (GAP, GAP))
    out.paste(line, (heat.width + 2 * GAP, GAP))
    if below is not None:
        out.paste(below, (GAP, max(heat.height, line.height) + 2 * GAP))
    return out


def image(engine: Engine, found: Found) -> Tensor:
    """`sheet` as a ComfyUI IMAGE ``[1, h, w, 3]``."""
    return torch.from_numpy(np.asarray(sheet(engine, found)).astype(np.float32) / 255)[None]
