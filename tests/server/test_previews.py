"""Maps on their way to the editor while a picture forms."""

import base64
import io
from types import SimpleNamespace

import comfy_execution.utils
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from attune.language.words import Phrase, Words
from attune.patches import regulation, scfg
from attune.patches.maps import reading, recorder
from attune.patches.maps.record import Settings as Kept
from attune.server import graph
from attune.server import previews as live
from attune.tests import families

# --- live maps --------------------------------------------------------------------------------------------------------


class FakeServer:
    """What `live` knows of ComfyUI's server."""

    def __init__(self):
        self.client_id, self.sockets, self.sent = "me", {"me": object()}, []
        self.effects = []
        self.prompt = {
            "7": {"class_type": "KSampler", "inputs": {}},
            "2": {"class_type": "AttuneWords", "inputs": {"text": "x"}},
        }
        self.prompt_queue = SimpleNamespace(get_current_queue=lambda: ([(0, "p", self.prompt)], []))

    def send_sync(self, event, data, client):
        (self.effects if event == "attune.effect" else self.sent).append((event, data, client))

    def send_progress_text(self, text, node):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server with one editor, which has asked for maps; node 7 of its workflow runs."""
    fake = FakeServer()
    monkeypatch.setattr(graph, "server", lambda: fake)
    monkeypatch.setattr(live, "server", lambda: fake)
    monkeypatch.setattr(
        comfy_execution.utils, "get_executing_context", lambda: SimpleNamespace(prompt_id="p", node_id="7", list_index=0)
    )
    monkeypatch.setattr(live, "_sent", {})
    monkeypatch.setattr(live, "_listeners", {"me"})
    monkeypatch.setattr(live, "_words", type(live._words)())
    return fake


def tiles(data):
    """A message's tiles, ``[n, h, w]``."""
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image"]))))
    return sheet.reshape(-1, data["size"][1], data["size"][0])


WORDS = Words("a b", (Phrase("b", (2,), {"l": (2,)}),), (), (0, 3, 4, 5, 6), 7, {"l": 7})


def heat_of(name):
    """A run with captured maps of a text of seven tokens."""
    return lambda model: recorder.apply(model, observer=live.Preview("9"))[0]


CASES = {
    "capture": heat_of("sd15"),
    "S-CFG": lambda model: scfg.apply(model, observer=live.Preview("9"))[0],
    "regulation": lambda model: regulation.apply(model, WORDS, observer=live.Preview("9")),
}


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_run_shows_its_maps_and_stays_the_same(method, name, server, monkeypatch):
    monkeypatch.setattr(live, "PAUSE", 0.0)
    patched = CASES[method](families.shared(name))
    seen = families.sample(patched, steps=3)
    kinds = {data["kind"] for _, data, _ in server.sent}
    assert kinds == ({"heat", "regions"} if method == "S-CFG" else {"heat"})
    for event, data, client in server.sent:
        assert (event, data["node"], client) == ("attune.maps", "9", "me")
        assert data["steps"] == 3 and tiles(data).shape[0] == (1 if data["kind"] == "regions" else len(data["names"]))
    heat = [data for _, data, _ in server.sent if data["kind"] == "heat"]
    assert [data["step"] for data in heat] == ([1, 2] if method == "regulation" else [1, 2, 3])  # regulation ends half-way
    assert all(int(tiles(data).max()) == 255 and int(tiles(data).min()) == 0 for data in heat)
    live._listeners.clear()
    server.sent.clear()
    assert torch.equal(families.sample(patched, steps=3), seen) and server.sent == []


def test_without_a_listener_nothing_is_gathered(server, monkeypatch):
    work = []
    monkeypatch.setattr(live.Feed, "add", lambda *_: work.append("add"))
    monkeypatch.setattr(live, "png", lambda *_: work.append("png"))
    patched = scfg.apply(families.shared("sd15"), observer=live.Preview("9"))[0]
    for gone in ({"_listeners": set()}, {"_listeners": {"someone else"}}):
        monkeypatch.setattr(live, "_listeners", gone["_listeners"])
        families.sample(patched)
    monkeypatch.setattr(live, "_listeners", {"me"})
    server.sockets.clear()  # the editor has gone
    families.sample(patched)
    assert work == []
    server.sockets["me"] = object()
    families.sample(patched)
    assert work


