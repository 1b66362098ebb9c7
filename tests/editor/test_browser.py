"""What a person does in the editor: opens templates, picks heads, chooses words, watches attention, edits branches, comes back."""

import json
import random
import shutil
import time
import urllib.request
from collections.abc import Iterator

import pytest

from attune.nodes.base import CLASSES
from attune.patches.hook.sites import Site, select
from attune.server.layouts import preset
from attune.tools import templates
from attune.tools.runtime.setup import ROOT

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on this machine")
WEB = f"/extensions/{ROOT.name}"
PROMPT = "a red striped star and a blue circle on a grey wall"
VUE = "Comfy.VueNodes.Enabled"
HELPERS = """() => {
    const app = window.comfyAPI.app.app
    window.t = {
        app,
        add(type, pos, values = {}) {
            const node = window.LiteGraph.createNode(type)
            node.pos = pos
            app.graph.add(node)
            for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value
            return node
        },
        find: (type) => app.graph.nodes.find((n) => n.type === type),
        value: (type, name) => window.t.find(type).widgets.find((w) => w.name === name).value,
        set: (type, name, value) => (window.t.find(type).widgets.find((w) => w.name === name).value = value),
        maps: [],
    }
    window.comfyAPI.api.api.addEventListener("attune.maps", ({ detail }) => window.t.maps.push(detail))
}"""


class Editor:
    """The editor in a browser."""

    def __init__(self, browser, server):
        self.server, self.errors = server, []
        self.page = browser.new_page(viewport={"width": 1500, "height": 1000})
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._listen)

    def _listen(self, message):
        ours = WEB in message.text or WEB in message.location.get("url", "") or "/attune" in message.location.get("url", "")
        if message.type in ("error", "warning") and ours:
            self.errors.append(message.text)

    def open(self):
        self.page.goto(self.server.url, timeout=120_000)
        self.page.wait_for_function(templates.READY, timeout=120_000)
        self.page.wait_for_timeout(500)  # the last workflow comes back
        self.page.evaluate(HELPERS)

    def __call__(self, script, *args):
        return self.page.evaluate(script, *args)

    def setting(self, name, value):
        self("([name, value]) => t.app.extensionManager.setting.set(name, value)", [name, value])

    def show(self):
        """All of the graph at its natural size, from the top left corner."""
        self("() => { t.app.canvas.ds.scale = 1; t.app.canvas.ds.offset = [70, 90]; t.app.canvas.setDirty(true, true) }")
        self.page.wait_for_timeout(700)

    def clear(self):
        # Numbers go on: newer editors keep what a node's widgets said under its number, for a node that comes back with it.
        self("() => { const g = t.app.graph, last = g.last_node_id; g.clear(); g.last_node_id = last + 1; t.maps.length = 0 }")

    def wait(self, condition, arg=None):
        """Until something is so in the page."""
        self.page.wait_for_function(condition, arg=arg)

    def run(self, steps=4, pictures=1):
        """Queue the workflow with few steps, and wait for its end."""
        self(
            """([steps, pictures]) => { for (const n of t.app.graph.nodes) for (const w of n.widgets ?? []) {
                if (w.name === "steps" && typeof w.value === "number") w.value = steps
                if (w.name === "batch_size") w.value = pictures
                if (w.name === "seed") w.value = Math.floor(Math.random() * 1e6) } }""",
            [steps, pictures],
        )
        known = set(self.server.get("/history"))
        self("() => t.app.queuePrompt(0, 1)")
        deadline = time.monotonic() + 300
        while not (done := [run for key, run in self.server.get("/history").items() if key not in known]):
            assert time.monotonic() < deadline, "the run did not end"
            self.page.wait_for_timeout(200)
        assert done[0]["status"]["status_str"] == "success", done[0]["status"]


@pytest.fixture(scope="module")
def editor(server) -> Iterator[Editor]:
    """One browser for all of these tests."""
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.Locale": "en",
        VUE: False,
        "Comfy.Workflow.ShowMissingModelsWarning": False,
    }
    body = json.dumps(settings).encode()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    direct.open(urllib.request.Request(f"{server.url}/settings", body, {"Content-Type": "application/json"}), timeout=30)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        editor = Editor(browser, server)
        editor.open()
        yield editor
        browser.close()


@pytest.fixture(autouse=True)
def no_errors(editor):
    yield
    errors, editor.errors[:] = list(editor.errors), []
    assert errors == []


def heads(editor, model=True):
    """Select Heads at the top left, on the demo model or on none."""
    editor.clear()
    editor(
        """(model) => { const h = t.add("AttuneHeads", [260, 0])
            if (model) t.add("AttuneDemoModel", [-60, 0]).connect(0, h, "model") }""",
        model,
    )
    editor.show()
    if model:
        editor.wait("() => document.querySelector('.attune-heads .attune-status').textContent.includes('of 36')")


