"""The main job: makes the pictures of a workflow with a real ComfyUI, for several prompts, and a grid that compares them."""

from __future__ import annotations

import argparse
import asyncio
import io
import re
import shutil
import sys
import textwrap
import time
from pathlib import Path

from PIL import Image

from . import RunError
from .bootstrap import has_accelerator
from .client import Client
from .pictures import grid
from .server import Server
from .setup import ROOT, Runtime, comfyui_folder
from .workflow import check, missing_files, positive_texts, read, to_prompt, with_text_and_seed

WORKFLOW = ROOT / "example_workflows" / "02 Clearer structure.json"
PROMPTS = (
    "a red striped star and a blue circle on a grey wall",
    "a small green ring above a white heart",
    "a yellow dotted square left of a purple triangle",
    "an orange checkered moon and a cyan cross on a black wall",
)


def main(arguments: list[str]) -> int:
    """Run the job as its options say."""
    parser = argparse.ArgumentParser(prog="python3 run.py demo", description=__doc__)
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="saved by the editor (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "output", help="folder for the pictures (default: %(default)s)")
    parser.add_argument("--prompt", action="append", dest="prompts", help="text to draw; repeat it for more rows in the grid")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first row; each further row takes the next")
    parser.add_argument("--port", type=int, help="port for ComfyUI on this machine (default: a free one)")
    options = parser.parse_args(arguments)

    began = time.monotonic()
    graph = read(options.workflow)
    print("Starting ComfyUI…", flush=True)
    runtime = Runtime(Path(sys.executable), comfyui_folder())
    with Server(runtime, cpu=not has_accelerator(), port=options.port) as server:
        print(f"ComfyUI is up at {server.url} after {time.monotonic() - began:.0f} s", flush=True)
        rows, columns = asyncio.run(_draw(server, graph, options.prompts or list(PROMPTS), options.seed))
    paths = _save(rows, columns, options.output)
    print(f"{len(paths) - 1} pictures are in {options.output}")
    print(f"Side by side: {paths[-1]}")
    print(f"Done in {time.monotonic() - began:.0f} s")
    return 0


Rows = list[tuple[str, list[list[bytes]]]]


async def _draw(server: Server, graph: dict, texts: list[str], seed: int) -> tuple[Rows, list[str]]:
    """Run the workflow once for each text; return rows of picture files, and the titles of the columns."""
    async with Client(server) as client:
        info = await client.info()
        prompt = to_prompt(graph, info)
        if problems := check(prompt, info):
            raise RunError(f"The workflow does not fit this ComfyUI: {'; '.join(problems)}.")
        if missing := missing_files(prompt, info):
            raise RunError(f"The workflow needs files that this ComfyUI does not have: {', '.join(missing)}.")
        takes_text = bool(positive_texts(prompt))
        rows: Rows = []
        kept: dict[str, list[bytes]] = {}
        for index, text in enumerate(texts if takes_text else ["the workflow as it is"]):
            progress = Progress(f"[{index + 1}/{len(texts) if takes_text else 1}] {text}", prompt)
            kept = await client.run(with_text_and_seed(prompt, text if takes_text else None, seed + index), progress.step)
            progress.end()
            kept = {number: files for number, files in sorted(kept.items(), key=lambda item: int(item[0])) if files}
            if not kept:
                raise RunError("The workflow ran, but it saved no pictures: it needs a Save Image node.")
            rows.append((f"{text}   (seed {seed + index})", list(kept.values())))
        return rows, [prompt[number]["_meta"]["title"] for number in kept]


class Progress:
    """One line that is rewritten at every step of a sampler; where output is no terminal, a line for each sampler."""

    def __init__(self, label: str, prompt: dict) -> None:
        self._label = label
        self._prompt = prompt
        self._live = sys.stdout.isatty()
        self._began = time.monotonic()
        self._show(label)

    def step(self, node: str, value: int, total: int) -> None:
        """Report a node's progress."""
        title = self._prompt.get(node, {}).get("_meta", {}).get("title", node)
        bar = ("#" * (20 * value // max(total, 1))).ljust(20, ".")
        if self._live or value == total:
            label = textwrap.shorten(self._label, 36, placeholder="…") if self._live else "     "
            self._show(f"{label}  {title} [{bar}] {value}/{total}")

    def end(self) -> None:
        """Leave the row's last word on the screen."""
        took = f"{time.monotonic() - self._began:.1f} s"
        self._show(f"{self._label}  {took}" if self._live else f"       {took}")
        if self._live:
            print()

    def _show(self, text: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + text[:width].ljust(width), end="", flush=True)
        else:
            print(text, flush=True)


def _save(rows: Rows, columns: list[str], folder: Path) -> list[Path]:
    """Save the pictures just as ComfyUI made them (its prompt is inside), then the grid."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for row, (_, cells) in enumerate(rows, 1):
        for title, cell in zip(columns, cells, strict=True):
            for index, data in enumerate(cell, 1):
                name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "picture"
                paths.append(folder / f"{row:02}-{name}-{index}.png")
                paths[-1].write_bytes(data)
    opened = [(text, [[Image.open(io.BytesIO(data)) for data in cell] for cell in cells]) for text, cells in rows]
    paths.append(folder / "grid.png")
    grid(opened, columns).save(paths[-1])
    return paths
