"""Every template as the editor opens it, on the canvas and in Nodes 2.0: readable, nothing over another, all in its group, also after a run."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from attune.tests.helpers import EXAMPLES, SHORTER, outside, over, without_their_files
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
GROWING = ("01", "07", "09")  # all others too, on the canvas, where they are run (test_examples)
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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_template_opens_readable(path: Path, page, info):
    address = f"/api/workflow_templates/{ROOT.name}/{path.name}"  # as the editor gets it
    graph = page.evaluate("async (address) => (await fetch(address)).json()", address)
    page.evaluate(templates.OPEN, [graph, page.vue])
    found = page.evaluate(templates.BOXES, page.vue)
    assert sorted(n["type"] for n in found["nodes"]) == sorted(n["type"] for n in graph["nodes"])
    assert found["unknown"] == [] and found["warnings"] == 0
    assert set(found["faulty"]) <= without_their_files(path, info)
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


@pytest.mark.parametrize("number", GROWING)
def test_nodes_that_grow_in_a_run_have_room(number: str, page, server):
    path = next(path for path in EXAMPLES if path.stem.startswith(number))
    graph = json.loads(path.read_text(encoding="utf-8"))
    page.evaluate(templates.OPEN, [graph, page.vue])
    page.evaluate(SHORTER, 1)
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
