"""The real editor in a real browser: it opens every example, reads it as the server does, and runs it."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attune.tests.helpers import EXAMPLES, SHORTER, outside, over, without_their_files
from attune.tools import templates
from attune.tools.runtime.workflow import missing_files, read, specs, to_prompt

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on this machine")
OPEN = """async (graph) => {
    const app = window.comfyAPI.app.app
    await app.loadGraphData(graph)
    const { output } = await app.graphToPrompt()
    return {
        prompt: Object.fromEntries(Object.entries(output).map(([id, n]) => [id, { class_type: n.class_type, inputs: n.inputs }])),
        nodes: app.graph.nodes.map((n) => [String(n.id), n.type, Boolean(n.has_errors)]),
        outputs: Object.fromEntries(app.graph.nodes.map((n) => [n.id, (n.outputs ?? []).map((o) => o.type)])),
    }
}"""


@pytest.fixture(scope="module")
def page(server) -> Iterator:
    """The editor, loaded."""
    templates.prepare(server)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_function(templates.READY, timeout=120_000)
        yield page
        browser.close()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_editor_opens_an_example_and_reads_it_as_we_do(path: Path, page, info):
    graph = json.loads(path.read_text(encoding="utf-8"))
    opened = page.evaluate(OPEN, graph)
    assert sorted(n[:2] for n in opened["nodes"]) == sorted([str(n["id"]), n["type"]] for n in graph["nodes"])
    assert {int(n[0]) for n in opened["nodes"] if n[2]} <= without_their_files(path, info)
    ours = {n: {"class_type": node["class_type"], "inputs": node["inputs"]} for n, node in to_prompt(read(path), info).items()}
    for node in opened[
        "prompt"
    ].values():  # some of the editor's own widgets, such as Preview Any's text, are none of the server's
        node["inputs"] = {k: v for k, v in node["inputs"].items() if k in specs(info[node["class_type"]])}
    assert opened["prompt"] == ours
    for node in graph["nodes"]:
        saved = [o["type"] for o in node["outputs"]]
        newer = info.get(node["type"], {}).get("output", [])[len(saved) :]  # what this ComfyUI's node has more
        assert opened["outputs"][str(node["id"])] == [*saved, *newer]
    assert page.errors == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_editor_runs_an_example(path: Path, page, info, server):
    if missing := missing_files(to_prompt(read(path), info), info):
        pytest.skip(f"needs {', '.join(missing)}")
    graph = json.loads(path.read_text(encoding="utf-8"))
    page.evaluate(OPEN, graph)
    page.evaluate(SHORTER, 2)  # pictures: what compares them needs two
    known = set(server.get("/history"))
    page.evaluate("() => window.comfyAPI.app.app.queuePrompt(0, 1)")
    deadline = time.monotonic() + 120
    while not (done := [h for k, h in server.get("/history").items() if k not in known]):
        assert time.monotonic() < deadline, "the run did not end"
        time.sleep(0.2)
    assert done[0]["status"]["status_str"] == "success", done[0]["status"]
    page.wait_for_timeout(500)  # pictures come
    found = page.evaluate(templates.BOXES, False)
    assert over(found["nodes"]) == []
    assert outside(found["nodes"], found["groups"]) == []
    saving = {str(n["id"]) for n in graph["nodes"] if n["type"] == "SaveImage"}
    assert saving <= set(done[0]["outputs"])
    assert page.errors == []
