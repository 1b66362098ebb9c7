"""Lays out the templates of ``example_workflows`` for the canvas and for Nodes 2.0: left to right, in groups, readable when opened."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import Any

from .runtime.server import Server
from .runtime.setup import ROOT, Runtime, comfyui_folder

FOLDER = ROOT / "example_workflows"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Until the editor has opened the workflow that it begins with: one that is opened before is closed again.
READY = """() => {
    const app = window.comfyAPI?.app?.app, ours = window.LiteGraph?.registered_node_types?.AttuneSoftPAG
    return Boolean(ours && app?.canvas?.graph && app.extensionManager?.workflow?.activeWorkflow)
}"""
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en", "Comfy.Workflow.ShowMissingModelsWarning": False}
VUE = "Comfy.VueNodes.Enabled"
SET = """async (all) => { for (const [name, value] of Object.entries(all))
    await window.comfyAPI.app.app.extensionManager.setting.set(name, value) }"""

# Opens a graph and waits until it is drawn; in Nodes 2.0 every node is then an element of the page.
OPEN = """async ([graph, vue]) => {
    const app = window.comfyAPI.app.app
    await app.loadGraphData(graph)
    const pause = () => new Promise((done) => setTimeout(done, 50))
    const drawn = () => !vue || app.graph.nodes.every((n) => document.querySelector(`[data-node-id="${n.id}"]`)?.offsetHeight)
    for (let n = 0; n < 100 && !drawn(); n++) await pause()
    for (let n = 0; n < 3; n++) await new Promise((done) => requestAnimationFrame(done))
}"""
# What every node covers, its title too, in the graph's pixels; the scale, and whether text is drawn at it.
BOXES = """(vue) => {
    const app = window.comfyAPI.app.app, { scale, offset } = app.canvas.ds, at = app.canvas.canvas.getBoundingClientRect()
    const box = (n) => {
        if (!vue) return [...n.getBounding()].slice(0, 4)
        const r = document.querySelector(`[data-node-id="${n.id}"]`)?.getBoundingClientRect()
        return r && [(r.x - at.x) / scale - offset[0], (r.y - at.y) / scale - offset[1], r.width / scale, r.height / scale]
    }
    return {
        scale, offset: [...offset], text: !app.canvas.low_quality,
        unknown: app.graph.nodes.filter((n) => !window.LiteGraph.registered_node_types[n.type]).map((n) => n.type),
        faulty: app.graph.nodes.filter((n) => n.has_errors).map((n) => Number(n.id)),
        warnings: document.querySelectorAll(".comfy-missing-nodes").length,
        groups: app.graph._groups.map((g) => [...g._bounding]),
        nodes: app.graph.nodes.map((n) => ({ id: n.id, type: n.type, size: [...n.size], least: [...n.computeSize()], box: box(n) })),
    }
}"""

INPUTS, METHOD, DRAW, LOOK = range(4)
TITLES = ("1 Model and prompt", "2 What is changed", "3 Draw", "4 Look")
COLOURS = ("#3f5159", "#8a6d3b", "#3b5b8a", "#4b6b46")
STAGES = {
    **dict.fromkeys(("KSampler", "AttuneDetailSampler", "VAEDecode", "AttuneHeadHunter", "AttuneStructureRefine"), DRAW),
    **dict.fromkeys(("CFGGuider", "SamplerCustomAdvanced"), DRAW),
    **dict.fromkeys(("SaveImage", "PreviewImage", "PreviewAny", "MaskToImage", "AttuneShowMaps"), LOOK),
    **dict.fromkeys(("AttuneSegmentation", "AttuneScore", "AttuneSaveHeads", "ImageCompare"), LOOK),
    **dict.fromkeys(("CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "VAELoader", "AttuneDemoModel"), INPUTS),
    **dict.fromkeys(("PrimitiveStringMultiline", "CLIPTextEncode"), INPUTS),
    **dict.fromkeys(("EmptyLatentImage", "EmptySD3LatentImage", "EmptyFlux2LatentImage"), INPUTS),
    **dict.fromkeys(("RandomNoise", "KSamplerSelect", "Flux2Scheduler"), INPUTS),
    **dict.fromkeys(("AttuneWords", "FluxGuidance", "ConditioningZeroOut", "ModelSamplingAuraFlow"), INPUTS),
    **dict.fromkeys(("AttunePromptList", "AttuneDemoScorer", "MarkdownNote"), INPUTS),
}
FIRST = ("MarkdownNote", "AttuneDemoModel", "CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "VAELoader")
# What nodes show in addition when a picture forms or is done, or newer editors need for them: room below them, in pixels of the graph.
GROWTH = {
    **dict.fromkeys(("AttuneRegulation", "AttuneSemanticCFG", "AttuneAttentionMaps", "AttuneSemanticGate"), 260),
    **dict.fromkeys(("AttuneWords", "AttuneWordWeights"), 60),
    "AttuneFix": 420,
    "AttuneShowMaps": 310,
    "AttuneDetailSampler": 80,
    "AttuneHeadHunter": 80,
    "AttuneDecompose": 70,
    "AttuneHeads": 60,
    "AttunePromptList": 30,
    "SaveImage": 100,
    "PreviewAny": 130,
}
TITLE, GAP, SPACE, PADDING, HEAD, TALL = 30, 34, 70, 24, 56, 1240
NARROW = 240  # width below which no version of Nodes 2.0 draws a node
WIDE, WIDER, LONG = 360, 560, 600  # widths of the note, and of one with more characters than this
SCALE, OFFSET = 0.72, [110.0, 165.0]


def note_height(text: str, width: float) -> float:
    """The height in which a note's text is read without scrolling."""
    lines = sum(1 + int(len(line) * 6.4 / (width - 40)) for line in text.split("\n"))
    return 64 + 18 * lines