def cell(editor, layer, head):
    """Where a head is on the screen, from the picker's own lay-out; -1 is the layer's name, or the head's number."""
    box = editor.page.locator(".attune-heads canvas").bounding_box()
    m = editor(
        """() => { const c = document.querySelector(".attune-heads canvas"), n = c.getAttribute("data-geometry"); return JSON.parse(n) }"""
    )
    zoom = box["width"] / m["width"]
    x = 20 if head < 0 else m["left"] + m["cell"] * (head + 0.5)
    y = 6 if layer < 0 else m["rows"][layer] + m["high"] / 2
    return box["x"] + x * zoom, box["y"] + y * zoom


def drag(editor, start, end=None):
    mouse = editor.page.mouse
    mouse.move(*start)
    mouse.down()
    if end:
        mouse.move(*end, steps=2)
    mouse.up()


def selection(editor):
    return editor("() => t.value('AttuneHeads', 'selection')")


def pressed(editor):
    """Heads that the picker says are chosen."""
    editor.page.mouse.move(5, 500)
    editor.page.wait_for_timeout(400)
    return editor.page.locator(".attune-heads .attune-status").inner_text().split(" ")[0]


# --- heads ------------------------------------------------------------------------------------------------------------


def test_heads_are_picked_with_the_mouse(editor):
    heads(editor)
    assert selection(editor) == "auto" and pressed(editor) == "auto:"
    drag(editor, cell(editor, 0, 1))
    assert selection(editor) == "input.1.0:1 middle.*.*"
    drag(editor, cell(editor, 0, 1), cell(editor, 2, 1))  # starts on a chosen one: takes away
    assert selection(editor) == "middle.*.*"
    drag(editor, cell(editor, 4, 0), cell(editor, 6, 0))
    assert selection(editor) == "middle.*.* output.0-2.0:0"
    drag(editor, cell(editor, 1, -1))
    assert selection(editor) == "input.3.0 middle.*.* output.0-2.0:0"
    editor.page.get_by_role("button", name="none", exact=True).click()
    assert selection(editor) == ""
    drag(editor, cell(editor, -1, 3))
    assert selection(editor) == "input.*.*:3 middle.*.*:3 output.*.*:3" and pressed(editor) == "9"
    for name, text in [
        ("all", "input.*.* middle.*.* output.*.*"),
        ("middle", "input.*.* output.*.*"),
        ("invert", "middle.*.*"),
        ("default", "auto"),
    ]:
        editor.page.locator(".attune-heads").get_by_role("button", name=name, exact=True).click()
        assert selection(editor) == text


def test_the_text_stays_the_truth(editor):
    heads(editor)
    box = editor.page.locator("textarea").first
    box.fill("L0H0-1 output.*.*:2")
    assert pressed(editor) == "7"
    box.fill("output.0.0 nowhere.3")
    editor.wait(
        "() => document.querySelector('.attune-heads .attune-error')?.textContent.includes('no site is called “nowhere.3”')"
    )
    drag(editor, cell(editor, 0, 0))
    assert selection(editor) == "input.1.0:0 output.0.0 nowhere.3"  # never throws away what a person wrote


def test_heads_are_picked_with_the_keyboard(editor):
    heads(editor)
    canvas = editor.page.locator(".attune-heads canvas")
    canvas.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Space", "End", "Control+Space"):
        canvas.press(key)
    assert selection(editor) == "input.1,4.0:3 input.3.0:2-3 middle.*.* output.*.*:3"
    assert editor.page.locator(".attune-heads [aria-live]").inner_text() == "input.3.0, head 3, chosen"
    assert editor("() => t.app.graph.nodes.length") == 2  # no key went to the graph


def test_selections_are_read_as_the_server_reads_them(editor):
    """The browser's reader of the grammar against the server's, and its writer against both."""
    for name in ("sd15", "sdxl", "flux"):
        known = preset(name)
        sites = tuple(Site(site, count, ("self",), i, ("", 0)) for i, (site, count) in enumerate(known["layers"]))
        draw = random.Random(name)
        texts = [
            "*.*",
            "*.*.*",
            "L0",
            "L*H0-1",
            "l3h2",
            "middle.0.0:0-99",
            "input.4-2.0",
            "single.?",
            "[ms]*.*.0:1",
            "a;b  *.1",
            "L99H1",
        ]
        texts += [
            "output.3-5.*:1,5;middle.*.*:0",
            "double.7 single.20-30:0-11",
            "*.1-4.0",
            "x:1",
            "middle.0.0:",
            ":3",
            "joint.1",
            "i*.*.*:0",
        ]
        for _ in range(20):
            chosen = draw.sample(known["layers"], draw.randint(1, len(known["layers"])))
            texts.append(" ".join(f"{site}:{draw.randint(0, count - 1)}" for site, count in chosen))
        ours = editor(
            """async ([url, layers, texts]) => { const { read, text } = await import(url)
                return texts.map((t) => { const { chosen, bad } = read(t, layers), again = text(chosen, layers)
                    return [bad.length, chosen.map((row) => [...row.keys()].filter((n) => row[n])), again] }) }""",
            [f"{WEB}/selection.js", known["layers"], texts],
        )
        for text, (bad, chosen, again) in zip(texts, ours, strict=True):
            try:
                wanted = dict(select(text, sites, known["family"]).chosen)
            except ValueError:
                assert bad or not any(chosen), text
                continue
            assert not bad and {site.name: tuple(n) for site, n in zip(sites, chosen, strict=True) if n} == wanted, text
            assert dict(select(again, sites, known["family"]).chosen) == wanted, (text, again)
            assert len(again) <= len(" ".join(f"{s}:{','.join(map(str, n))}" for s, n in wanted.items()))


