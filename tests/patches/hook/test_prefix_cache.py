"""What a replayed pass looks like to everybody else: the same as a pass in full."""

from __future__ import annotations

from typing import Any

import comfy.gligen
import comfy.model_patcher
import pytest
import torch
from torch import nn

from attune.patches import softpag
from attune.patches.hook import prefix_cache
from attune.patches.hook.install import model_sites
from attune.patches.hook.run import EXTRA
from attune.tests import families
from attune.tests.families import heads_of
from attune.tests.helpers import close, differs

sample = families.sample
TOLD = ("transformer_index", "block", "block_index", "block_type", "total_blocks", "activations_shape", "original_shape")
ATTENTION = ("attn1_patch", "attn2_patch", "attn1_output_patch", "attn2_output_patch", "middle_patch", "attn2_replace")


def told(options: dict[str, Any]) -> dict[str, Any]:
    """What ComfyUI writes down in the options as it goes along."""
    return {name: list(options[name]) if name.endswith("shape") else options[name] for name in TOLD if name in options}


def recording_unet(model: Any, events: list[Any]) -> Any:
    """A model with every kind of patch of a UNet on it, each of which notes what the options of a pass of our own say."""
    model = model.clone()

    def note(name: str, options: dict[str, Any]) -> None:
        if EXTRA in options:
            events.append((name, told(options)))

    def patch(name: str, count: int) -> Any:
        def act(*args: Any) -> Any:
            note(name, args[-1])
            return args[0] if count == 1 else args[:count]

        return act

    for name, count in (
        ("attn1_patch", 3),
        ("attn2_patch", 3),
        ("attn1_output_patch", 1),
        ("attn2_output_patch", 1),
        ("middle_patch", 1),
        ("input_block_patch", 1),
        ("input_block_patch_after_skip", 1),
        ("output_block_patch", 2),
    ):
        model.set_model_patch(patch(name, count), name)

    def owner(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        note("attn2_replace", options)
        return q + v.mean(1, keepdim=True)

    last = model_sites(model)[1][-1].block
    model.set_model_attn2_replace(owner, "output", last[1])
    return model


def recording_transformer(model: Any, events: list[Any]) -> Any:
    """A model with an owner of every block and a patch of its input, which note what the options of a pass of our own say."""
    model = model.clone()

    def owner(block: Any) -> Any:
        def act(args: dict[str, Any], extra: dict[str, Any]) -> Any:
            if EXTRA in args["transformer_options"]:
                events.append((block, told(args["transformer_options"])))
            return extra["original_block"](args)

        return act

    names = {"joint": "double_block", "double": "double_block", "single": "single_block"}
    for site in model_sites(model)[1]:
        kind, number = site.name.split(".")
        model.set_model_patch_replace(owner((names[kind], int(number))), "dit", names[kind], int(number))
    return model


FIRST = [
    ("sd15", "input.3.0"),
    ("sd15", "middle.0.0"),
    ("sd15", "output.2.0"),
    ("sdxl", "middle.0.1"),
    ("sdxl", "output.1.0"),
    ("sd3", "joint.2"),
    ("sd35", "joint.1"),
    ("flux", "double.1"),
    ("flux", "single.1"),
    ("qwen_image", "joint.1"),
]


@pytest.mark.parametrize(("name", "site"), FIRST)
def test_options_say_in_a_replayed_pass_what_they_say_in_a_full_one(
    name: str, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Index, block, shapes: every patch after the replayed blocks, and ComfyUI's own between them, finds the same."""
    events: list[Any] = []
    unet = name in ("sd15", "sdxl")
    model = (recording_unet if unet else recording_transformer)(families.shared(name), events)
    patched = softpag.apply(model, 2.0, 0.5, 0, 1, 0, heads_of(model, site))
    replayed = sample(patched, steps=1, batch=2)
    seen = events.copy()
    events.clear()
    monkeypatch.setattr(prefix_cache.PrefixCache, "_recorded", lambda *_: None)
    full = sample(patched, steps=1, batch=2)
    close(replayed, full)
    block = {s.name: s.block for s in model_sites(model)[1]}[site]
    order = ["input", "middle", "output"]

    def before(event: Any) -> bool:
        """Attention inside a block that is replayed."""
        if not unet or event[0] not in ATTENTION:
            return False
        own = event[1]["block"]
        return (order.index(own[0]), own[1]) < (order.index(block[0].split("_")[0]), block[1])

    kept = [event for event in events if not before(event)]
    assert len(seen) < len(events) or not unet
    assert seen == kept and seen


class Fuser(nn.Module):
    """In place of GLIGEN's gated attention: does something else in every transformer."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def forward(self, x: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
        return x * (1 + 0.1 * self.number) + objects.mean()


class Positions(nn.Module):
    def forward(self, boxes: torch.Tensor, masks: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return boxes.mean(dim=(1, 2), keepdim=True) + embeddings.mean(dim=(1, 2), keepdim=True)


@pytest.mark.parametrize("site", ["middle.0.0", "output.1.0"])
def test_gligen_beside_softpag(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GLIGEN finds its layers by ``transformer_index``."""
    model = families.shared("sd15")
    gligen = comfy.gligen.Gligen([Fuser(i) for i in range(len(model_sites(model)[1]))], Positions(), 8)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(gligen, load_device=cpu, offload_device=cpu)
    positive = families.text(1, gligen=("position", patcher, [(torch.ones(1, 8), 4, 4, 0, 2)]))
    patched = softpag.apply(model, 2.0, 0.5, 0, 1, 0, heads_of(model, site))
    ours = sample(patched, positive=positive)
    differs(ours, sample(patched))
    monkeypatch.setattr(prefix_cache.PrefixCache, "_recorded", lambda *_: None)
    close(ours, sample(patched, positive=positive))
