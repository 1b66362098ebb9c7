"""Judge methods on a checkpoint: pictures at the same seeds with and without them, scores, and a report (PROVE.md)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths

from ..hunt.command import parse
from ..hunt.files import file_error, printable, write_whole
from ..hunt.head_files import PACK
from ..hunt.report import time_left
from .bench import Bench, Drawn
from .log import Log
from .methods import Loaded
from .report import html_of, markdown_of, merged, result_of, strip

PART = 64  # tasks that are handed out at once, times the batch: their stored pictures are in memory
BUILDER = f"{__name__}:bench_of"
Show = Callable[[int, int, float], None]


def log_path(name: str) -> Path:
    """Where a run keeps its pictures and scores."""
    return Path(folder_paths.get_user_directory()) / "attune" / "prove" / f"{name}.sqlite"


def bench_of(config: Mapping[str, Any]) -> Bench:
    """What a Ray worker makes from a config."""
    return Bench(config)


def run(
    config: Mapping[str, Any],
    show: Show | None = None,
    *,
    loaded: Loaded | None = None,
    identity: str = "",
    log_at: Path | None = None,
    preview: Path | None = None,
) -> tuple[Bench, Log]:
    """Draw and judge what is still to do; the log is left open for the report.

    Args:
        show: is told pictures done, all pictures, and seconds left.
        loaded, identity: as in `Bench`.
        preview: a PNG that is written every ``preview`` pictures: the newest prompt with each method.

    Raises:
        ValueError: for a config that does not fit, before a picture is drawn; and for a log that cannot be used.
    """
    made = Bench(config, loaded, identity)
    log = Log(log_at or log_path(made.config["name"]))
    workers = None
    try:
        todo, total = list(made.left(log)), len(made.tasks())
        if made.config["ray"] and todo:
            from ..hunt.cluster import Cluster

            options = dict(made.config["ray"])
            workers = Cluster(options.pop("address", "auto"), BUILDER, {**made.config, "ray": None}, **options)
        began, every = time.monotonic(), int(made.config["preview"])
        size = PART * made.config["batch"]
        finished = (
            rows for start in range(0, len(todo), size) for rows in _done(made, log, workers, todo[start : start + size])
        )
        count, where = 0, {made.key(task[:3]): task for task in todo}
        for rows in finished:
            comfy.model_management.throw_exception_if_processing_interrupted()
            before, count = count, count + len(rows)
            for one in rows:
                if one.picture is not None:
                    log.draw(one.key, *one.picture)
                for scorer, values in one.scores.items():
                    log.judge(one.key, scorer, values)
            if show is not None:
                show(total - len(todo) + count, total, (time.monotonic() - began) / count * (len(todo) - count))
            if preview is not None and every and (count // every > before // every or count == len(todo)):
                write_whole("prove", preview, strip(made, log, where[rows[-1].key]))
    except BaseException:
        log.close()
        raise
    finally:
        if workers is not None:
            workers.close()
    return made, log


def _done(made: Bench, log: Log, workers: Any, part: list[tuple[Any, ...]]) -> Iterator[list[Drawn]]:
    """Carry out some of what is to do; pictures that only lack scores are taken from the log."""
    whole = made.together([(m, i, s, log.picture(made.key((m, i, s))), wanted) for m, i, s, wanted in part])
    yield from (made.evaluate(*group) for group in whole) if workers is None else workers(whole)


def write(place: Path, name: str, result: Mapping[str, Any], gallery: Mapping[str, bytes]) -> list[Path]:
    """The report's three files."""
    parts = {
        ".json": json.dumps(result, ensure_ascii=False, indent=None, sort_keys=True),
        ".md": markdown_of(result),
        ".html": html_of(result, gallery),
    }
    for ending, text in parts.items():
        write_whole("prove", place / f"{name}{ending}", printable(text).encode())
    return [place / f"{name}{ending}" for ending in parts]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py prove", description=__doc__)
    parser.add_argument("config", type=Path, nargs="+", help="TOML or JSON (PROVE.md); with --merge, results of several runs")
    parser.add_argument("--merge", action="store_true", help="join results (.json) into one report")
    parser.add_argument("--smoke", action="store_true", help="a few prompts and one seed only, to see that everything is there")
    parser.add_argument("--output", type=Path, help="folder of the report (default: output)")
    args = parser.parse_args(argv)
    last = 0.0

    def show(done: int, total: int, left: float) -> None:
        nonlocal last
        if time.monotonic() - last > 5 or done == total:
            last = time.monotonic()
            print(f"{done} of {total} pictures{time_left(left)}", file=sys.stderr, flush=True)

    try:
        if args.merge:
            found = [_result(path) for path in args.config]
            paths = write(args.output or PACK / "output", "merged", merged(found), {})
        else:
            paths = []
            for path in args.config:
                config = dict(parse(path))
                if args.smoke:
                    config["suite"] = {**config.get("suite", {"name": "shapes"}), "smoke": True}
                    config["seeds"] = list(config.get("seeds", [0]))[:1]
                place = args.output or Path(config.get("output") or PACK / "output")
                name = str(config.get("name", "prove"))
                made, log = run(config, show, preview=place / f"{name}.preview.png")
                try:
                    result, gallery = result_of(made, log)
                finally:
                    log.close()
                paths += write(place, name, result, gallery)
                print(printable(markdown_of(result)))
    except ValueError as error:
        print(printable(f"{error}"), file=sys.stderr)
        return 1
    print("\n".join(map(str, paths)))
    return 0


def _result(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise file_error("prove", path, error) from None
    except ValueError as error:
        raise ValueError(
            f"prove: {path} is not a result of a run ({error}); give the .json files beside the reports."
        ) from None
