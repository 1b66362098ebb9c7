"""The report of a comparison: numbers as JSON to share, a Markdown table, and one HTML file with pictures that opens offline."""

from __future__ import annotations

import base64
import functools
import html
import importlib
import io
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ..hunt.head_files import pack_version
from .bench import Bench, tensor_of
from .judge import ALL
from .log import Log, key_of
from .methods import PLAIN, defaults_of
from .statistics import interval, paired

FORMAT = 1
CHANGE = "change of pixels"  # RMS against plain: says how much, not how well
BEST = 4  # pictures of the largest gains, and as many of the largest losses
SMALL = 256  # pixels, of pictures in a report
# What papers report on their own models, by suite and kind of scorer; only where the table is known to us.
PAPERS: Mapping[tuple[str, str], str] = {
    ("scb", "scb"): "Detail++ (arXiv 2507.17853): SDXL 0.2488, Detail++ 0.2687",
    (
        "counts",
        "counts",
    ): "GenEval (arXiv 2310.11513, its own prompts and detector), counting / position: SD1.5 0.35 / 0.04, SDXL 0.39 / 0.15",
    (
        "styles",
        "preference",
    ): "HeadHunter (arXiv 2506.10978, table 1, SD3-medium, its own prompts; PickScore): none 19.66, CFG 3 20.87, "
    "HeadHunter 20.70, both 20.92",
    ("styles", "reward"): "HeadHunter (the same table; ImageReward): none -0.591, CFG 3 0.844, HeadHunter 0.470, both 0.845",
    ("file", "vqa"): "Detail++ (arXiv 2507.17853), T2I-CompBench colour / texture / shape: SDXL 0.6369 / 0.5637 / 0.5408, "
    "Detail++ 0.7389 / 0.7241 / 0.5582",
}


def _apart(one: bytes, other: bytes) -> float:
    """How much two pictures differ: RMS of pixels in [0, 1]."""
    return float((tensor_of(one) - tensor_of(other)).square().mean().sqrt())


def comfyui_version() -> str:
    try:
        return str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):  # older ones do not say
        return "of unknown version"


def machine() -> str:
    """The device and its software."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return f"{device}, ComfyUI {comfyui_version()}, torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"


def result_of(made: Bench, log: Log) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Everything of a run as plain data, and small pictures for the gallery by ``method|item|seed``."""
    rows, costs = [], []
    for m, i, s in made.tasks():
        key, method, seed = made.key((m, i, s)), made.methods[m].name, made.seed(i, s)
        if not log.has(key):
            continue
        seconds, memory = log.cost(key)
        costs.append([method, i, seed, round(seconds, 4), memory])
        for judge in made.judges:
            for part, value in (log.scores(key, judge.key) or {}).items():
                rows.append([method, i, seed, judge.name, part, value if math.isfinite(value) else None])
        if m:  # in `tasks` the plain picture of the same prompt and seed comes first
            both = log.picture(made.key((0, i, s))), log.picture(key)
            if both[0] and both[1]:
                rows.append([method, i, seed, CHANGE, ALL, _apart(both[0], both[1])])
                pair = tensor_of(both[0]), tensor_of(both[1])
                for one in made.between:
                    value = _once(log, key, f"{one.key} {made.key((0, i, s))}", functools.partial(one.apart, *pair))
                    rows.append([method, i, seed, one.name, ALL, value])
    suite = [[item.text, item.group] for item in made.items]
    result = {
        "attune prove": FORMAT,
        "pack": pack_version(),
        "machine": machine(),
        "family": made.family,
        "model": made.config["model"],
        "model hash": made.model_key,
        "sampling": made.sampling,
        "suite": made.config["suite"],
        "prompts": suite,
        "seeds": made.config["seeds"],
        "batch": made.config["batch"],
        "methods": [[m.name, [[n, dict(x)] for n, x in m.nodes]] for m in made.methods],
        "heads": made.heads,
        "defaults": {n: defaults_of(n) for m in made.methods for n, _ in m.nodes},
        "scorers": [*([j.name, j.key, j.share] for j in made.judges), *([j.name, j.key, False] for j in made.between)],
        "sets": _sets(made, log),
        "skipped": made.missing,
        "costs": costs,
        "rows": rows,
    }
    result["group"] = key_of([made.model_key, made.sampling, suite])
    gallery = {}
    for m, i, s in _shown(made, result):
        png = log.picture(made.key((m, i, s)))
        if png is not None:
            gallery[f"{made.methods[m].name}|{i}|{made.seed(i, s)}"] = _small(png)
    return result, gallery