def test_1368_heads_without_a_model(editor):
    heads(editor, model=False)
    editor.wait("() => document.querySelector('.attune-heads .attune-status').textContent.startsWith('Connect a model')")
    editor.page.locator(".attune-heads select").select_option("flux")
    editor.wait("() => JSON.parse(document.querySelector('.attune-heads canvas').dataset.geometry ?? '{}').rows?.length === 57")
    status = editor.page.locator(".attune-heads .attune-status")
    assert status.inner_text() == "auto: 24 of 1368 heads in 57 layers"  # the layer at the depth of SD3's
    editor("() => t.set('AttuneHeads', 'selection', 'middle.*.*')")
    editor.wait(
        "() => document.querySelector('.attune-heads .attune-status').textContent.includes('no site is called “middle.*.*”')"
    )
    editor.page.get_by_role("button", name="all", exact=True).click()
    assert selection(editor) == "double.* single.*" and pressed(editor) == "1368"
    drawn = editor(
        """() => new Promise((done) => { const p = CanvasRenderingContext2D.prototype, fill = p.fill; let count = 0
            p.fill = function (...a) { count++; return fill.apply(this, a) }
            const c = document.querySelector(".attune-heads canvas"), r = c.getBoundingClientRect()
            c.dispatchEvent(new PointerEvent("pointermove", { clientX: r.x + 90, clientY: r.y + 40, bubbles: true }))
            requestAnimationFrame(() => requestAnimationFrame(() => { p.fill = fill; done(count) })) })"""
    )
    assert drawn <= 1368  # once a move, however many heads


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "nodes 2.0"])
def test_no_row_is_cut_in_half(editor, vue):
    editor.setting(VUE, vue)
    try:
        heads(editor, model=False)
        editor("(text) => { t.add('AttuneWords', [-160, 0], { text }) }", " ".join([PROMPT] * 6))
        editor.page.locator(".attune-heads select").select_option("flux")
        editor.wait(
            "() => JSON.parse(document.querySelector('.attune-heads canvas').dataset.geometry ?? '{}').rows?.length === 57"
        )
        editor.wait("() => document.querySelectorAll('.attune-words .attune-chip').length > 40")
        editor.page.wait_for_timeout(500)
        high, total, ends = editor(
            """() => { const grid = document.querySelector(".attune-heads .attune-grid"), m = JSON.parse(grid.firstChild.dataset.geometry)
                return [grid.clientHeight, m.height, m.rows.map((y) => y + m.high)] }"""
        )
        assert 60 < high < total and min(abs(high - end) for end in ends) <= 1
        assert (
            editor("() => document.querySelector('.attune-heads .attune-grid').scrollTop") > 0
        )  # to the heads that are chosen
        cut = editor(
            """() => { const rows = document.querySelector(".attune-words .attune-scroll"), end = rows.offsetTop + rows.clientHeight
                const all = [...rows.querySelectorAll("button")]
                return all.filter((b) => b.offsetTop < end && b.offsetTop + b.offsetHeight > end + 1).length }"""
        )
        assert cut == 0
    finally:
        editor.setting(VUE, False)


def test_a_preset_of_the_papers_heads_is_shown_and_not_written(editor):
    heads(editor, model=False)
    editor.page.locator(".attune-heads select").select_option("flux")
    status = editor.page.locator(".attune-heads .attune-status")
    none = editor.page.locator(".attune-heads").get_by_role("button", name="none", exact=True)
    for name, words in (
        ("flux_cool", "1 head of the preset flux_cool; set preset to selection to choose others"),
        ("flux_quality", "24 heads of the preset flux_quality; set preset to selection to choose others"),
        ("sd3_dark", "The preset sd3_dark is for another model."),
    ):
        editor("(name) => { t.app.graph.nodes[0].widgets.find((w) => w.name === 'preset').value = name }", name)
        editor.wait("(words) => document.querySelector('.attune-heads .attune-status').textContent === words", words)
        assert none.is_disabled() and selection(editor) == "auto"
    editor("() => { t.app.graph.nodes[0].widgets.find((w) => w.name === 'preset').value = 'selection' }")
    editor.wait("() => !document.querySelector('.attune-heads .attune-status').textContent.includes('preset')")
    assert none.is_enabled() and status.inner_text().startswith("auto: ")


