"""Write the tables and the picture of MEASUREMENTS.md, the table of costs among them, from the benchmarks' results (``run.py measurements``).

A table stands between ``<!-- results: RECORD -->`` and ``<!-- end of results -->``. After the record's name may come the table's number in
it (from 1), and ``without`` and the names of columns that are left out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from . import curves
from .benchmarks.shared.records import RESULTS, Record, load
from .runtime import RunError
from .runtime.setup import ROOT

PAGES = (ROOT / "MEASUREMENTS.md",)
MARK = re.compile(r"(<!-- results: (\w+)(?: (\d+))?(?: without ([^>]+?))? -->\n).*?(<!-- end of results -->)", re.DOTALL)
# Rows of the table of costs: what they are called there, the record, and its rows (times of several are listed).
COSTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("SoftPAG, middle block (the default)", "softpag_cost", ("SoftPAG, middle block",)),
    ("SoftPAG, last block", "softpag_cost", ("SoftPAG, last block",)),
    ("SoftPAG, outside its span", "softpag_cost", ("SoftPAG, outside its span",)),
    ("ComfyUI's own PAG node", "softpag_cost", ("ComfyUI's own PAG node",)),
    ("Semantic-aware CFG", "scfg_cost", ("S-CFG",)),
    ("Semantic-aware CFG without completion", "scfg_cost", ("S-CFG without completion",)),
    ("Attention Regulation, half of the steps", "regulation_cost", ("regulation, half of the steps",)),
    ("Attention Regulation, every step", "regulation_cost", ("regulation, every step",)),
    ("Capture Attention Maps, words and pixels", "scfg_cost", ("capture, words and pixels",)),
    ("Detail++, four branches, every step shared", "detail_cost", ("Detail++, every step shared",)),
    ("Detail++, one branch at a time", "detail_cost", ("Detail++, one branch at a time",)),
    ("Phrase Fusion, two phrases", "toolbox_cost", ("fusion, two phrases",)),
    (
        "Head Filter, half of all heads: zero, mean, uniform",
        "toolbox_cost",
        tuple(f"filter, half of all heads, {others}" for others in ("zero", "mean", "uniform")),
    ),
    ("Refine Attention, two phrases", "toolbox_cost", ("refinement, two phrases",)),
    ("Refine Attention, every token", "toolbox_cost", ("refinement, every token",)),
)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" if set(cells) != {"---"} else f"|{'|'.join(cells)}|\n" for cells in lines)


def source(record: Record) -> str:
    """Where the figures are from."""
    return f"`{record.command}` at commit {record.commit} on {record.machine}"


def table(name: str, number: int = 1, without: Sequence[str] = ()) -> str:
    """One table of a record, and where it is from."""
    record = load(name)
    found = record.tables[number - 1]
    kept = [i for i, column in enumerate(found.columns) if column not in without]
    rows = [[row[i] for i in kept] for row in found.rows]
    return markdown([found.columns[i] for i in kept], rows) + f"\n<sub>{source(record)}</sub>\n"


def costs() -> str:
    """The table of costs."""
    columns = ("FLOPs", "time", "memory beside the weights", "limit")
    lines = []
    for label, name, variants in COSTS:
        found = load(name).tables[0]
        rows = [dict(zip(found.columns, row, strict=True)) for v in variants for row in found.rows if row[0] == v]
        if len(rows) != len(variants):
            raise RunError(f"{name}.json has no row for “{label}” in the table of costs.")
        cells = [", ".join(dict.fromkeys(row.get(column, "") for row in rows)) for column in columns]
        lines.append([label, *("" if cell == "n/a" else cell for cell in cells)])
    sources = {load(name).command.removeprefix("python3 run.py "): load(name) for _, name, _ in COSTS}
    said = "; ".join(f"`{command}` at {record.commit} on {record.machine}" for command, record in sources.items())
    return markdown(["", *columns], lines) + f"\n<sub>{said}</sub>\n"


def written(page: str) -> str:
    """A page with the figures of the results."""

    def filled(found: re.Match[str]) -> str:
        start, name, number, without, end = found.groups()
        if name == "costs":
            return start + costs() + end
        if not (RESULTS / f"{name}.json").is_file():
            raise RunError(f"There is no record '{name}' in {RESULTS.relative_to(ROOT).as_posix()}.")
        return start + table(name, int(number or 1), without.split(", ") if without else ()) + end

    return MARK.sub(filled, page)


def main(argv: list[str]) -> int:
    """Write the pages."""
    argparse.ArgumentParser(prog="run.py measurements", description=__doc__).parse_args(argv)
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        path.write_text(written(page), encoding="utf-8")
    curves.PICTURE.write_text(curves.drawn(), encoding="utf-8")
    return 0
