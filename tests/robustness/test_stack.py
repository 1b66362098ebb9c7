"""Stacks of our nodes with each other and with ComfyUI's own patches: a picture or a sentence, and the plain model afterwards."""

import random
from collections import Counter

import comfy.model_management
import pytest
import torch

from attune.tools.robustness import models, stack
from attune.tools.robustness.stack import Stack

SEED, COUNT = 2, 160
INTERRUPTIONS = 20


@pytest.mark.parametrize("part", range(8))
def test_stacks_work_or_are_refused(part):
    assert stack.failures(stack.sampled(SEED, COUNT)[part::8], Counter()) == []


def test_the_matrix_has_every_pair_of_our_nodes_and_every_patch_before_and_after():
    every = set(stack.stacks())
    for family in models.FAMILIES:
        assert len(stack.cores(family)) >= 12
        for one in stack.OURS:
            for two in stack.OURS:
                assert Stack(family, (one, two)) in every
                for core in stack.cores(family):
                    assert Stack(family, (core, one, two)) in every and Stack(family, (one, two, core)) in every
    assert {"FreeU_V2", "HyperTile", "SelfAttentionGuidance", "PatchModelAddDownscale"} <= set(stack.cores("sdxl"))


def test_what_must_not_come_of_a_stack_is_seen(monkeypatch):
    def raw(model, family):
        raise KeyError("block")

    def leaves(model, family):
        model.model.diffusion_model.register_forward_hook(lambda *_: None)
        return model

    def changes(model, family):
        with torch.no_grad():
            next(model.model.diffusion_model.parameters()).mul_(1.5)
        return model

    monkeypatch.setattr(stack, "OURS", {"raw": raw, "leaves": leaves, "changes": changes})
    stack.plain("sd15")
    weights = {name: t.clone() for name, t in models.model("sd15").model.state_dict().items()}
    found = []
    try:
        for name in stack.OURS:
            found += stack.failures([Stack("sd15", (name,))], Counter())
            models.model("sd15").model.load_state_dict(weights)
            for module in models.model("sd15").model.modules():
                module._forward_hooks.clear()
    finally:
        models.model("sd15").model.load_state_dict(weights)
    assert [words.splitlines()[1].strip()[:20] for words in found] == [
        "KeyError('block') (o",
        "left on the plain mo",
        "the plain model give",
    ]


# --- interruptions ----------------------------------------------------------------------------------------------------


def interrupted(patched, calls):
    """The model with an attention override that counts calls, as another pack's, and interrupts the run at one of them."""
    model = patched.clone()
    options = model.model_options.setdefault("transformer_options", {})
    before = options.get("optimized_attention_override")

    def override(func, *args, **kwargs):
        calls[0] -= 1
        if calls[0] == 0:
            raise comfy.model_management.InterruptProcessingException
        return func(*args, **kwargs) if before is None else before(func, *args, **kwargs)

    options["optimized_attention_override"] = override
    return model


@pytest.mark.parametrize("number", range(INTERRUPTIONS))
def test_nothing_survives_an_interruption(number):
    rng = random.Random(f"{SEED} {number}")
    family = models.FAMILIES[number % len(models.FAMILIES)]
    names = (rng.choice(list(stack.OURS)), rng.choice(stack.cores(family)), rng.choice(list(stack.OURS)))
    given = Stack(family, names, "Detail++ Sampler" if family in ("sd15", "sdxl") and rng.random() < 0.3 else "KSampler")
    expected = stack.plain(family)
    try:
        stack.SAMPLERS[given.sampler](interrupted(given.model(), [rng.randint(1, 30)]), family, lambda *_: None)
    except comfy.model_management.InterruptProcessingException:
        pass
    except (ValueError, RuntimeError) as error:
        assert stack.fault(error) is None, given
    assert stack.runs_alive() == 0, given
    assert torch.equal(models.sample(models.model(family), family), expected), given
    assert stack.left(family) == [], given