def test_scores_colour_the_heads(editor):
    heads(editor)
    pixel = """() => { const c = document.querySelector(".attune-heads canvas"), g = JSON.parse(c.dataset.geometry), k = c.width / g.width
        const at = (n) => [(g.left + (n + 0.45) * g.cell) * k, (g.rows[0] + g.high / 2) * k, 1, 1]
        return [0, 3].map((n) => [...c.getContext("2d").getImageData(...at(n)).data]) }"""
    before = editor(pixel)
    assert before[0] == before[1]
    layers = editor(
        "async () => (await (await fetch('/attune/layout', { method: 'POST', body: '{\"preset\":\"demo\"}' })).json()).layers"
    )
    sites = {name: [n / count for n in range(count)] for name, count in layers}
    editor(
        """(sites) => window.comfyAPI.api.api.dispatchEvent(new CustomEvent("executed",
            { detail: { node: "1", output: { attune_scores: [{ title: "round 1", sites }] } } }))""",
        sites,
    )
    low, high = editor(pixel)
    assert low != high and high[0] > 200 > low[0]  # yellow is high, blue is low
    assert "colours: round 1" in editor.page.locator(".attune-heads .attune-status").inner_text()
    editor.page.get_by_role("button", name="colours").click()
    assert editor(pixel) == before


