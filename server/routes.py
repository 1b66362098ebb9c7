"""What the pack's part in the browser asks the server: routes under ``/attune``, and what nodes tell their widgets.

A route answers what it cannot do with status 400 and ``{"error": "a sentence"}``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from ..language.decompose import Branches, decompose, place
from ..language.words import Words
from . import layouts
from . import previews as live

LONGEST = 20_000  # characters of a text


# --- what nodes tell their widgets ------------------------------------------------------------------------------------


def words(found: Words) -> dict[str, Any]:
    """The ``ui`` of Prompt Words: every word with its columns in every text encoder, and the chosen phrases."""
    every = [{"text": w.text, "encoders": {name: list(columns) for name, columns in w.encoders.items()}} for w in found.words]
    chosen = [p.text for p in found.phrases]
    return {"attune_words": [{"text": found.text, "words": every, "phrases": chosen, "encoders": list(found.counts)}]}


def branches(found: Branches, remove_then_add: bool) -> dict[str, Any]:
    """The ``ui`` of Decompose Prompt: the branches, and all but a base that is the prompt itself as manual takes them."""
    every = [
        {"subject": ", ".join(map(place, b.subjects)) or "*", "text": " ".join(b.text.split()), "added": list(b.added)}
        for b in found.branches
    ]
    return {"attune_branches": [{"prompt": found.prompt, "branches": every, "base_in_manual": not remove_then_add}]}


# --- routes -----------------------------------------------------------------------------------------------------------


@cache
def _demo() -> dict[str, Any]:
    from ..demo import model

    return layouts.of_config(model.Shapes, model.UNET_CONFIG, "Demo model")


def _value(body: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A field of a request.

    Raises:
        ValueError: when it is missing, of another type or too long.
    """
    value = body.get(name, default)
    if not isinstance(value, kind):
        raise ValueError(f"“{name}” must be {'a text' if kind is str else 'true or false'}.")
    if isinstance(value, str) and len(value) > LONGEST:
        raise ValueError(f"“{name}” is longer than {LONGEST} characters; shorten it.")
    return value


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


def ask_layout(body: Mapping[str, Any]) -> dict[str, Any]:
    """``{"preset": name}`` or ``{"folder": folder, "file": name}`` to a layout (`layouts.layout`).

    A file that is there and does not tell is no wrong question: the answer is ``{"untold": "a sentence"}``.
    """
    if "preset" in body:
        name = _value(body, "preset", str)
        return _demo() if name == "demo" else layouts.preset(name)
    try:
        return layouts.of_file(_value(body, "folder", str), _value(body, "file", str))
    except layouts.UntoldError as error:
        return {"untold": _sentence(error)}


def ask_decompose(body: Mapping[str, Any]) -> dict[str, Any]:
    """Decompose Prompt's inputs to what `branches` tells."""
    remove_then_add = _value(body, "remove_then_add", bool, True)
    found = decompose(
        _value(body, "text", str),
        _value(body, "granularity", str, "attribute"),
        _value(body, "order", str, "simple first"),
        remove_then_add,
        _value(body, "manual", str, ""),
    )
    return branches(found, remove_then_add)["attune_branches"][0]


def ask_live(body: Mapping[str, Any]) -> dict[str, Any]:
    """An editor's wish to see maps while they form, or not."""
    live.listen(_value(body, "client", str), _value(body, "on", bool))
    return {}


ROUTES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "/attune/layout": ask_layout,
    "/attune/decompose": ask_decompose,
    "/attune/live": ask_live,
}


def answer(ask: Callable[[Mapping[str, Any]], dict[str, Any]], body: Any) -> tuple[dict[str, Any], int]:
    """A route's answer and status."""
    try:
        if not isinstance(body, dict):
            raise ValueError("the request is not a JSON object.")
        return ask(body), 200
    except (ValueError, RuntimeError) as error:
        return {"error": _sentence(error)}, 400


def register() -> None:
    """Add the routes to ComfyUI's server, where there is one."""
    try:
        from aiohttp import web

        from server import PromptServer
    except ImportError:  # used from Python
        return
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    def route(ask: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Callable[[Any], Any]:
        async def respond(request: Any) -> Any:
            try:
                body = await request.json()
            except ValueError:
                body = None
            found, status = await asyncio.get_running_loop().run_in_executor(None, answer, ask, body)
            return web.json_response(found, status=status)

        return respond

    for path, ask in ROUTES.items():
        server.routes.post(path)(route(ask))
