"""The converter from the editor's format to the API's, and its checks. No server is needed."""

import copy

import pytest

from attune.tools.runtime import RunError
from attune.tools.runtime.workflow import (
    BYPASSED,
    MUTED,
    check,
    check_graph,
    missing_files,
    positive_texts,
    to_prompt,
    with_text_and_seed,
)

MODEL, LATENT = ["MODEL", {}], ["LATENT", {}]
INFO = {
    "Loader": {"input": {"required": {"name": [["a.safetensors"], {}]}}, "output": ["MODEL", "CLIP"]},
    "Text": {
        "input": {"required": {"text": ["STRING", {"multiline": True}], "clip": ["CLIP", {}]}},
        "output": ["CONDITIONING"],
    },
    "Patch": {"input": {"required": {"model": MODEL, "scale": ["FLOAT", {"min": 0.0, "max": 10.0}]}}, "output": ["MODEL"]},
    "Sampler": {
        "input": {
            "required": {"sampler": ["COMBO", {"options": ["euler", "dpm"]}], "seed": ["INT", {}], "steps": ["INT", {}]},
            "optional": {"model": MODEL, "positive": ["CONDITIONING", {}], "forced": ["INT", {"forceInput": True}]},
        },
        "input_order": {"required": ["seed", "steps", "sampler"], "optional": ["model", "positive", "forced"]},
        "output": ["LATENT"],
    },
}


def _node(number: int, kind: str, widgets: list, inputs: tuple = (), outputs: tuple = (), mode: int = 0) -> dict:
    return {
        "id": number,
        "type": kind,
        "mode": mode,
        "widgets_values": widgets,
        "inputs": [{"name": name, "type": type_, "link": link} for name, type_, link in inputs],
        "outputs": [{"name": type_, "type": type_, "links": list(links)} for type_, links in outputs],
    }


@pytest.fixture
def graph() -> dict:
    return {
        "last_node_id": 6,
        "last_link_id": 7,
        "nodes": [
            _node(1, "Loader", ["a.safetensors"], outputs=(("MODEL", [1]), ("CLIP", [2]))),
            _node(2, "Text", ["a cat"], (("clip", "CLIP", 2),), (("CONDITIONING", [3]),)),
            _node(3, "Patch", [1.5], (("model", "MODEL", 1),), (("MODEL", [4]),)),
            _node(4, "Reroute", [], (("", "*", 4),), (("MODEL", [5]),)),
            _node(
                5,
                "Sampler",
                [7, "randomize", 20, "euler"],
                (("model", "MODEL", 5), ("positive", "CONDITIONING", 3), ("steps", "INT", 7)),
            ),
            _node(6, "PrimitiveNode", [12, "fixed"], outputs=(("INT", [7]),)),
            {"id": 0, "type": "Note", "widgets_values": ["hello"]},
        ],
        "links": [
            [1, 1, 0, 3, 0, "MODEL"],
            [2, 1, 1, 2, 0, "CLIP"],
            [3, 2, 0, 5, 1, "CONDITIONING"],
            [4, 3, 0, 4, 0, "MODEL"],
            [5, 4, 0, 5, 0, "MODEL"],
            {"id": 7, "origin_id": 6, "origin_slot": 0, "target_id": 5, "target_slot": 2, "type": "INT"},
        ],
    }


def test_widgets_links_and_the_editors_own_nodes(graph):
    prompt = to_prompt(graph, INFO)
    assert set(prompt) == {"1", "2", "3", "5"}
    assert prompt["5"]["inputs"] == {"seed": 7, "steps": 12, "sampler": "euler", "model": ["3", 0], "positive": ["2", 0]}
    assert check(prompt, INFO) == [] and missing_files(prompt, INFO) == []


def test_a_seed_without_its_control_value_is_read_too(graph):
    graph["nodes"][4]["widgets_values"] = [7, 20, "euler"]
    assert to_prompt(graph, INFO)["5"]["inputs"]["sampler"] == "euler"


def test_a_bypassed_node_passes_its_input_on_and_a_muted_one_nothing(graph):
    graph["nodes"][2]["mode"] = BYPASSED
    assert to_prompt(graph, INFO)["5"]["inputs"]["model"] == ["1", 0]
    graph["nodes"][2]["mode"] = MUTED
    assert "model" not in to_prompt(graph, INFO)["5"]["inputs"]


def test_an_unknown_node_is_named(graph):
    graph["nodes"][2]["type"] = "Nowhere"
    with pytest.raises(RunError, match="'Nowhere'"):
        to_prompt(graph, INFO)


@pytest.mark.parametrize(
    ("node", "name", "value", "complaint"),
    [
        ("5", "sampler", "eulr", "none of its choices"),
        ("5", "steps", "many", "no INT"),
        ("3", "scale", 11.0, "outside 0.0 to 10.0"),
        ("3", "scal", 1.0, "no input 'scal'"),
        ("3", "model", ["1", 1], "takes MODEL and is linked to CLIP"),
        ("3", "model", ["1", 2], "does not exist"),
        ("2", "text", 3, "no STRING"),
        ("5", "seed", None, "'seed' is missing"),
    ],
)
def test_check_finds_what_is_wrong(graph, node, name, value, complaint):
    prompt = to_prompt(graph, INFO)
    if value is None:
        del prompt[node]["inputs"][name]
    else:
        prompt[node]["inputs"][name] = value
    problems = check(prompt, INFO)
    assert len(problems) == 1 and complaint in problems[0]


def test_a_missing_checkpoint_is_told_apart_from_a_wrong_value(graph):
    graph["nodes"][0]["widgets_values"] = ["mine.safetensors"]
    prompt = to_prompt(graph, INFO)
    assert check(prompt, INFO) == [] and missing_files(prompt, INFO) == ["mine.safetensors"]


def test_text_and_seed_are_replaced_in_a_copy(graph):
    prompt = to_prompt(graph, INFO)
    before = copy.deepcopy(prompt)
    assert positive_texts(prompt) == ["2"]
    changed = with_text_and_seed(prompt, "a dog", 99)
    assert changed["2"]["inputs"]["text"] == "a dog" and changed["5"]["inputs"]["seed"] == 99
    assert prompt == before


def test_a_graph_that_disagrees_with_itself_is_found(graph):
    assert check_graph(graph) == []
    graph["nodes"][2]["outputs"][0]["links"] = []
    graph["nodes"][4]["inputs"][0]["link"] = 9
    graph["last_link_id"] = 6
    problems = check_graph(graph)
    assert len(problems) == 4, problems