def test_copied_collapsed_undone_and_in_a_subgraph(editor):
    heads(editor)
    drag(editor, cell(editor, 0, 0))
    assert selection(editor) == "input.1.0:0 middle.*.*"
    editor(
        "() => { t.app.canvas.selectItems([t.find('AttuneHeads')]); t.app.canvas.copyToClipboard(); t.app.canvas.pasteFromClipboard() }"
    )
    editor.page.wait_for_timeout(500)
    values = "() => t.app.graph.nodes.filter((n) => n.type === 'AttuneHeads').map((n) => n.widgets[0].value)"
    assert editor(values) == ["input.1.0:0 middle.*.*"] * 2
    editor("() => t.app.graph.nodes.filter((n) => n.type === 'AttuneHeads')[1].collapse()")
    editor.page.wait_for_timeout(300)
    editor("() => t.app.graph.remove(t.app.graph.nodes.filter((n) => n.type === 'AttuneHeads')[1])")
    # undo takes the last change of the picker back
    editor("() => t.app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    drag(editor, cell(editor, 1, 0))
    assert selection(editor) == "input.1,3.0:0 middle.*.*"
    editor("() => t.app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    editor.wait("() => t.value('AttuneHeads', 'selection') === 'input.1.0:0 middle.*.*'")
    editor.page.wait_for_timeout(500)
    assert pressed(editor) == "5"
    inside = editor(
        """async () => { const { subgraph } = t.app.graph.convertToSubgraph(new Set([t.find("AttuneHeads")]))
            t.app.canvas.setGraph(subgraph)
            await new Promise((done) => setTimeout(done, 1200))
            const status = document.querySelector(".attune-heads .attune-status").textContent
            t.app.canvas.setGraph(t.app.rootGraph ?? t.app.graph)
            return status }"""
    )
    assert inside.startswith("5 of 36 heads in 9 layers")  # the model is found outside of the subgraph
    editor.clear()


# --- words, maps ------------------------------------------------------------------------------------------------------


def load(editor, name):
    graph = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    editor("async (graph) => { t.maps.length = 0; await t.app.loadGraphData(graph) }", graph)
    editor.page.wait_for_timeout(600)


def to(editor, kind):
    """Bring a node to the top left corner."""
    editor(
        """(kind) => { const n = t.find(kind); t.app.canvas.ds.scale = 1
            t.app.canvas.ds.offset = [120 - n.pos[0], 130 - n.pos[1]]; t.app.canvas.setDirty(true, true) }""",
        kind,
    )
    editor.page.wait_for_timeout(700)


def test_words_are_chosen_by_a_click_and_maps_appear(editor):
    load(editor, "07 Even guidance, and where words look")
    to(editor, "AttuneWords")
    chip = lambda word: editor.page.locator(".attune-chip", has_text=word).first  # noqa: E731
    assert editor("() => document.querySelectorAll('.attune-chip[aria-pressed=true]').length") == 5
    chip("star").click()
    assert editor("() => t.value('AttuneWords', 'words')") == "blue circle"
    start, end = chip("red").bounding_box(), chip("star").bounding_box()
    drag(editor, (start["x"] + 9, start["y"] + 8), (end["x"] + 9, end["y"] + 8))
    chip("wall").click()
    assert editor("() => t.value('AttuneWords', 'words')") == "blue circle, red striped star, wall"
    to(editor, "AttuneSemanticCFG")
    editor.run()
    editor.wait("() => document.querySelector('.attune-live')?.dataset.step === '4'")
    seen = editor("() => t.maps.map(({ image, ...rest }) => rest)")
    assert {m["kind"] for m in seen} == {"heat", "regions"} and {m["node"] for m in seen} == {"7"}
    assert all(m["names"] == ["blue circle", "red striped star", "wall"] and m["steps"] == 4 for m in seen)
    assert editor.page.locator(".attune-live figcaption").all_inner_texts()[-3:] == ["blue circle", "red striped star", "wall"]
    painted = editor(
        """() => [...document.querySelectorAll(".attune-live canvas")].map((c) => {
            const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data
            return new Set(Array.from({ length: d.length / 4 }, (_, i) => d[4 * i] * 65536 + d[4 * i + 1] * 256 + d[4 * i + 2])).size })"""
    )
    assert len(painted) == 4 and min(painted[1:]) > 20  # heat of many shades; regions may be few
    # and the node that has grown covers no other
    assert (
        editor(
            """() => { const n = t.find("AttuneSemanticCFG").getBounding()
            return t.app.graph.nodes.filter((o) => { const b = o.getBounding()
                return o.type !== "AttuneSemanticCFG" && n[0] < b[0] + b[2] && b[0] < n[0] + n[2] && n[1] < b[1] + b[3] && b[1] < n[1] + n[3]
            }).length }"""
        )
        == 0
    )
    # the run has told the tokens
    to(editor, "AttuneWords")
    assert editor.page.locator(".attune-encoder > span").all_inner_texts() == ["CLIP-L"]
    assert chip("star").get_attribute("title") == "token 4 of CLIP-L"


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "nodes2"])
def test_words_are_weighed_with_control_and_the_arrows(editor, vue):
    editor.clear()
    editor.setting(VUE, vue)
    text = "a red striped star and a \\(blue\\) circle on a grey wall"
    try:
        editor("(text) => { t.add('AttuneWords', [0, 0], { text, words: 'red striped star' }) }", text)
        editor.show()
        chip = lambda word: editor.page.locator(".attune-chip", has_text=word).first  # noqa: E731

        def press(word, key, times=1):
            chip(word).focus()
            for _ in range(times):
                editor.page.keyboard.press(f"Control+{key}")
            return editor("() => t.value('AttuneWords', 'text')")

        weighed = text.replace("red striped star", "(red striped star:1.1)")
        assert press("striped", "ArrowUp", 2) == weighed
        assert chip("star").locator("b").inner_text() == "1.1" and "more" in chip("red").get_attribute("class")
        assert press("star", "ArrowDown", 3) == weighed.replace("1.1", "0.95")
        assert "less" in chip("red").get_attribute("class")
        assert press("star", "ArrowUp") == text and chip("star").locator("b").count() == 0
        assert press("blue", "ArrowDown", 22) == text.replace("blue", "(blue:-0.1)")
        assert press("blue", "ArrowUp", 22) == text
        # a node that weighs these words has the weights, and no other input is made for them
        editor("() => { t.find('AttuneWords').connect(0, t.add('AttuneWordWeights', [420, 0]), 'words') }")
        assert press("star", "ArrowUp", 4) == press("blue", "ArrowDown", 30) == text
        assert editor("() => t.value('AttuneWordWeights', 'weights')") == "red striped star: 1.2\nblue: -0.5"
        editor.wait("() => document.querySelectorAll('.attune-chip.more').length === 3")
        assert [chip(w).locator("b").inner_text() for w in ("red", "blue")] == ["1.2", "-0.5"]
        press("red", "ArrowDown", 4)
        assert editor("() => t.value('AttuneWordWeights', 'weights')") == "blue: -0.5"
        editor("() => t.set('AttuneWordWeights', 'weights', 'grey wall: 0.3')")  # what is written there is shown
        editor.wait("() => document.querySelectorAll('.attune-chip.less').length === 2")
        assert len(editor("() => t.app.graph.serialize().nodes.find((n) => n.type === 'AttuneWords').widgets_values")) == 2
    finally:
        editor.setting(VUE, False)


