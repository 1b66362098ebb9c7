"""What methods do to the bundled model's pictures, by `prove`, the harness that judges any checkpoint: ``bench prove CONFIG …`` (`configs`).

Pictures are kept in one log for all configs, so that a run goes on where it was stopped and no plain picture is drawn twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ...demo import model
from ...hunt.command import parse
from ...hunt.head_files import PACK
from ...hunt.report import time_left
from ...prove import command, report
from ...prove.judges import ALL
from ...prove.methods import PLAIN
from ...prove.statistics import shown_change, shown_share
from ..runtime import RunError
from .shared.records import recorded

CONFIGS = Path(__file__).parent / "configs"
LOG, BATCH = "bench", 16
READER = "reader"
SHARES = {"objects present": "present", "colours right": "colours", "patterns right": "patterns", "all bound": ALL}
CHANGES = {"present, against plain": "present", "bound, against plain": ALL}
SIMILARITY = "demo: similarity"
EVERY = 60.0  # seconds between two lines about the time left


def cells(method: str, found: Mapping[tuple[str, str], Any], pairs: Sequence[tuple[int, int]]) -> dict[str, str]:
    """A row: what a method's pictures show, and differences to plain over the pairs of prompt and seed."""

    def values(part: tuple[str, str], of: str) -> list[float]:
        return [found[part][of][pair] for pair in pairs]

    out = {}
    for title, part in SHARES.items():
        out[title] = shown_share([value == 1 for value in values((READER, part), method)])
    for title, part in CHANGES.items():
        both = values((READER, part), PLAIN), values((READER, part), method)
        out[title] = "" if method == PLAIN else shown_change(*both)
        if part == ALL:
            more, less = (sum(sign * (b - a) > 0 for a, b in zip(*both, strict=True)) for sign in (1, -1))
            out["gained / lost"] = "" if method == PLAIN else f"{more} / {less}"
    if (SIMILARITY, ALL) in found:
        both = values((SIMILARITY, ALL), PLAIN), values((SIMILARITY, ALL), method)
        out["CLIP-T"] = f"{sum(both[1]) / len(pairs):.3f}"
        out["CLIP-T, against plain"] = "" if method == PLAIN else shown_change(*both, percent=False)
    changed = [] if method == PLAIN else values((report.CHANGE, ALL), method)
    out["change of pixels"] = f"{sum(changed) / len(pairs):.3f}" if changed else ""
    return out


def rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A table of everything that the reader says of a run."""
    found = report.values_of(result)
    pairs = sorted(found[READER, ALL][PLAIN])
    cfg = f"{result['sampling']['cfg']:g}"
    return [{"method": m, "cfg": cfg, **cells(m, found, pairs)} for m, _ in result["methods"]]


def judged(name: str, prompts: int | None) -> dict[str, Any]:
    """Draw what is missing of a config, write its report, and return its numbers."""
    config = {**parse(CONFIGS / f"{name}.json"), "name": f"bench {name}", "batch": BATCH}
    if prompts is not None:
        config["suite"] = {**config["suite"], "prompts": prompts}
    last = time.monotonic()

    def show(done: int, total: int, left: float) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY or done == total:
            last = time.monotonic()
            print(f"{name}: {done} of {total} pictures{time_left(left)}", file=sys.stderr, flush=True)

    made, log = command.run(config, show, log_at=command.log_path(LOG))
    try:
        result, gallery = report.result_of(made, log)
    finally:
        log.close()
    command.write(PACK / "output", config["name"], result, gallery)
    return result


def keep(result: Mapping[str, Any]) -> None:
    """Write what the plain model's pictures show into the metadata of the shipped weights."""
    found = report.values_of(result)
    shares = {part: list(found[READER, part][PLAIN].values()) for part in SHARES.values()}
    names = {"present": "present", "colours": "colour", "patterns": "pattern", ALL: "bound"}
    known = {
        "prompts": len(result["prompts"]),
        "things": result["suite"].get("things", 2),
        "cfg": result["sampling"]["cfg"],
        "steps": result["sampling"]["steps"],
        **{names[part]: sum(values) / len(values) for part, values in shares.items()},
    }
    (path,) = model.files()
    with safe_open(path, "pt") as file:
        metadata = {**(file.metadata() or {}), "metrics": json.dumps(known)}
    save_file(load_file(path), path, metadata=metadata)


@recorded
def main(argv: list[str]) -> int:
    """Print one table of the configs."""
    known = sorted(path.stem for path in CONFIGS.glob("*.json"))
    parser = argparse.ArgumentParser(prog="run.py bench prove", description=__doc__)
    parser.add_argument("configs", nargs="+", choices=known, help="of tools/benchmarks/configs")
    parser.add_argument("--prompts", type=int, help="the first prompts only")
    parser.add_argument("--keep", action="store_true", help="write the plain model's shares into its weights' metadata")
    args = parser.parse_args(argv)
    found = [judged(name, args.prompts) for name in args.configs]
    number = {len(result["prompts"]) for result in found}
    if len(number) > 1:
        raise RunError("bench prove: these configs have different numbers of prompts; give --prompts, or run one at a time.")
    lines = [row for result in found for row in rows(result)]
    columns = list(dict.fromkeys(title for row in lines for title in row))
    suite, sampling = found[0]["suite"], found[0]["sampling"]
    print(
        f"The bundled model, {number.pop()} prompts of {suite.get('things', 2)} things ({suite.get('split', 'test')}), "
        f"{sampling['steps']} steps, {sampling['sampler_name']}, seeds from {found[0]['seeds']}:"
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in lines:
        print(f"| {' | '.join(row.get(title, '') for title in columns)} |")
    if args.keep:
        keep(found[0])
    return 0
