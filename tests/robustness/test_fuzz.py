"""Whatever a node is given, it gives a result without NaN or says in a sentence what to do, before sampling starts."""

from types import SimpleNamespace

import pytest
import torch
from comfy_api.latest import io

from attune.tools.robustness import fuzz

SEED, COUNT = 1, 50


@pytest.mark.parametrize("node", fuzz.every_node(), ids=lambda node: node.__name__)
def test_no_input_breaks_a_node(node):
    assert fuzz.failures(node, SEED, COUNT) == []


class Broken(io.ComfyNode):
    """A node that does what no node of ours may do."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        numbers = [io.Int.Input("which", default=0, min=0, max=4)]
        return io.Schema(node_id="Broken", display_name="Broken", inputs=numbers, outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, which) -> io.NodeOutput:
        if which == 1:
            raise KeyError("samples")
        if which == 2:
            raise ValueError("no")
        return io.NodeOutput(torch.full((1,), float("nan")) if which == 3 else torch.zeros(()).reshape(which, which))


def test_what_must_not_come_of_it_is_seen():
    found = fuzz.failures(Broken, SEED, 400)
    for words in ("KeyError", "no sentence", "NaN or infinity", "not raised by the pack"):
        assert any(words in line for line in found), words


def test_inputs_of_a_number_are_the_same_every_time_and_hostile_ones_are_among_them():
    nodes = fuzz.every_node()
    assert all(str(fuzz.case(node, 5, 7)) == str(fuzz.case(node, 5, 7)) for node in nodes)
    assert str(fuzz.case(nodes[0], 5, 7)) != str(fuzz.case(nodes[0], 6, 7))
    softpag = next(node for node in nodes if node.__name__ == "AttuneSoftPAG")
    told = "\n".join(str(fuzz.case(softpag, SEED, number)) for number in range(400))
    assert all(words in told for words in ("nan", "inf", "thousands of digits", "model=None"))


def test_the_command_says_what_failed(capsys, monkeypatch):
    assert fuzz.main(["--node", "AttuneSCBPrompts", "--count", "5"]) == 0
    assert "5 inputs" in capsys.readouterr().out
    broken = SimpleNamespace(kind=fuzz.WRONG, words="KeyError: 'samples'")
    monkeypatch.setattr(fuzz, "run", lambda given: broken)
    assert fuzz.main(["--node", "AttuneSCBPrompts", "--count", "5"]) == 1
    assert "KeyError: 'samples'" in capsys.readouterr().out