def test_regulation_and_capture_show_their_maps_until_the_setting_is_off(editor):
    load(editor, "03 Nothing left out")
    editor(
        """() => { const c = t.add("AttuneAttentionMaps", [0, -600]), r = t.find("AttuneRegulation")
            t.find("AttuneDemoModel").connect(0, c, "model"); c.connect(0, r, "model") }"""
    )
    editor.run()
    kinds = editor("() => [...new Set(t.maps.map((m) => t.app.graph.getNodeById(Number(m.node)).type))].sort()")
    assert kinds == ["AttuneAttentionMaps", "AttuneRegulation"]
    assert editor("() => t.maps.every((m) => m.names.join() === 'star,circle,heart')")
    editor.setting("Attune.LiveMaps", False)
    editor.page.wait_for_timeout(300)
    editor("() => (t.maps.length = 0)")
    editor.run(2)
    assert editor("() => t.maps.length") == 0
    editor.setting("Attune.LiveMaps", True)


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "nodes 2.0"])
def test_every_node_of_a_stack_shows_its_maps(editor, vue):
    editor.setting(VUE, vue)
    try:
        load(editor, "09 Three methods together")
        to(editor, "AttuneSemanticCFG")
        editor.run()
        editor.wait("() => [...document.querySelectorAll('.attune-live')].filter((e) => e.dataset.step === '4').length >= 1")
        kinds = editor("() => [...new Set(t.maps.map((m) => t.app.graph.getNodeById(Number(m.node)).type))].sort()")
        assert kinds == ["AttuneRegulation", "AttuneSemanticCFG"]
        assert editor("() => document.querySelectorAll('.lg-node .attune-live').length > 0") == vue
        if not vue:  # nodes that have grown cover no others
            over = editor(
                """() => { const boxes = t.app.graph.nodes.map((n) => n.getBounding())
                    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) =>
                        a[0] < b[0] + b[2] && b[0] < a[0] + a[2] && a[1] < b[1] + b[3] && b[1] < a[1] + a[3])).length }"""
            )
            assert over == 0
    finally:
        editor.setting(VUE, False)


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "nodes 2.0"])
def test_a_picture_is_explained_by_pointing(editor, vue):
    editor.setting(VUE, vue)
    try:
        load(editor, "07 Even guidance, and where words look")
        editor.run(2, pictures=2)
        to(editor, "AttuneShowMaps")
        chips, canvas, rows = (
            editor.page.locator(f".attune-explain {e}") for e in (".attune-chip", "canvas", "li:not(.attune-quiet)")
        )
        chips.first.wait_for()
        words = chips.all_inner_texts()
        assert words[:2] == ["red striped star", "blue circle"] and {"grey", "wall"} <= set(words)
        drawn = lambda: canvas.evaluate("(c) => c.toDataURL()")  # noqa: E731
        editor.page.mouse.move(5, 500)
        plain = drawn()
        chips.first.hover()
        heat = drawn()
        chips.nth(1).hover()
        assert len({plain, heat, drawn()}) == 3
        box = canvas.bounding_box()
        assert box["width"] > 150 and abs(box["width"] - box["height"]) < 2
        told = editor("() => Object.values(t.app.nodeOutputs).find((o) => o.attune_maps).attune_maps[0]")
        assert len(told["pictures"]) == 2 and len(json.dumps(told)) < 100_000
        editor.page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.4)
        parts = [row.split("\n") if "\n" in row else row.rsplit(" ", 2) for row in rows.all_inner_texts()]
        shares = [int(part[-1].removesuffix("%")) if part[-1] != "%" else int(part[-2]) for part in parts]
        assert len(shares) == 5 and shares == sorted(shares, reverse=True) and 30 < sum(shares) <= 102
        assert {part[0] for part in parts} <= set(words)
        editor.page.get_by_role("button", name="Next picture").click()
        editor.wait("() => document.querySelector('.attune-explain .attune-bar').textContent.includes('picture 2 of 2')")
        editor.page.mouse.move(5, 500)
        assert drawn() != plain
        canvas.focus()
        canvas.press("ArrowRight")
        assert rows.count() == 5  # without a mouse
        for wrong in ({**told, "size": [1e9, 1]}, {**told, "names": told["names"][1:]}, {"pictures": "x"}, 3, [told]):
            editor(
                """([id, wrong]) => window.comfyAPI.api.api.dispatchEvent(new CustomEvent("executed",
                    { detail: { node: id, output: { attune_maps: [wrong] } } }))""",
                [str(editor("() => t.find('AttuneShowMaps').id")), wrong],
            )
        assert chips.all_inner_texts() == words
        # it is there again after a reload, and where a run has nothing to do
        editor("() => t.app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
        editor.page.wait_for_timeout(1000)
        editor.open()
        chips.first.wait_for()
        assert chips.all_inner_texts() == words
    finally:
        editor.setting(VUE, False)


def picture(editor, method, **values):
    """A workflow with a method between the demo model and a sampler, to be seen at the left."""
    editor.clear()
    editor(
        """([method, values, text]) => {
            const add = (type, x, y, values) => t.add(type, [x, y], values)
            const demo = add("AttuneDemoModel", 0, 400), node = add(method, 0, 0, values), sampler = add("KSampler", 800, 0)
            const positive = add("CLIPTextEncode", 400, 400, { text }), negative = add("CLIPTextEncode", 400, 650)
            const latent = add("EmptyLatentImage", 400, 900, { width: 128, height: 128 })
            const decode = add("VAEDecode", 1150, 0), preview = add("PreviewImage", 1150, 150)
            demo.connect(0, node, "model"); node.connect(0, sampler, "model"); latent.connect(0, sampler, "latent_image")
            for (const [n, role] of [[positive, "positive"], [negative, "negative"]]) { demo.connect(1, n, "clip"); n.connect(0, sampler, role) }
            sampler.connect(0, decode, "samples"); demo.connect(2, decode, "vae"); decode.connect(0, preview, "images") }""",
        [method, values, PROMPT],
    )
    editor.show()


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "nodes 2.0"])
def test_a_node_without_an_effect_says_so_until_it_has_one(editor, vue):
    editor.setting(VUE, vue)
    try:
        picture(editor, "AttuneSemanticCFG")
        set_to = lambda kind, name, value: editor("(args) => t.set(...args)", [kind, name, value])  # noqa: E731
        line, heat = editor.page.locator(".attune-no-effect"), "() => document.querySelectorAll('.attune-live figure').length"
        set_to("KSampler", "cfg", 1)
        editor.run(1)
        line.wait_for()
        assert line.inner_text() == "No effect in the last run: at cfg 1 there is no guidance to even out; raise cfg."
        assert line.evaluate("(e) => e.clientHeight >= e.scrollHeight && e.clientHeight > 20"), "all of it is to be read"
        assert editor(heat) == 0
        set_to("KSampler", "cfg", 4)
        editor.run(1)
        line.wait_for(state="detached")
        editor.wait(heat)
        set_to("AttuneSemanticCFG", "start_percent", 0.31)
        set_to("AttuneSemanticCFG", "end_percent", 0.32)
        editor.run(1)
        editor.wait(
            "() => document.querySelector('.attune-no-effect')?.textContent.includes('no step of this run lies between')"
        )
        assert editor(heat) == 0, "what an earlier run has shown"
        picture(editor, "AttuneSoftPAG", scale=0)
        before = editor("() => t.find('AttuneSoftPAG').size[1]")
        editor.run(1)
        editor.wait("() => document.querySelector('.attune-no-effect')?.textContent.includes('scale is 0, which is off')")
        set_to("AttuneSoftPAG", "scale", 3)
        editor.run(1)
        line.wait_for(state="detached")
        assert vue or editor("() => t.find('AttuneSoftPAG').size[1]") == before
    finally:
        editor.setting(VUE, False)


