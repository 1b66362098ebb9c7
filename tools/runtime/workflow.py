"""Turns a workflow as the editor saves it into the prompt that ComfyUI's API takes, and checks both.

``info`` is everywhere what a server answers to ``/object_info``. Standard library only. Subgraphs are not supported.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import RunError

NOTES = {"Note", "MarkdownNote"}
VIRTUAL = NOTES | {"Reroute", "PrimitiveNode"}  # nodes that exist only in the editor
MUTED, BYPASSED = 2, 4
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEED_NAMES = {"seed", "noise_seed"}
SEED_CONTROLS = {"fixed", "increment", "decrement", "randomize"}
FILE_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".png", ".jpg", ".jpeg", ".webp")

Json = dict[str, Any]


def read(path: Path) -> Json:
    """A workflow file in the editor's format."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"The workflow {path} cannot be read ({(error.strerror or str(error)).lower()}).") from None
    except ValueError:
        raise RunError(f"The workflow {path} is not valid JSON.") from None
    if not isinstance(graph, dict) or "nodes" not in graph:
        raise RunError(f"{path} is not a workflow as ComfyUI's editor saves it (it has no list of nodes).")
    if (graph.get("definitions") or {}).get("subgraphs"):
        raise RunError(f"The workflow {path} has subgraphs, which this command cannot run: unpack them in the editor first.")
    return graph


def to_prompt(graph: Json, info: Json) -> Json:
    """The API's format of a workflow: every node that takes part, with its widgets' values and its links."""
    return _Converter(graph, info).prompt()


class _Converter:
    def __init__(self, graph: Json, info: Json) -> None:
        self.nodes: dict[int, Json] = {node["id"]: node for node in graph["nodes"]}
        self.links = {link[0]: link for link in _links(graph)}
        self.info = info

    def prompt(self) -> Json:
        result: Json = {}
        for number, node in self.nodes.items():
            kind = node["type"]
            if kind in VIRTUAL or node.get("mode") in (MUTED, BYPASSED):
                continue
            if kind not in self.info:
                raise RunError(f"The workflow needs the node '{kind}', which this ComfyUI does not have.")
            inputs = widget_values(node, self.info[kind])
            for slot in node.get("inputs") or []:
                if slot.get("link") is not None:
                    value = self._source(slot["link"])
                    inputs.pop(slot["name"], None) if value is None else inputs.__setitem__(slot["name"], value)
            title = node.get("title") or self.info[kind].get("display_name") or kind
            result[str(number)] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
        return result

    def _source(self, link: int) -> Any:
        """What a link brings: ``[node, slot]``, the value of a primitive node, or None if nothing arrives."""
        _, number, slot, *_ = self.links[link]
        node = self.nodes[number]
        mode = node.get("mode")
        if mode == MUTED:
            return None
        if node["type"] == "PrimitiveNode":
            return node["widgets_values"][0]
        if node["type"] == "Reroute" or mode == BYPASSED:
            through = _bypass(node, slot)
            return None if through is None else self._source(through)
        return [str(number), slot]


def _links(graph: Json) -> Iterator[tuple]:
    """Every link as (id, source node, source slot, target node, target slot, type), from either way of writing them."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    for link in graph.get("links") or []:
        yield tuple(link[name] for name in names) if isinstance(link, dict) else tuple(link)


def _bypass(node: Json, slot: int) -> int | None:
    """The link that a bypassed node passes on to one of its outputs: that of the first input of the same type."""
    inputs = node.get("inputs") or []
    if node["type"] == "Reroute":
        return inputs[0].get("link")
    wanted = node["outputs"][slot]["type"]
    candidates = [*inputs[slot : slot + 1], *inputs]
    return next((entry["link"] for entry in candidates if entry["type"] == wanted and entry.get("link") is not None), None)


def specs(info: Json) -> dict[str, list]:
    """A node's inputs in the order of its widgets: name to ``[type, options]``."""
    found: dict[str, list] = {}
    for group in ("required", "optional"):
        entries = info["input"].get(group) or {}
        order = (info.get("input_order") or {}).get(group) or entries
        found |= {name: entries[name] for name in order}
    return found


def _options(spec: list) -> Json:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def _choices(spec: list) -> list | None:
    if isinstance(spec[0], list):
        return spec[0]
    return _options(spec).get("options", []) if spec[0] == "COMBO" else None


def widget_values(node: Json, info: Json) -> Json:
    """A node's widgets by name. The editor saves a bare list, in which some widgets have an extra value behind theirs."""
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        return {name: saved[name] for name in specs(info) if name in saved}
    values: Json = {}
    rest = list(saved)
    for name, spec in specs(info).items():
        options = _options(spec)
        if not (isinstance(spec[0], list) or spec[0] in WIDGET_TYPES) or options.get("forceInput"):
            continue
        if not rest:
            break
        values[name] = rest.pop(0)
        has_control = options.get("control_after_generate") or name in SEED_NAMES
        if rest and ((has_control and rest[0] in SEED_CONTROLS) or options.get("image_upload")):
            rest.pop(0)
    return values


