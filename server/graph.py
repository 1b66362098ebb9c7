"""The workflow that runs now: which node executes, what a node depends on, and what a node says on itself in the editor."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

Prompt = Mapping[str, Any]  # ComfyUI's: node id -> {"class_type", "inputs"}
Origin = tuple[str | None, str | None]  # a node and its lineage; None outside a workflow


def server() -> Any:
    """ComfyUI's server, or None where there is none: used from Python."""
    try:
        from server import PromptServer

        return getattr(PromptServer, "instance", None)
    except ImportError:
        return None


def _context() -> Any:
    try:
        from comfy_execution.utils import get_executing_context

        return get_executing_context()
    except ImportError:  # an older ComfyUI
        return None


def executing() -> str | None:
    """The node that ComfyUI executes now: the sampler, while a method's callbacks run."""
    context = _context()
    return None if context is None else context.node_id


def prompt() -> dict[str, Any]:
    """The workflow that runs now; empty where there is no server."""
    context, running = _context(), server()
    if context is None or running is None:
        return {}
    queue = running.prompt_queue  # the older of the two copies everything that waits
    items = getattr(queue, "get_current_queue_volatile", queue.get_current_queue)()[0]
    return next((item[2] for item in items if item[1] == context.prompt_id), {})


def upstream(graph: Prompt, node: str) -> set[str]:
    """``node`` and everything that it depends on."""
    found, waiting = set(), [node]
    while waiting:
        name = waiting.pop()
        if name in found or name not in graph:
            continue
        found.add(name)
        waiting += [v[0] for v in graph[name].get("inputs", {}).values() if isinstance(v, list) and len(v) == 2]
    return found


def lineage(graph: Prompt, node: str) -> str:
    """A digest of a node and of everything that it depends on: equal digests make equal outputs."""
    parts = {name: [graph[name].get("class_type"), graph[name].get("inputs")] for name in sorted(upstream(graph, node))}
    return hashlib.sha256(json.dumps([node, parts], sort_keys=True, default=str).encode()).hexdigest()


def origin() -> Origin:
    """The node that executes now and its lineage; twice None where there is no workflow."""
    node, graph = executing(), prompt()
    return (node, lineage(graph, node)) if node in graph else (None, None)


def made_by(graph: Prompt | None, node: str | None, name: str = "image") -> set[Origin] | None:
    """The nodes, with their lineages, that may have made what comes into input ``name`` of ``node``; None without a workflow."""
    if graph is None or node is None or node not in graph:
        return None
    link = graph[node]["inputs"].get(name)
    above = upstream(graph, link[0]) if isinstance(link, list) else set()
    return {(n, lineage(graph, n)) for n in above}


def prompt_text(graph: Prompt, node: str) -> str | None:
    """The text of the positive prompt that a sampler gets, if a node above it has one."""
    seen: set[str] = set()
    while node in graph and node not in seen:
        seen.add(node)
        inputs = graph[node].get("inputs", {})
        texts = [inputs.get(name) for name in ("text", "string", "value")]
        written = next((t for t in texts if isinstance(t, str)), None)
        if written is not None:
            return written
        names = ("text", "positive", "guider", "conditioning", "conditioning_to", "conditioning_1", "string")
        link = next((inputs[name] for name in names if isinstance(inputs.get(name), list)), None)
        if link is None:
            return None
        node = link[0]
    return None


def tell(node: str | None, text: str) -> None:
    """Say something on a node in the editor, and in the log."""
    logging.info("Attune: %s", text)
    running = server()
    if node is not None and hasattr(running, "send_progress_text"):  # not in an older ComfyUI
        running.send_progress_text(text, node)


def tell_effect(node: str | None, missing: str | None) -> None:
    """Tell the editor that has started the workflow why a node has no effect, or by None that it had one.

    A model may be sampled more than once in a workflow, which one effect is enough for, so its name goes along.
    """
    running, context = server(), _context()
    if node is not None and context is not None and running is not None and running.client_id is not None:
        running.send_sync("attune.effect", {"node": node, "prompt": context.prompt_id, "missing": missing}, running.client_id)