# --- branches, and coming back ----------------------------------------------------------------------------------------

MANUAL = "* | a dog and a cat\ndog | a red dog and a cat\ncat | a dog and a blue cat"


def manual(editor):
    return editor("() => t.value('AttuneDecompose', 'manual')")


def branches(editor, **values):
    editor.clear()
    editor(
        "(values) => { t.add('AttuneDecompose', [60, 0], values).setSize([480, 620]) }",
        {"text": "a red dog and a blue cat", **values},
    )
    editor.show()


def test_branches_are_edited_by_hand(editor):
    branches(editor, manual=MANUAL)
    rows = editor.page.locator(".attune-branches .attune-row:not(.base)")
    assert editor.page.locator(".attune-branches mark").all_inner_texts() == ["red", "blue"]
    rows.nth(1).locator(".text").click()
    editor.page.keyboard.press("End")
    editor.page.keyboard.type(" in a hat")
    editor.page.keyboard.press("Enter")
    assert manual(editor).splitlines()[1] == "dog | a red dog and a cat in a hat"
    assert editor.page.locator(".attune-branches mark").all_inner_texts() == ["red", "in a hat", "blue"]
    rows.nth(1).get_by_label("Move down branch").click()
    assert [line[:3] for line in manual(editor).splitlines()] == ["* |", "cat", "dog"]
    rows.nth(2).get_by_label("Delete branch").click()
    editor.page.get_by_role("button", name="+ branch").click()
    assert manual(editor).splitlines() == ["* | a dog and a cat", "cat | a dog and a blue cat", "* | a dog and a blue cat"]
    rows.nth(2).locator("input").fill("bird")
    rows.nth(2).locator("input").press("Enter")
    message = editor.page.locator(".attune-branches .attune-error")
    message.wait_for()
    assert "“bird” is not in its sub-prompt" in message.inner_text()  # the route's answer, in the node
    rows.nth(2).locator("input").fill("cat")
    rows.nth(2).locator("input").press("Enter")
    message.wait_for(state="detached")
    assert len(editor.errors) <= 1 and all("status of 400" in e for e in editor.errors)  # the browser's own note
    editor.errors.clear()
    source, target = rows.nth(2).locator(".handle").bounding_box(), rows.nth(0).bounding_box()
    drag(editor, (source["x"] + 8, source["y"] + 8), (target["x"] + 30, target["y"] + 8))
    editor.wait("() => t.value('AttuneDecompose', 'manual').startsWith('cat | a dog and a blue cat\\n* |')")
    editor.page.get_by_role("button", name="automatic", exact=True).click()
    assert manual(editor) == ""


