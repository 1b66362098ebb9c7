"""Every template as the editor opens it, on the canvas and in Nodes 2.0: readable, nothing over another, all in its group, also after a run."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from attune.tests.helpers import EXAMPLES
from attune.tools import templates
from attune.tools.runtime.setup import ROOT

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, templates.BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on this machine")
SCREENS = ((1600, 1000), (1920, 1080))
FOLDERS = {
    "CheckpointLoaderSimple": "checkpoints",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "VAELoader": "vae",
}
AROUND = (60, 80)  # the editor's own bars at the left and the top, in pixels of the screen


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes2"])
def page(server, request) -> Iterator:
    """The editor in one of its two modes; small, since a browser without a graphics card draws slowly."""
    templates.prepare(server)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.vue, page.errors = request.param, []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_function(templates.READY)
        page.evaluate(templates.SET, {templates.VUE: page.vue})
        yield page
        page.evaluate(templates.SET, {templates.VUE: False})
        browser.close()


def over(nodes: list[dict]) -> list[tuple]:
    """Pairs of nodes of which one covers a part of the other."""
    boxes = [(n["type"], *n["box"]) for n in nodes if n["box"]]
    apart = lambda a, b: a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1] or a[2] + a[4] <= b[2] or b[2] + b[4] <= a[2]  # noqa: E731
    return [(a[0], b[0]) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if not apart(a, b)]


def outside(nodes: list[dict], groups: list[list[float]]) -> list[str]:
    """Nodes that lie in none of the groups."""
    holds = lambda g, b: (  # noqa: E731
        g[0] <= b[0] and g[1] <= b[1] and b[0] + b[2] <= g[0] + g[2] + 1 and b[1] + b[3] <= g[1] + g[3] + 1
    )
    return [n["type"] for n in nodes if n["box"] and not any(holds(g, n["box"]) for g in groups)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_template_opens_readable(path: Path, page):
    address = f"/api/workflow_templates/{ROOT.name}/{path.name}"  # as the editor gets it
    graph = page.evaluate("async (address) => (await fetch(address)).json()", address)
    page.evaluate(templates.OPEN, [graph, page.vue])
    found = page.evaluate(templates.BOXES, page.vue)
    assert sorted(n["type"] for n in found["nodes"]) == sorted(n["type"] for n in graph["nodes"])
    assert found["unknown"] == [] and found["warnings"] == 0
    assert found["text"] and found["scale"] >= 0.7
    assert len(found["groups"]) >= 3
    assert over(found["nodes"]) == []
    assert outside(found["nodes"], found["groups"]) == []
    note = next(n for n in found["nodes"] if n["type"] == "MarkdownNote")
    model = next(n for n in found["nodes"] if n["type"] in ("AttuneDemoModel", "CheckpointLoaderSimple", "UNETLoader"))
    for n in (note, model):
        x, y, wide, high = n["box"]
        left, top = ((v + o) * found["scale"] for v, o in zip((x, y), found["offset"], strict=True))
        for screen in SCREENS:
            assert left >= AROUND[0] and top >= AROUND[1]
            assert left + wide * found["scale"] <= screen[0] and top + min(high, 200) * found["scale"] <= screen[1]
    assert page.errors == []


def test_nodes_that_grow_in_a_run_have_room(page, server):
    path = next(path for path in EXAMPLES if path.stem == "09 Three methods together")
    graph = json.loads(path.read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 2  # steps
        if node["type"] == "EmptyLatentImage":
            node["widgets_values"][2] = 1  # pictures
    page.evaluate(templates.OPEN, [graph, page.vue])
    known = set(server.get("/history"))
    page.evaluate("() => window.comfyAPI.app.app.queuePrompt(0, 1)")
    deadline = time.monotonic() + 120
    while not (done := [h for k, h in server.get("/history").items() if k not in known]):
        assert time.monotonic() < deadline, "the run did not end"
        page.wait_for_timeout(200)
    assert done[0]["status"]["status_str"] == "success", done[0]["status"]
    page.wait_for_timeout(500)  # pictures come
    found = page.evaluate(templates.BOXES, page.vue)
    assert over(found["nodes"]) == []
    assert outside(found["nodes"], found["groups"]) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_template_has_a_thumbnail_and_offers_its_files(path: Path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert max(picture.size) / min(picture.size) < 3.5
    assert path.with_suffix(".jpg").stat().st_size < 60_000
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        files = [value for value in node.get("widgets_values", []) if str(value).endswith(".safetensors")]
        known = {m["name"]: m for m in node["properties"].get("models", [])}
        assert sorted(files) == sorted(known)
        for name, model in known.items():
            assert re.fullmatch(rf"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/(.*/)?{re.escape(name)}", model["url"])
            assert model["directory"] == FOLDERS[node["type"]]