def check(prompt: Json, info: Json) -> list[str]:
    """What is wrong with a prompt, in words: node classes, input names, links and values. Empty when nothing is.

    A file that a loader names and this machine does not have is no fault of the workflow: see `missing_files`.
    """
    problems: list[str] = []
    for number, node in prompt.items():
        where = f"{node['class_type']} (node {number})"
        if node["class_type"] not in info:
            problems.append(f"{where}: there is no such node")
            continue
        known = specs(info[node["class_type"]])
        required = info[node["class_type"]]["input"].get("required") or {}
        problems += [f"{where}: the input '{name}' is missing" for name in required if name not in node["inputs"]]
        for name, value in node["inputs"].items():
            if name not in known:
                problems.append(f"{where}: there is no input '{name}'")
            elif wrong := _wrong_link(value, known[name], prompt, info) if is_link(value) else _wrong_value(value, known[name]):
                problems.append(f"{where}: '{name}' {wrong}")
    return problems


def is_link(value: Any) -> bool:
    """Whether an input's value is ``[node, slot]``."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _wrong_link(value: list, spec: list, prompt: Json, info: Json) -> str | None:
    source = prompt.get(value[0])
    outputs = info.get(source["class_type"], {}).get("output", []) if source else []
    if value[1] >= len(outputs):
        return f"is linked to output {value[1]} of node {value[0]}, which does not exist"
    given, taken = outputs[value[1]], spec[0]
    if not isinstance(given, str) or not isinstance(taken, str) or "*" in (given, taken):
        return None
    return None if set(given.split(",")) & set(taken.split(",")) else f"takes {taken} and is linked to {given}"


def _wrong_value(value: Any, spec: list) -> str | None:
    options, choices = _options(spec), _choices(spec)
    if choices is not None:
        return None if value in choices or _is_file(value) else f"is {value!r}, which is none of its choices"
    if spec[0] in ("INT", "FLOAT"):
        if isinstance(value, bool) or not isinstance(value, int if spec[0] == "INT" else (int, float)):
            return f"is {value!r}, which is no {spec[0]}"
        if not options.get("min", value) <= value <= options.get("max", value):
            return f"is {value}, outside {options.get('min')} to {options.get('max')}"
        return None
    expected = {"STRING": str, "BOOLEAN": bool}.get(spec[0])
    return f"is {value!r}, which is no {spec[0]}" if expected and not isinstance(value, expected) else None


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and value.lower().endswith(FILE_SUFFIXES)


def missing_files(prompt: Json, info: Json) -> list[str]:
    """The files (checkpoints, pictures…) that a prompt names and this ComfyUI does not have."""
    missing = []
    for node in prompt.values():
        known = specs(info.get(node["class_type"], {"input": {}}))
        for name, value in node["inputs"].items():
            choices = _choices(known[name]) if name in known else None
            if choices is not None and _is_file(value) and value not in choices:
                missing.append(value)
    return missing


def check_graph(graph: Json) -> list[str]:
    """Whether a saved workflow agrees with itself, as the editor expects it: ids, links, and both of their ends."""
    problems: list[str] = []
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in _links(graph)}
    if len(nodes) < len(graph["nodes"]) or len(links) < len(graph.get("links") or []):
        problems.append("an id is used twice")
    if graph.get("last_node_id", 0) < max(nodes, default=0) or graph.get("last_link_id", 0) < max(links, default=0):
        problems.append("last_node_id or last_link_id is too small")
    for number, source, source_slot, target, target_slot, _ in links.values():
        try:
            if number not in (nodes[source]["outputs"][source_slot]["links"] or []):
                problems.append(f"link {number} is not listed by its source, node {source}")
            if nodes[target]["inputs"][target_slot]["link"] != number:
                problems.append(f"link {number} is not listed by its target, node {target}")
        except (KeyError, IndexError):
            problems.append(f"link {number} leads to a node or slot that does not exist")
    named = {slot["link"] for node in nodes.values() for slot in node.get("inputs") or [] if slot.get("link") is not None}
    named |= {link for node in nodes.values() for slot in node.get("outputs") or [] for link in slot.get("links") or []}
    problems += [f"link {number} is named by a node but not in the list of links" for number in sorted(named - set(links))]
    return problems


def positive_texts(prompt: Json) -> list[str]:
    """The nodes that hold the text of the positive prompt: those with a ``text``, upstream of any ``positive`` input."""
    found: list[str] = []
    waiting = [node["inputs"]["positive"][0] for node in prompt.values() if is_link(node["inputs"].get("positive"))]
    seen: set[str] = set()
    while waiting:
        number = waiting.pop()
        if number in seen or number not in prompt:
            continue
        seen.add(number)
        inputs = prompt[number]["inputs"]
        if isinstance(inputs.get("text"), str):
            found.append(number)
        elif is_link(inputs.get("positive")):
            waiting.append(inputs["positive"][0])  # a node that passes both conditionings on, such as a ControlNet's
        else:
            waiting += [value[0] for value in inputs.values() if is_link(value)]
    return found


def with_text_and_seed(prompt: Json, text: str | None, seed: int) -> Json:
    """A copy of a prompt with another positive text (unless None) and every seed replaced."""
    changed = copy.deepcopy(prompt)
    if text is not None:
        for number in positive_texts(changed):
            changed[number]["inputs"]["text"] = text
    for node in changed.values():
        for name in SEED_NAMES & set(node["inputs"]):
            if isinstance(node["inputs"][name], int):
                node["inputs"][name] = seed
    return changed