def test_a_prompt_is_taken_apart_on_demand(editor):
    pytest.importorskip("spacy")
    branches(editor, text="a red dog with sunglasses and a blue cat with a necklace")
    editor.page.get_by_role("button", name="take apart").click()
    rows = editor.page.locator(".attune-branches .attune-row:not(.base)")
    rows.first.wait_for()
    assert editor.page.locator(".attune-branches mark").all_inner_texts() == [
        "red",
        "with sunglasses",
        "blue",
        "with a necklace",
    ]
    assert manual(editor) == ""  # only looked at
    rows.nth(1).get_by_label("Delete branch").click()
    assert manual(editor).splitlines()[:2] == ["* | a dog and a cat", "dog | a dog with sunglasses and a cat"]


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "nodes 2.0"])
def test_everything_is_as_it_was_after_a_reload(editor, vue):
    heads(editor)
    drag(editor, cell(editor, 0, 0))
    editor(
        """([text, manual]) => { t.add("AttuneWords", [260, 460], { text, words: "star" })
            t.add("AttuneDecompose", [700, 0], { text: "a red dog and a blue cat", manual }).setSize([420, 560]) }""",
        [PROMPT, MANUAL],
    )
    editor.page.wait_for_timeout(500)
    editor("() => t.app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    editor.setting(VUE, vue)
    editor.page.wait_for_timeout(1000)
    before = editor("() => t.app.graph.serialize().nodes.map((n) => [n.type, n.widgets_values])")
    editor.open()
    editor.wait("() => t.app.graph.nodes.length === 4 && document.querySelectorAll('.attune-branches mark').length === 2")
    assert editor("() => t.app.graph.serialize().nodes.map((n) => [n.type, n.widgets_values])") == before
    editor.wait("() => document.querySelector('.attune-heads .attune-status').textContent.startsWith('5 of 36 heads')")
    assert editor("() => document.querySelectorAll('.lg-node .attune').length") == (3 if vue else 0)
    assert editor.page.locator(".attune-chip[aria-pressed=true]").all_inner_texts() == ["star"]
    # and it still works, in either kind of node
    editor.show()
    drag(editor, cell(editor, 0, 1))
    editor.page.locator(".attune-chip", has_text="circle").click()
    assert selection(editor) == "input.1.0:0-1 middle.*.*"
    assert editor("() => t.value('AttuneWords', 'words')") == "star, circle"
    editor.setting(VUE, False)


# --- languages --------------------------------------------------------------------------------------------------------


def test_names_and_help_are_there_in_chinese(editor):
    """What the editor asks for; some of its versions drop what they are given here when they load their own words."""
    chinese = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    given = editor.server.get("/i18n")["zh"]
    assert {name: given["nodeDefs"][name] for name in chinese} == chinese
    assert given["settings"]["Attune_LiveMaps"]["name"] == "采样时显示注意力图"
    for page in ("AttuneSoftPAG.md", "AttuneSoftPAG/zh.md", "pictures/AttuneSoftPAG.jpg"):
        assert editor("async (path) => (await fetch(path)).status", f"{WEB}/docs/{page}") == 200


@pytest.mark.parametrize("node", sorted(p.stem for p in (ROOT / "web" / "docs").glob("*.md")))
def test_the_page_that_the_editor_asks_for_first_is_there(editor, node):
    """It asks for the language's page, and only after an error in its console for the one without a language."""
    page = "async (path) => { const answer = await fetch(path); return [answer.status, await answer.text()] }"
    english, chinese = ((ROOT / "web" / "docs" / f).read_text(encoding="utf-8") for f in (f"{node}.md", f"{node}/zh.md"))
    for language, text in (("en", english), ("zh", chinese), ("pt-BR", english)):
        assert editor(page, f"{WEB}/docs/{node}/{language}.md") == [200, text]


def test_our_sockets_have_colours(editor):
    types = [name for name in CLASSES if name.startswith("ATTUNE_")]
    found = editor(
        """(types) => types.map((type) => [t.app.canvas.default_connection_color_byType[type], LGraphCanvas.link_type_colors[type],
            getComputedStyle(document.documentElement).getPropertyValue(`--color-datatype-${type}`)])""",
        types,
    )
    assert len({colour for colour, *_ in found}) == len(types)
    assert all(colour and set(others) == {colour} for colour, *others in found)
