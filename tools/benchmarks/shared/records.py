"""Results as small JSON files: the tables that a benchmark prints, with its command, commit, machine and date.

``python3 run.py bench NAME … --record RECORD`` keeps them; ``python3 run.py measurements`` writes the pages from them.
"""

from __future__ import annotations

import functools
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from ...runtime import RunError
from ...runtime.setup import ROOT

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Table:
    """Cells as they are printed, and the line above them."""

    about: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Record:
    """One run of a benchmark."""

    command: str
    commit: str
    machine: str
    date: str
    tables: list[Table]
    note: str = ""


def tables_of(text: str) -> list[Table]:
    """The Markdown tables of a text."""
    found: list[Table] = []
    about, before = "", ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip()[1:].removesuffix("|").split("|")] if line.startswith("|") else []
        if not cells:
            about = line.strip() or about
        elif not before.startswith("|"):
            found.append(Table(about, cells, []))
        elif set(line) - set("|-: "):
            found[-1].rows.append(cells)
        before = line
    return found


def dumped(record: Record) -> str:
    """A record as JSON, a line for each row."""
    whole = asdict(record)
    tables = whole.pop("tables")
    head = ",\n".join(f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in whole.items())
    parts = []
    for table in tables:
        rows = ",\n".join(f"   {json.dumps(row, ensure_ascii=False)}" for row in table["rows"])
        about, columns = (json.dumps(table[k], ensure_ascii=False) for k in ("about", "columns"))
        parts.append(f'  {{"about": {about},\n   "columns": {columns},\n   "rows": [\n{rows}]}}')
    return "{\n" + head + ',\n "tables": [\n' + ",\n".join(parts) + "]\n}\n"


def load(name: str) -> Record:
    """A record by its file's name."""
    data = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return Record(**{**data, "tables": [Table(**table) for table in data["tables"]]})


def recorded(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """A benchmark's ``main`` with the option ``--record RECORD``: what it prints is also kept in ``results/RECORD.json``."""
    benchmark = main.__module__.split(".")[-1]

    @functools.wraps(main)
    def run(argv: list[str]) -> int:
        if "--record" not in argv:
            return main(argv)
        place = argv.index("--record")
        name, rest = "".join(argv[place + 1 : place + 2]), argv[:place] + argv[place + 2 :]
        if not name.replace("_", "").isalnum():
            raise RunError("--record needs the name of a record in letters, digits and “_”, such as scfg_effect.")
        said = io.StringIO()
        with redirect_stdout(_Both(said)):
            code = main(rest)
        tables = tables_of(said.getvalue())
        if code or not tables:
            raise RunError("Nothing is recorded: the benchmark printed no table." if not code else "Nothing is recorded.")
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        record = Record(" ".join(["python3 run.py bench", benchmark, *map(_quoted, rest)]), _commit(), machine(), now, tables)
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        path.write_text(dumped(record), encoding="utf-8")
        print(f"recorded in {path.relative_to(ROOT).as_posix()}; now run 'python3 run.py measurements'")
        return 0

    return run


class _Both(io.TextIOBase):
    """Writes to the screen and to a copy."""

    def __init__(self, copy: io.StringIO):
        self.screen, self.copy = sys.stdout, copy

    def write(self, text: str) -> int:
        self.copy.write(text)
        return self.screen.write(text)

    def flush(self) -> None:
        self.screen.flush()


def _quoted(argument: str) -> str:
    return f'"{argument}"' if set(argument) & set(" *") else argument


def _commit() -> str:
    def git(*arguments: str) -> str:
        made = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return made.stdout.strip() if not made.returncode else ""

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") + changed) or "unknown"


def machine() -> str:
    """The GPU if there is one, else the number of processor cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores ({platform.machine()}), torch {torch.__version__}"