def _once(log: Log, key: str, scorer: str, value: Callable[[], float]) -> float:
    """A number of pictures that are all there, from the log where it is known."""
    if (known := log.scores(key, scorer)) is None:
        known = {ALL: value()}
        log.judge(key, scorer, known)
    return known[ALL]


def _sets(made: Bench, log: Log) -> list[list[Any]]:
    """Scorers of many pictures: ``[scorer, method, pictures, value]``."""
    out = []
    for one in made.of_many:
        for m, method in enumerate(made.methods):
            keys = [key for key in (made.key(task) for task in made.tasks() if task[0] == m) if log.has(key)]
            if len(keys) > 1:
                pictures = (tensor_of(log.picture(key) or b"") for key in keys)
                value = _once(log, key_of(keys), one.key, functools.partial(one.of, pictures))
                out.append([one.name, method.name, len(keys), value])
    return out


def _shown(made: Bench, result: Mapping[str, Any]) -> set[tuple[int, int, int]]:
    """The pictures of the largest gains and losses of every method, and plain's beside them."""
    number = {m.name: k for k, m in enumerate(made.methods)}
    found = set()
    for name in number:
        for i, seed, _ in extremes(result, name):
            s = next(s for s in range(len(made.config["seeds"])) if made.seed(i, s) == seed)
            found |= {(number[name], i, s), (0, i, s)}
    return found


def values_of(result: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, dict[tuple[int, int], float]]]:
    """By scorer and part: by method: a value by prompt and seed."""
    found: dict[tuple[str, str], dict[str, dict[tuple[int, int], float]]] = {}
    for method, i, seed, scorer, part, value in result["rows"]:
        if value is not None:
            found.setdefault((scorer, part), {}).setdefault(method, {})[i, seed] = value
    return found


def extremes(result: Mapping[str, Any], method: str) -> list[tuple[int, int, float]]:
    """``(item, seed, difference to plain)`` of the largest gains and losses by the first scorer's whole."""
    first = next((name for name, *_ in result["scorers"]), CHANGE)
    found = values_of(result).get((first, ALL), {})
    plain, own = found.get(PLAIN, {}), found.get(method, {})
    changes = sorted(((*pair, own[pair] - plain[pair]) for pair in own if pair in plain), key=lambda c: (-c[2], c[:2]))
    if method == PLAIN:
        return []
    gains, losses = [c for c in changes if c[2] > 0], [c for c in changes[::-1] if c[2] < 0]
    return [*gains[:BEST], *losses[:BEST]]


def _cells(share: bool, own: Mapping[Any, float], plain: Mapping[Any, float], first: bool) -> list[str]:
    """Number, score, difference, wins and losses."""
    values = list(own.values())
    mean = sum(values) / len(values)
    exact = share and all(v in (0.0, 1.0) for v in values)
    shown = f"{mean:.4f}"
    if exact:
        low, high = interval(int(sum(values)), len(values))
        shown = f"{100 * mean:.1f} % ({100 * low:.0f}-{100 * high:.0f})"
    both = [pair for pair in own if pair in plain]
    if first or not both:
        return [str(len(values)), shown, "", ""]
    before, after = [plain[p] for p in both], [own[p] for p in both]
    change, low, high = paired(before, after)
    factor, form = (100, "+.1f") if exact else (1, "+.4f")
    told = f"{factor * change:{form}}" + (f" ({factor * low:{form}} to {factor * high:{form}})" if math.isfinite(low) else "")
    wins, losses = (sum(sign * (a - b) > 0 for a, b in zip(after, before, strict=True)) for sign in (1, -1))
    return [str(len(values)), shown, told, f"{wins} / {losses}"]


