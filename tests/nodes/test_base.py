"""What nodes refuse before they compute anything: values that do not fit their schemas, in a sentence."""

import asyncio
import math

import numpy
import pytest
import torch
from comfy_api.latest import io

from attune.nodes import Attune
from attune.nodes.base import AttuneNode, check
from attune.patches.hook.sites import Heads

NODES = asyncio.run(Attune().get_node_list())
HUGE = 10**5000
LATENT = {"samples": torch.zeros(1, 4, 8, 8)}


class Example(AttuneNode):
    calls = 0

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Example",
            display_name="Example",
            inputs=[
                io.Image.Input("image", optional=True),
                io.Float.Input("scale", default=1.0, min=0.0, max=100.0),
                io.Int.Input("steps", default=2, min=1, max=50, optional=True),
            ],
            outputs=[io.Float.Output()],
        )

    @classmethod
    def execute(cls, image=None, scale=1.0, steps=2) -> io.NodeOutput:
        Example.calls += 1
        return io.NodeOutput(scale * steps)


def schema(*inputs, **more) -> io.Schema:
    return io.Schema(node_id="Example", display_name="Example", inputs=list(inputs), outputs=[], **more)


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_every_node_checks_its_inputs(node):
    assert issubclass(node, AttuneNode)
    required = [entry for entry in node.define_schema().inputs if not entry.optional]
    nothing = {entry.id: [None] if node.define_schema().is_input_list else None for entry in required}
    with pytest.raises(ValueError, match=f"{required[0].id}.*(connect|load)"):
        node.execute(**nothing)


def test_a_value_is_checked_however_it_is_given():
    before = Example.calls
    for call in (lambda: Example.execute(None, math.nan), lambda: Example.execute(scale=math.nan)):
        with pytest.raises(ValueError, match=r"^Example: scale is nan; give a number from 0\.0 to 100\.0\.$"):
            call()
    assert Example.calls == before
    assert Example.execute(None, 2.0).args == (4.0,)
    assert Example.hidden.unique_id is None and Example.hidden.prompt is None


