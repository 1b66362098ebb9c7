"""Nodes' help pages: in the language that the editor asks for first, or else in English, so that no question of its fails."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

WEB = Path(__file__).parent.parent / "web"
PAGE = "docs/{node:[A-Za-z]+}/{language:[A-Za-z-]+}.md"  # nothing that leads out of the folder


async def page(request: Any) -> Any:
    """``<node>/<language>.md``, or ``<node>.md``, which is English."""
    from aiohttp import web

    node, language = request.match_info["node"], request.match_info["language"]
    for path in (WEB / "docs" / node / f"{language}.md", WEB / "docs" / f"{node}.md"):
        if path.is_file():
            return web.FileResponse(path, headers={"Content-Type": "text/markdown; charset=utf-8"})
    raise web.HTTPNotFound


def names() -> list[str]:
    """What ComfyUI serves the pack's ``web`` folder as; names that are no plain part of an address are left to ComfyUI."""
    known = getattr(sys.modules.get("nodes"), "EXTENSION_WEB_DIRS", {})  # of ComfyUI's module, if ComfyUI runs
    return [
        name for name, folder in known.items() if re.fullmatch(r"[\w.-]+", name) and Path(folder).resolve() == WEB.resolve()
    ]


def add_pages(table: Any, known: list[str]) -> None:
    """Add the pages to a table of aiohttp's, which comes before ComfyUI's own folders."""
    for name in known:
        table.get(f"/extensions/{name}/{PAGE}")(page)
