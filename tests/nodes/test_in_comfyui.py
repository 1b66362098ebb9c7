"""The pack inside a real ComfyUI: its nodes as the editor sees them, and every example workflow."""

import subprocess
import sys

import pytest
from PIL import Image

from attune.tests.helpers import DATA, EXAMPLES, run_prompt
from attune.tools.runtime import RunError
from attune.tools.runtime.setup import ROOT
from attune.tools.runtime.workflow import check, check_graph, missing_files, read, specs, to_prompt

TINY = DATA / "tiny_workflow.json"


def test_the_nodes_are_there_and_explain_themselves(info):
    ours = {name: node for name, node in info.items() if node["python_module"] == f"custom_nodes.{ROOT.name}"}
    assert {"AttuneDemoModel", "AttuneHeads", "AttuneSoftPAG"} <= set(ours)
    unexplained = []
    for name, node in ours.items():
        assert name.startswith("Attune") and node["display_name"] != name and node["category"]
        unexplained += [] if node["description"] else [name]
        unexplained += [
            f"{name}.{entry}" for entry, spec in specs(node).items() if not (len(spec) > 1 and spec[1].get("tooltip"))
        ]
    assert unexplained == []


def test_nothing_but_the_pack_is_loaded(info):
    modules = {node["python_module"] for node in info.values()}
    assert {name for name in modules if name.startswith("custom_nodes.")} == {f"custom_nodes.{ROOT.name}"}


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_comfyui(path, info):
    graph = read(path)
    assert check_graph(graph) == []
    assert check(to_prompt(graph, info), info) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, info, server):
    """Two steps and two pictures are enough to see that ComfyUI accepts it and every node works."""
    prompt = to_prompt(read(path), info)
    if missing := missing_files(prompt, info):
        pytest.skip(f"needs {', '.join(missing)}")
    for node in prompt.values():
        inputs = node["inputs"]
        inputs |= {name: 2 for name in ("steps", "batch_size") if isinstance(inputs.get(name), int) and inputs[name] > 2}
    pictures, steps = run_prompt(server, prompt)
    saving = [number for number, node in prompt.items() if node["class_type"] == "SaveImage"]
    assert saving and all(pictures[number] for number in saving)
    assert any(value == total == 2 for _, value, total in steps)


def test_a_workflow_that_comfyui_rejects(server, info):
    prompt = to_prompt(read(TINY), info)
    prompt["1"]["inputs"]["width"] = -5
    with pytest.raises(RunError, match=r"ComfyUI rejected the workflow: EmptyImage \(node 1\): Value -5 smaller than min"):
        run_prompt(server, prompt)


def test_a_workflow_of_which_comfyui_would_run_only_a_part_is_rejected(server, info):
    prompt = to_prompt(read(TINY), info)
    prompt["9"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "attune/part"}}
    with pytest.raises(RunError, match=r"SaveImage \(node 9\): Required input is missing"):
        run_prompt(server, prompt)


def test_a_node_that_fails_is_named(server):
    pattern = {"string": "a", "regex_pattern": "(", "case_insensitive": False, "multiline": False, "dotall": False}
    prompt = {
        "1": {"class_type": "RegexMatch", "inputs": pattern},
        "2": {"class_type": "RegexReplace", "inputs": {**pattern, "replace": "b"}, "_meta": {"title": "Bad pattern"}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }
    with pytest.raises(RunError, match=r"ComfyUI could not run 'Bad pattern' \(node 2\): "):
        run_prompt(server, prompt)


def test_the_main_job_from_the_command_line(tmp_path):
    """Real set-up, real server, real pictures, with a workflow that needs no model."""
    command = [sys.executable, str(ROOT / "run.py"), "demo", "--workflow", str(TINY), "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01-red-1.png", "01-red-2.png", "grid.png"]
    assert str(tmp_path / "grid.png") in result.stdout
    picture = Image.open(tmp_path / "01-red-1.png")
    assert picture.size == (64, 64) and picture.getpixel((0, 0)) == (255, 0, 0)