def stages(graph: dict[str, Any]) -> dict[int, int]:
    """Every node's group. None is to the left of what it needs; a text is shown beside what it comes from."""
    kinds = {n["id"]: n["type"] for n in graph["nodes"]}
    found = {i: STAGES.get(kind, METHOD) for i, kind in kinds.items()}
    sources = [(link[1], link[3]) for link in graph["links"]]
    for _ in kinds:
        for a, b in sources:
            found[b] = found[a] if kinds[b] == "PreviewAny" and found[a] == METHOD else max(found[a], found[b])
    return found


def columns(graph: dict[str, Any], members: list[int], heights: dict[int, float]) -> list[list[int]]:
    """A group's nodes in columns from left to right, each from top to bottom as they were."""
    rank = dict.fromkeys(members, 0)
    for _ in members:
        for _, a, _, b, *_ in graph["links"]:
            if a in rank and b in rank:
                rank[b] = max(rank[b], rank[a] + 1)
    first = {kind: n for n, kind in enumerate(FIRST)}  # read first, then from top to bottom as before
    order = {n["id"]: (first.get(n["type"], len(FIRST)), n["pos"][1], n["pos"][0], n["id"]) for n in graph["nodes"]}
    result = []
    for r in sorted(set(rank.values())):
        column: list[int] = []
        high = 0.0
        for i in sorted((i for i in members if rank[i] == r), key=lambda i: order[i]):
            if column and high + heights[i] > TALL:
                result.append(column)
                column, high = [], 0.0
            column.append(i)
            high += heights[i]
        result.append(column)
    return result