def test_the_classes_that_comfyui_derives_check_once_and_keep_the_signature():
    import inspect

    clone = Example.PREPARE_CLASS_CLONE({})
    assert clone.execute.__func__ is Example.execute.__func__
    assert clone.EXECUTE_NORMALIZED(scale=3.0).args == (6.0,)
    assert list(inspect.signature(Example.execute).parameters) == ["image", "scale", "steps"]


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        (io.Float.Input("x", min=0.0, max=1.0), math.nan, "x is nan; give a number from 0.0 to 1.0"),
        (io.Float.Input("x"), -math.inf, "x is -inf; give a number"),
        (io.Float.Input("x", min=0.0, max=1.0), 1.5, "x is 1.5"),
        (io.Float.Input("x", min=0.0, max=1.0), HUGE, "x is a number of thousands of digits"),
        (io.Float.Input("x"), "1", "x is “1”; give a number"),
        (io.Int.Input("x", min=0, max=9), 2.5, "x is 2.5; give a whole number from 0 to 9"),
        (io.Int.Input("x"), HUGE, "thousands of digits"),
        (io.String.Input("x"), 3, "x is 3; it must be a text"),
        (io.String.Input("x"), "ab\ud800", "half a character at place 3"),
        (io.Combo.Input("x", options=["a", "b"]), "c\ud800", "there is no x “c?”; choose one of: a, b"),
        (io.Combo.Input("x", options=["a", "b"]), ["a"], "x is a list; choose one of: a, b"),
        (io.Boolean.Input("x"), "yes", "x is “yes”; it must be on or off"),
        (io.Clip.Input("clip"), None, "clip: there is no text encoder"),
        (io.Vae.Input("vae"), None, "vae: there is no VAE"),
        (io.Model.Input("model"), None, "model: there is no diffusion model"),
        (io.Model.Input("model"), torch.zeros(1), "model is a tensor of float32 and no MODEL"),
        (io.Custom("ATTUNE_WORDS").Input("words"), "cat", "words is “cat” and no ATTUNE_WORDS"),
        (io.Custom("ATTUNE_HEADS").Input("heads"), Heads("unet", ()), "heads has no chosen in it"),
        (io.Image.Input("image"), torch.zeros(1, 4, 4, 2), "has 2 channels"),
        (io.Image.Input("image"), torch.zeros(0, 4, 4, 3), r"has the shape [0, 4, 4, 3] and not [B, H, W, C]"),
        (io.Image.Input("image"), torch.full((1, 4, 4, 3), math.nan), "not finite numbers"),
        (io.Image.Input("image"), torch.zeros(1, 4, 4, 3, dtype=torch.uint8), "is a tensor of uint8"),
        (io.Mask.Input("mask"), torch.zeros(1, 1, 4, 4), "has the shape [1, 1, 4, 4] and not [B, H, W]"),
        (io.Latent.Input("samples"), {"samples": torch.zeros(1, 4, 1, 8, 8)}, "of a video"),
        (io.Latent.Input("samples"), {"samples": torch.zeros(0, 4, 8, 8)}, "has the shape [0, 4, 8, 8]"),
        (io.Latent.Input("samples"), {}, "samples is a NoneType"),
        (io.Latent.Input("samples"), {**LATENT, "noise_mask": torch.full((1, 8, 8), math.nan)}, "noise mask that is not"),
        (io.Latent.Input("samples"), {**LATENT, "noise_mask": "x"}, "noise mask that is not"),
        (io.Latent.Input("samples"), {**LATENT, "batch_index": [HUGE]}, "batch_index that is no list"),
        (io.Latent.Input("samples"), {**LATENT, "batch_index": "x"}, "batch_index that is no list"),
        (io.Latent.Input("samples"), torch.zeros(1, 4, 8, 8), "samples is a tensor of float32"),
        (io.Conditioning.Input("positive"), [], "positive holds no prompt"),
        (io.Conditioning.Input("positive"), [torch.zeros(1, 2, 3)], "no pair of an encoded text and its options"),
        (io.Conditioning.Input("positive"), [[torch.zeros(2, 3), {}]], r"has the shape [2, 3] and not [B, N, C]"),
        (io.Conditioning.Input("positive"), [[None, {}]], "positive is a NoneType"),
    ],
    ids=lambda value: type(value).__name__,  # not what is in it, which pytest could not write
)
def test_what_is_wrong_is_said(entry, value, words):
    with pytest.raises(ValueError) as told:
        check(schema(entry), {entry.id: value})
    sentence = str(told.value)
    assert sentence.startswith("Example: ") and words in sentence and sentence.endswith(".") and sentence.encode()


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        (io.Float.Input("x", min=0.0, max=1.0), 1),
        (io.Float.Input("x", min=0.0, max=1.0), numpy.float32(0.5)),
        (io.Int.Input("x", min=0, max=9), numpy.int64(9)),
        (io.Int.Input("x", min=0, max=0xFFFFFFFFFFFFFFFF), 0xFFFFFFFFFFFFFFFF),
        (io.String.Input("x"), "“ünï” 🟥"),
        (io.Image.Input("image"), torch.zeros(1, 4, 4, 4, dtype=torch.float16)),
        (io.Image.Input("image", optional=True), None),
        (io.Mask.Input("mask"), torch.zeros(4, 4, dtype=torch.bool)),
        (io.Latent.Input("samples"), {"samples": torch.zeros(1, 16, 8, 8, dtype=torch.bfloat16), "batch_index": [0]}),
        (io.Latent.Input("samples"), {**LATENT, "noise_mask": torch.ones(1, 1, 64, 64)}),
        (io.Conditioning.Input("positive"), [[torch.zeros(1, 2, 3), {"pooled_output": None}]]),
    ],
)
def test_what_fits_passes(entry, value):
    check(schema(entry), {entry.id: value})


def test_lists_are_checked_one_by_one():
    entry = io.Int.Input("x", min=0, max=9)
    check(schema(entry, is_input_list=True), {"x": [1, 2]})
    with pytest.raises(ValueError, match="x is 10"):
        check(schema(entry, is_input_list=True), {"x": [1, 10]})


def test_what_a_node_shows_on_itself_is_its_own():
    """ComfyUI hands an equal node's result on, whose number it knows, unless the schema says otherwise."""
    for node in NODES:
        schema = node.define_schema()
        assert schema.not_idempotent == (io.Hidden.unique_id in (schema.hidden or [])), schema.node_id