COLUMNS = ("method", "pictures", "score", "against plain (95 %)", "wins / losses", "time", "memory")


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """A table for each scorer and part, wholes first and scorers as the config names them: its title and rows of `COLUMNS`."""
    share = {name: kind for name, _, kind in result["scorers"]}
    cost = ratios(result)
    order = [name for name, _ in result["methods"]]
    groups = sorted({group for _, group in result["prompts"] if group})
    rank = {name: i for i, name in enumerate(share)}

    def place(entry: tuple[tuple[str, str], Any]) -> tuple[bool, int, str]:
        (scorer, part), _ = entry
        return part != ALL, rank.get(scorer, len(rank)), part

    out = []
    for (scorer, part), found in sorted(values_of(result).items(), key=place):
        limits = ["", *(groups if part == ALL and len(groups) > 1 else [])]
        for group in limits:
            rows = []
            mine = {
                method: {p: v for p, v in values.items() if not group or result["prompts"][p[0]][1] == group}
                for method, values in found.items()
            }
            for method in order:
                if mine.get(method):
                    cells = _cells(share.get(scorer, False), mine[method], mine.get(PLAIN, {}), method == PLAIN)
                    rows.append([method, *cells, *cost.get(method, ("", ""))])
            title = f"{scorer}, {part}" + (f", {group}" if group else "")
            if rows:
                out.append((title, rows))
    for name in dict.fromkeys(row[0] for row in result.get("sets", ())):
        values = {method: (number, value) for scorer, method, number, value in result["sets"] if scorer == name}
        rows = []
        for method in order:
            if method in values:
                number, value = values[method]
                change = f"{value - values[PLAIN][1]:+.4f}" if method != PLAIN and PLAIN in values else ""
                rows.append([method, str(number), f"{value:.4f}", change, "", *cost.get(method, ("", ""))])
        out.append((f"{name}, of all pictures together (lower is nearer; no interval)", rows))
    return out


def ratios(result: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Median seconds and bytes of a method's pictures to plain's."""

    def middle(method: str, place: int) -> float:
        return float(torch.tensor([float(row[place]) for row in result["costs"] if row[0] == method] or [0.0]).median())

    if result.get("batch", 1) > 1:  # some were drawn together and some alone
        return {name: ("n/a", "n/a") for name, _ in result["methods"]}
    plain = middle(PLAIN, 3), middle(PLAIN, 4)
    return {
        name: tuple(f"{middle(name, k) / p:.2f}" if p else "n/a" for k, p in zip((3, 4), plain, strict=True))  # type: ignore[misc]
        for name, _ in result["methods"]
    }


def _sections(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return result.get("runs", [result])


def _said(settings: Mapping[str, Any]) -> str:
    """Settings in a line."""
    return ", ".join(f"{k}: {v}" for k, v in settings.items()) or "as it comes"


def _about(result: Mapping[str, Any]) -> list[str]:
    """What was drawn, with what, and what is not in it, in sentences."""
    sampling = _said({k: v for k, v in result["sampling"].items() if v not in ("", 0, 0.0, [])})
    lines = [
        f"Model {result['model']} ({result['family']}, sha256 {result['model hash']}), suite {_said(result['suite'])}, {len(result['prompts'])} "
        f"prompts, seeds {result['seeds']}; {sampling}.",
        f"Attune {result['pack']} on {result['machine']}.",
        *(
            f"{name}: {'; '.join(f'{n} ({_said(x)})' for n, x in nodes) or 'the model as it is'}."
            for name, nodes in result["methods"]
        ),
        *(f"Where nothing else is said, {n} has {_said(x)}." for n, x in result.get("defaults", {}).items()),
        *(f"The heads of {name}: {text}." for name, text in result.get("heads", {}).items()),
        *(f"{name} is {key}." for name, key, _ in result["scorers"]),
        *result["skipped"],
    ]
    kinds = {name.partition(":")[0] for name, *_ in result["scorers"]}
    lines += [
        f"In the paper, on its models: {text}."
        for (suite, kind), text in PAPERS.items()
        if suite == result["suite"]["name"] and kind in kinds
    ]
    return lines


def markdown_of(result: Mapping[str, Any]) -> str:
    """Tables for a page."""
    lines = ["# What the methods do", ""]
    for one in _sections(result):
        lines += [f"- {line}" for line in _about(one)] + [""]
        for title, rows in tables(one):
            cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
            lines += [f"**{title}**", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
            lines += [f"| {' | '.join(row)} |" for row in cells] + [""]
    return "\n".join(lines)


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}summary{font-size:1.3em;font-weight:bold;cursor:pointer}"
    "figure{display:inline-block;margin:.5em;vertical-align:top;width:496px}img{width:240px;margin-right:8px}"
    "figcaption{font-size:13px;color:#555}"
)


def html_of(result: Mapping[str, Any], gallery: Mapping[str, bytes]) -> str:
    """One file without links: tables, and pictures of the largest gains and losses with plain's on the left."""
    out = ["<!doctype html><html lang=en><meta charset=utf-8><title>Attune: prove</title>", f"<style>{STYLE}</style>"]
    out.append("<h1>What the methods do</h1>")
    for one in _sections(result):
        out += ["<ul>", *(f"<li>{html.escape(line)}</li>" for line in _about(one)), "</ul>"]
        parts = [(_is_whole(title), _table(title, rows)) for title, rows in tables(one)]
        out += [text for whole, text in parts if whole]
        for method, _ in one["methods"]:
            shown = [c for c in extremes(one, method) if f"{method}|{c[0]}|{c[1]}" in gallery]
            for title, wanted in (("gains", 1), ("losses", -1)):
                some = [c for c in shown if wanted * c[2] > 0]
                if some:
                    out.append(f"<h2>{html.escape(method)}: largest {title} (plain on the left)</h2>")
                    out += [_figure(one, gallery, method, *c) for c in some]
        if rest := [text for whole, text in parts if not whole]:
            out += ["<details><summary>Part by part</summary>", *rest, "</details>"]
    return "\n".join([*out, "</html>"])


def _is_whole(title: str) -> bool:
    """Whether a title of `tables` is of everything at once, and not of a part."""
    return f", {ALL}" in title


def _table(title: str, rows: Sequence[Sequence[str]]) -> str:
    out = [f"<h2>{html.escape(title)}</h2><table><tr>", *(f"<th>{c}</th>" for c in COLUMNS), "</tr>"]
    out += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*out, "</table>"])


