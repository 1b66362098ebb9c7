"""What the pack's part in the browser asks the server: routes under ``/attune``.

A route answers what it cannot do with status 400 and ``{"error": "a sentence"}``. A client's questions are answered one at a time, and
one whose client has left is given up.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from ..language.decompose import decompose, order_of
from .help import add_pages, names
from .layouts import UntoldError, of_config, of_file, preset
from .previews import listen
from .widgets import branches_told

LONGEST = 20_000  # characters of a text
Check = Callable[[], None]  # raises `Gone` when nobody waits for the answer any more
Ask = Callable[[Mapping[str, Any], Check], dict[str, Any]]


class Gone(RuntimeError):
    """Nobody waits for the answer."""


@cache
def _demo() -> dict[str, Any]:
    from ..demo import checkpoint, model

    return of_config(checkpoint.Small, model.ARCHITECTURE.unet_config, "Demo model")


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


def ask_layout(body: Mapping[str, Any], check: Check) -> dict[str, Any]:
    """``{"preset": name}`` or ``{"folder": folder, "file": name}`` to a layout (`layouts.layout`).

    A file that is there and does not tell is no wrong question: the answer is ``{"untold": "a sentence"}``.
    """
    if "preset" in body:
        name = _value(body, "preset", str)
        return _demo() if name == "demo" else preset(name)
    try:
        return of_file(_value(body, "folder", str), _value(body, "file", str))
    except UntoldError as error:
        return {"untold": _sentence(error)}


def ask_decompose(body: Mapping[str, Any], check: Check) -> dict[str, Any]:
    """Decompose Prompt's inputs to what `branches_told` tells."""
    order = order_of(_value(body, "order", str, "complex first"), _value(body, "remove_then_add", bool, False))
    found = decompose(
        _value(body, "text", str),
        granularity=_value(body, "granularity", str, "attribute"),
        order=order,
        sort=_value(body, "sort", str, "as written"),
        manual=_value(body, "manual", str, ""),
        check=check,
    )
    return branches_told(found, order)["attune_branches"][0]


def ask_live(body: Mapping[str, Any], check: Check) -> dict[str, Any]:
    """An editor's wish to see maps while they form, or not."""
    listen(_value(body, "client", str), _value(body, "on", bool))
    return {}


ROUTES: dict[str, Ask] = {
    "/attune/layout": ask_layout,
    "/attune/decompose": ask_decompose,
    "/attune/live": ask_live,
}


def answer(ask: Ask, body: Any, check: Check = lambda: None) -> tuple[dict[str, Any], int]:
    """A route's answer and status."""
    try:
        if not isinstance(body, dict):
            raise ValueError("the request is not a JSON object.")
        return ask(body, check), 200
    except (ValueError, RuntimeError, OSError) as error:
        return {"error": _sentence(error)}, 400
    except Exception as error:  # a mistake of ours: the log has it all, the editor a sentence
        logging.exception("Attune: a request of the editor failed")
        return {"error": f"This request failed ({type(error).__name__}: {error}); ComfyUI's log says where."}, 400


def has_home(origin: str | None) -> bool:
    """Whether a request's ``Origin`` names a site, which ComfyUI then compares with its own; programs send none.

    A page without one (sandboxed, or a file) says ``null`` and could be anybody's.
    """
    if origin is None:
        return True
    try:
        return bool(urlsplit(origin).hostname)
    except ValueError:
        return False


async def body_of(request: Any) -> Any:
    """The JSON of a request.

    Raises:
        ValueError: when it is none that can be read.
    """
    try:
        return json.loads(await request.text())
    except RecursionError:
        raise ValueError("the request is nested too deeply.") from None
    except LookupError:
        raise ValueError(f"the request is in a character set that is not known: “{request.charset}”.") from None
    except ValueError:
        raise ValueError("the request is not a JSON object.") from None


def handler(ask: Ask, turns: WeakValueDictionary[str, asyncio.Lock]) -> Callable[[Any], Any]:
    """A route's handler; ``turns`` has a lock for every client that asks."""
    from aiohttp import web

    async def respond(request: Any) -> Any:
        if not has_home(request.headers.get("Origin")):
            return web.json_response({"error": "Pages that do not say where they are from cannot ask Attune."}, status=403)
        try:
            body = await body_of(request)
        except ValueError as error:
            return web.json_response({"error": _sentence(error)}, status=400)
        client = str(request.remote)
        async with turns.setdefault(client, asyncio.Lock()):
            found, status = await _answer_while_there(request, ask, body)
        return web.json_response(found, status=status)

    return respond


async def _answer_while_there(request: Any, ask: Ask, body: Any) -> tuple[dict[str, Any], int]:
    """The answer of a thread, which is told to stop when the client leaves."""
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Gone("nobody waits for the answer any more.")

    if request.transport is None:  # it has left while it waited for its turn
        return {"error": "Nobody waits for the answer any more."}, 400
    work = asyncio.get_running_loop().run_in_executor(None, answer, ask, body, check)
    try:
        while not work.done():
            await asyncio.wait({work}, timeout=0.2)
            if request.transport is None or request.transport.is_closing():
                stop.set()
        return work.result()
    finally:
        stop.set()


def add_routes(table: Any) -> None:
    """Add the routes to a table of aiohttp's."""
    turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
    for path, ask in ROUTES.items():
        table.post(path)(handler(ask, turns))


def register() -> None:
    """Add the routes to ComfyUI's server, where there is one."""
    try:
        from server import PromptServer
    except ImportError:  # used from Python
        return
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        add_routes(server.routes)
        add_pages(server.routes, names())
