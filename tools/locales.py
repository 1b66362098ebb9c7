"""The words that ComfyUI's frontend shows for the nodes: ``locales/en`` is written from the schemas, other languages are checked against it."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "locales"


def key(name: str) -> str:
    """A name as a key of the frontend's translations, in which a dot is a path."""
    return name.replace(".", "_")


def schemas() -> dict[str, Any]:
    """Every node's words: display name, description, and of inputs and outputs the name and the tooltip."""
    from ..nodes import Attune

    nodes: dict[str, Any] = {}
    for cls in asyncio.run(Attune().get_node_list()):
        schema = cls.GET_SCHEMA()
        nodes[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {key(i.id): _words(i.display_name or i.id, i.tooltip) for i in schema.inputs},
            "outputs": {str(n): _words(o.display_name or o.id, o.tooltip) for n, o in enumerate(schema.outputs)},
        }
    return nodes


def settings() -> dict[str, Any]:
    """The words of the settings that the browser side registers."""
    text = (ROOT / "web" / "live.js").read_text(encoding="utf-8")
    identity = re.search(r'const SETTING = "([^"]+)"', text)
    name, tooltip = re.search(r'name: "([^"]+)",\n\s+tooltip: "([^"]+)",\n\s+category', text).groups()  # type: ignore[union-attr]
    assert identity
    return {key(identity[1]): {"name": name, "tooltip": tooltip}}


def _words(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name} | ({"tooltip": tooltip} if tooltip else {})


def load(language: str, file: str) -> dict[str, Any]:
    """One file of a language, such as ``nodeDefs``; empty where there is none."""
    path = FOLDER / language / f"{file}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """A tree's texts by their path."""
    return {
        place: text
        for name, branch in tree.items()
        for place, text in (leaves(branch, (*path, name)) if isinstance(branch, dict) else {(*path, name): branch}).items()
    }


def main(arguments: list[str]) -> int:
    """Write the English words, and say what another language has too little or too much of."""
    for file, words in (("nodeDefs", schemas()), ("settings", settings())):
        path = FOLDER / "en" / f"{file}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(words, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for other in sorted(p.name for p in FOLDER.iterdir() if p.is_dir() and p.name != "en"):
            there, here = leaves(load(other, file)), leaves(words)
            for place in sorted(here.keys() ^ there.keys()):
                print(f"{other}/{file}: {'missing' if place in here else 'no longer there'}: {'.'.join(place)}")
    print(f"wrote {(FOLDER / 'en').relative_to(ROOT)}")
    return 0
