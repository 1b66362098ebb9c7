"""The subgraph blueprints: what they are made of is there, and a person who puts one into a graph gets a picture."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from attune.tools import templates
from attune.tools.runtime.setup import ROOT
from attune.tools.runtime.workflow import specs

BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
TEXT = "a red striped star and a blue circle on a grey wall"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
OPEN = """async (graph) => {
    await window.comfyAPI.app.app.loadGraphData(graph)
    return (await window.comfyAPI.app.app.graphToPrompt()).output
}"""


def read(path: Path) -> tuple[dict, dict]:
    """A blueprint's node and its subgraph."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    (node,), (inside,) = graph["nodes"], graph["definitions"]["subgraphs"]
    assert node["type"] == inside["id"] and node["title"] == inside["name"] == path.stem
    return node, inside


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_is_whole(path, info):
    node, inside = read(path)
    nodes = {n["id"]: n for n in inside["nodes"]}
    ends = {-10: [i["type"] for i in inside["inputs"]], -20: [o["type"] for o in inside["outputs"]]}
    assert [i["name"] for i in node["inputs"]] == [i["name"] for i in inside["inputs"]]
    assert [o["type"] for o in node["outputs"]] == ends[-20]
    for link in inside["links"]:
        a, b = link["origin_id"], link["target_id"]
        given = ends[-10][link["origin_slot"]] if a == -10 else nodes[a]["outputs"][link["origin_slot"]]["type"]
        taken = ends[-20][link["target_slot"]] if b == -20 else nodes[b]["inputs"][link["target_slot"]]["type"]
        assert given == taken == link["type"]
        if b != -20:
            assert nodes[b]["inputs"][link["target_slot"]]["link"] == link["id"]
    for n in nodes.values():
        if n["type"] != "MarkdownNote":
            known = specs(info[n["type"]])
            assert {i["name"] for i in n["inputs"]} <= set(known)
            assert [o["type"] for o in n["outputs"]] == list(info[n["type"]]["output"])


@pytest.fixture(scope="module")
def page(server) -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("needs Chromium or Chrome on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_function(templates.READY, timeout=120_000)
        yield page
        browser.close()


def whole(path: Path) -> dict:
    """A graph with the blueprint between the bundled model and a sampler."""
    node, inside = read(path)
    for n in inside["nodes"]:
        if n["type"] == "AttuneWordWeights":
            n["widgets_values"][0] = "red striped star: 1.5"
    kinds = {1: ("AttuneDemoModel", ["shapes"]), 3: ("CLIPTextEncode", [""]), 4: ("EmptyLatentImage", [128, 128, 1])}
    kinds |= {5: ("KSampler", [1, "fixed", 2, 5.0, "euler", "normal", 1.0]), 6: ("VAEDecode", []), 7: ("PreviewImage", [])}
    wires = [
        (1, 0, 2, "model", "MODEL"),
        (1, 1, 2, "clip", "CLIP"),
        (1, 1, 3, "clip", "CLIP"),
        (2, 0, 5, "model", "MODEL"),
        (2, 1, 5, "positive", "CONDITIONING"),
        (3, 0, 5, "negative", "CONDITIONING"),
        (4, 0, 5, "latent_image", "LATENT"),
        (5, 0, 6, "samples", "LATENT"),
        (1, 2, 6, "vae", "VAE"),
        (6, 0, 7, "images", "IMAGE"),
    ]
    nodes = {2: {**node, "id": 2, "widgets_values": [TEXT]}}
    for number, (kind, values) in kinds.items():
        inputs = [{"name": w[3], "type": w[4], "link": None} for w in wires if w[2] == number]
        count = max((w[1] for w in wires if w[0] == number), default=-1) + 1
        outputs = [{"name": str(i), "type": "*", "links": []} for i in range(count)]
        nodes[number] = {"id": number, "type": kind, "inputs": inputs, "outputs": outputs, "widgets_values": values}
    links = []
    for number, (a, slot, b, name, kind) in enumerate(wires, 1):
        place = [i["name"] for i in nodes[b]["inputs"]].index(name)
        nodes[b]["inputs"][place]["link"] = number
        nodes[a]["outputs"][slot]["links"].append(number)
        nodes[a]["outputs"][slot]["type"] = kind
        links.append([number, a, slot, b, place, kind])
    for number, n in nodes.items():
        n |= {
            "pos": [300 * number, 0],
            "size": [240, 100],
            "flags": {},
            "order": number,
            "mode": 0,
            "properties": n.get("properties", {}),
        }
    last = {"last_node_id": 7, "last_link_id": len(links), "version": 0.4}
    return {**last, "nodes": list(nodes.values()), "links": links, "definitions": {"subgraphs": [inside]}}


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_makes_a_picture(path, page, server):
    prompt = page.evaluate(OPEN, whole(path))
    assert TEXT in [n["inputs"].get("text") for n in prompt.values()]
    known = set(server.get("/history"))
    page.evaluate("() => window.comfyAPI.app.app.queuePrompt(0, 1)")
    for _ in range(600):
        if done := [h for k, h in server.get("/history").items() if k not in known]:
            break
        page.wait_for_timeout(200)
    assert done[0]["status"]["status_str"] == "success", done[0]["status"]