def _figure(result: Mapping[str, Any], gallery: Mapping[str, bytes], method: str, i: int, seed: int, change: float) -> str:
    pictures = []
    for name in (PLAIN, method):
        data = base64.b64encode(gallery.get(f"{name}|{i}|{seed}", b"")).decode()
        pictures.append(f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{data}">')
    text = html.escape(f"{result['prompts'][i][0]} (seed {seed}, {change:+.3f})")
    return f"<figure>{''.join(pictures)}<figcaption>{text}</figcaption></figure>"


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several results as one: runs of the same checkpoint, prompts and sampling become one run, others stand one after another.

    Raises:
        ValueError: for anything that is no result, or methods of one name with different settings in one group.
    """
    groups: dict[str, dict[str, Any]] = {}
    for result in results:
        for one in _sections(result):
            if one.get("attune prove") != FORMAT:
                raise ValueError(
                    "prove: one of the files is no result of this version; give the .json files beside the reports."
                )
            own = dict(one["methods"])
            held = groups.setdefault(
                one["group"], {**one, "rows": [], "costs": [], "methods": [], "scorers": [], "seeds": [], "skipped": []}
            )
            for name, nodes in own.items():
                known = dict(held["methods"])
                if known.get(name, nodes) != nodes:
                    raise ValueError(
                        f"prove: “{name}” has other settings in another of these results; rename it in one of the configs."
                    )
            held.setdefault("sets", [])
            if held["rows"] and held["sets"]:
                held["sets"] = []
                held["skipped"] = [*held["skipped"], "Scores of all pictures together cannot be joined and are left out."]
            for part in ("methods", "scorers", "seeds", "skipped"):
                held[part] = held[part] + [x for x in one[part] if x not in held[part]]
            for part, size in (("rows", 5), ("costs", 3)):
                there = {tuple(row[:size]) for row in held[part]}
                held[part] = held[part] + [row for row in one[part] if tuple(row[:size]) not in there]
            if one["machine"] not in held["machine"]:
                held["machine"] = f"{held['machine']}; {one['machine']}"
    return {"attune prove": FORMAT, "runs": list(groups.values())}


def _small(png: bytes) -> bytes:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((SMALL, SMALL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def strip(made: Bench, log: Log, task: Sequence[Any]) -> bytes:
    """The pictures of a task's prompt and seed side by side, method by method, as PNG."""
    _, i, s = task[:3]
    found = [log.picture(made.key((m, i, s))) for m in range(len(made.methods))]
    pictures = [Image.open(io.BytesIO(png)).convert("RGB") for png in found if png]
    for picture in pictures:
        picture.thumbnail((2 * SMALL, 2 * SMALL))
    out = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    left = 0
    for picture in pictures:
        out.paste(picture, (left, 0))
        left += picture.width
    file = io.BytesIO()
    out.save(file, "PNG")
    return file.getvalue()