def test_words_give_their_names_and_columns(server, monkeypatch):
    monkeypatch.setattr(live, "PAUSE", 0.0)
    patched, handle = recorder.apply(families.shared("sd15"), Kept(precision="fp32"), observer=live.Preview("9"))
    families.sample(patched, steps=1)
    assert all(name.startswith("token ") for name in server.sent[-1][1]["names"])
    server.prompt_queue.get_current_queue()[0][0][2]["7"]["inputs"]["x"] = ["2", 0]
    context = SimpleNamespace(prompt_id="p", node_id="2", list_index=0)
    monkeypatch.setattr(comfy_execution.utils, "get_executing_context", lambda: context)
    live.remember(WORDS)
    server.sent.clear()
    families.sample(patched, steps=1)
    data = server.sent[-1][1]
    assert data["names"] == ["b"]
    layers = next(reversed(handle.records.values())).cross.values()
    size = max(place.grid for place in layers)
    seen = [reading._mean(place, None)[0].mean(0)[:, 2].reshape(1, 1, *place.grid) for place in layers]
    expected = sum(F.interpolate(t, size=size, mode="bilinear")[0] for t in seen) / len(seen)
    low, high = expected.min(), expected.max()
    assert np.abs(tiles(data)[0] / 255 - ((expected[0] - low) / (high - low)).numpy()).max() < 0.01
    server.prompt["2"]["inputs"]["text"] = "another prompt"  # its node has not run yet
    server.sent.clear()
    families.sample(patched, steps=1)
    assert server.sent[-1][1]["names"] != ["b"]


def test_a_node_sends_no_more_than_four_times_a_second(server, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    for step in range(40):
        live.show(step, 40, ["a"], torch.rand(1, 4, 4), node="3")
        clock[0] += 0.1
    assert len(server.sent) == pytest.approx(4.0 / 0.25, abs=4) and len(server.sent) <= 16
    live.show(39, 40, ["a"], torch.rand(1, 4, 4), node="3", last=True)
    assert server.sent[-1][1]["step"] == 40


def test_effects_are_told_to_the_editor_that_has_started_the_run(server):
    patched = scfg.apply(families.shared("sd15"), observer=live.Preview("9"))[0]
    live._listeners.clear()  # who wants no maps is told all the same
    families.sample(patched, cfg=1.0)
    families.sample(patched, cfg=3.0)
    missing, none = (data for _, data, client in server.effects if client == "me")
    assert missing == {"node": "9", "prompt": "p", "missing": "at cfg 1 there is no guidance to even out; raise cfg"}
    assert none == {"node": "9", "prompt": "p", "missing": None}
    server.effects.clear()
    server.client_id = None  # started by a program
    live.Preview("9").effect(None)
    assert not server.effects
    server.client_id = "me"
    live.Preview(None).effect("why")
    assert server.effects[-1][1]["node"] == "7"  # the one that runs


def test_messages_are_small(server):
    live.show(0, 1, [str(i) for i in range(77)], torch.rand(77, 300, 200), node="3")
    data = server.sent[0][1]
    assert len(data["names"]) == live.MOST and max(data["size"]) == live.SIDE and len(data["image"]) < 64_000


def test_masks_and_regions_are_sent_as_they_are(server):
    mask = torch.tensor([[[True, False], [False, True]]])
    live.show(0, 1, ["dog"], mask, "masks")
    assert server.sent[-1][1]["node"] == "7"  # the one that runs
    assert tiles(server.sent[-1][1]).tolist() == [[[255, 0], [0, 255]]]
    live.Preview("7").regions(0, 1, torch.tensor([[1, 3], [3, 0]]), 7)
    assert server.sent[-1][1]["names"] == ["token 2"] and tiles(server.sent[-1][1]).tolist() == [[[0, 1], [1, 0]]]


def test_an_editor_can_come_and_go(server):
    live.listen("me", False)
    assert not live.listening()
    server.sockets["other"] = object()
    live.listen("other", True)
    live.listen("me", True)
    assert live.listening()
    del server.sockets["other"]
    live.listen("me", True)
    assert live._listeners == {"me"}