def arrange(graph: dict[str, Any], least: dict[int, tuple[float, float]]) -> None:
    """Place a template's nodes, its groups and the view, in place. ``least`` is each node's smallest width and height."""
    nodes = {n["id"]: n for n in graph["nodes"]}
    for i, n in nodes.items():
        wide, high = least[i]
        if n["type"] == "MarkdownNote":
            text = n["widgets_values"][0]
            wide = WIDE if len(text) <= LONG else WIDER
            n["size"] = [
                wide,
                round(max(high, note_height(text, wide) + 24 * text.count("|\n|"))),
            ]  # rows of a table are higher
        else:
            n["size"] = [round(max(n["size"][0], wide, NARROW)), round(max(n["size"][1] if "Image" in n["type"] else 0, high))]
    heights = {i: n["size"][1] + TITLE + GAP + GROWTH.get(n["type"], 0) for i, n in nodes.items()}
    group_of = stages(graph)
    graph["groups"] = []
    left = 0.0
    for stage, title in enumerate(TITLES):
        members = [i for i in nodes if group_of[i] == stage]
        if not members:
            continue
        x, bottom = left + PADDING, 0.0
        for column in columns(graph, members, heights):
            y = float(HEAD)
            wide = max(nodes[i]["size"][0] for i in column)
            for i in column:
                nodes[i]["pos"] = [round(x), round(y + TITLE)]
                y += heights[i]
            bottom = max(bottom, y - GAP)
            x += wide + SPACE
        right = x - SPACE + PADDING
        box = [round(left), 0, round(right - left), round(bottom + PADDING)]
        graph["groups"].append(
            {"id": stage + 1, "title": title, "bounding": box, "color": COLOURS[stage], "font_size": 24, "flags": {}}
        )
        left = right + SPACE
    graph["extra"] = {**graph.get("extra", {}), "ds": {"scale": SCALE, "offset": OFFSET}}


def measure(page: Any, graphs: list[dict[str, Any]]) -> list[dict[int, tuple[float, float]]]:
    """The smallest width and height of every node that both modes need, for each graph."""
    found: list[dict[int, tuple[float, float]]] = [{} for _ in graphs]
    for vue in (False, True):
        page.evaluate(SET, {VUE: vue})
        for graph, least in zip(graphs, found, strict=True):
            small = json.loads(json.dumps(graph))
            for n in small["nodes"]:
                n["size"][1] = 40
            page.evaluate(OPEN, [small, vue])
            for n in page.evaluate(BOXES, vue)["nodes"]:
                if not vue:
                    least[n["id"]] = tuple(n["least"])
                elif n["box"]:  # with its title; Nodes 2.0 scales widths and places by itself
                    wide, high = least[n["id"]]
                    least[n["id"]] = (wide, max(high, n["box"][3] - TITLE))
    return found


def prepare(server: Server) -> None:
    """Settings of a person who has been here before: no tour, no dialogs."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    body = json.dumps({**SETTINGS, VUE: False}).encode()
    direct.open(urllib.request.Request(f"{server.url}/settings", body, {"Content-Type": "application/json"}), timeout=30)


def main(arguments: list[str]) -> int:
    """Lay out the templates named, or all."""
    parser = argparse.ArgumentParser(prog="python3 run.py templates", description=__doc__)
    parser.add_argument("templates", nargs="*", type=Path, help="files (default: all of example_workflows)")
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each as the editor opens it, in both modes")
    options = parser.parse_args(arguments)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("This needs Playwright (pip install -r tools/runtime/requirements-test.txt) and Chromium or Chrome.")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    with Server(Runtime(Path(sys.executable), comfyui_folder()), cpu=True) as server, sync_playwright() as driver:
        prepare(server)
        page = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"]).new_page()
        page.goto(server.url, timeout=120_000)
        page.wait_for_function(READY, timeout=120_000)
        paths = options.templates or sorted(FOLDER.glob("*.json"))
        graphs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        for path, graph, least in zip(paths, graphs, measure(page, graphs), strict=True):
            arrange(graph, least)
            path.write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(path.name, flush=True)
        page.set_viewport_size({"width": 1600, "height": 1000})
        for vue in (False, True) if options.pictures else ():
            options.pictures.mkdir(parents=True, exist_ok=True)
            page.evaluate(SET, {VUE: vue})
            for path, graph in zip(paths, graphs, strict=True):
                page.evaluate(OPEN, [graph, vue])
                page.screenshot(path=options.pictures / f"{path.stem} {'nodes2' if vue else 'classic'}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
