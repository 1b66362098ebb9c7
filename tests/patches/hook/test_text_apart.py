"""Models that compute their text apart from the image, once a run, with reference pictures in it (Qwen-Image 2.1)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attune.patches import negative, softpag
from attune.patches.hook.install import request
from attune.patches.hook.requests import BlendOutputs, ReadWeights
from attune.tests import families
from attune.tests.families import heads_of
from attune.tests.helpers import close, differs

sample = families.sample
PLACE = ("joint.1", "joint")
SIZE = (12, 8)  # 6 × 4 latent pixels, which are tokens
REFERENCES = ((6, 4), (3, 5))  # one with as many tokens as the image
SLOTS = (2, 3)
pytestmark = pytest.mark.skipif("qwen_image21" not in families.EVERY, reason="this ComfyUI has no Qwen-Image 2.1")


def with_references(seed: int) -> list[Any]:
    """A text of seven tokens with pictures before its third and its fourth."""
    generator = torch.Generator().manual_seed(3)
    pictures = [torch.randn(1, 64, *size, generator=generator) for size in REFERENCES]
    return families.text(seed, reference_latents=pictures, image_slots=list(SLOTS))


def without_memory(model: Any) -> Any:
    """A clone for which ComfyUI keeps no texts."""
    patched = model.clone()
    patched.model_options.setdefault("transformer_options", {})["qwen_image21_cache"] = {"device": "off"}
    return patched


def test_reference_pictures_are_neither_image_nor_words() -> None:
    model = families.shared("qwen_image21")
    count, extra = 6 * 4, sum(h * w for h, w in REFERENCES)
    seen: list[Tensor] = []
    right: list[Tensor] = []
    patched = model.clone()
    request(patched, ReadWeights({PLACE: None}, lambda call, w: seen.append(w), rows="cond", columns=(4, 6)))
    request(patched, BlendOutputs({PLACE: (2,)}, lambda call, heads: heads.v[..., : heads.q.shape[-2], :]))
    written = model.clone()
    calls = {"block": -1}

    def override(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *rest: Any, **kwargs: Any) -> Tensor:
        if k.shape[1] < 7 + extra + count:
            return func(q, k, v, heads, *rest, **kwargs)
        calls["block"] += 1
        if calls["block"] % 3 != 1:
            return func(q, k, v, heads, *rest, **kwargs)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2).double() for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        roles = torch.tensor(kwargs["transformer_options"]["cond_or_uncond"])
        right.append(weights[roles == 0][..., [extra + 4, extra + 6]])
        out = weights @ v
        out[:, 2] = v[:, 2, -count:]
        return out.transpose(1, 2).flatten(2).float()

    written.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    settings = {"positive": with_references(1), "negative": with_references(2), "size": SIZE, "steps": 2}
    ours = sample(patched, **settings)
    close(ours, sample(without_memory(written), **settings))
    differs(ours, sample(model, **settings))
    assert len(seen) == len(right) == 2
    for mine, theirs in zip(seen, right, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("applied", ["softpag", "negative", "read"])
@pytest.mark.parametrize("references", [False, True])
def test_a_run_is_the_same_whether_comfyui_keeps_texts_or_not(applied: str, references: bool) -> None:
    """And ours do not keep it from doing so: a text runs once, where nothing is kept once a step."""
    model = families.shared("qwen_image21")
    if applied == "softpag":  # a pass of its own, which ends before the run does
        patched = softpag.apply(model, 2.0, 0.5, 0, 0.5, 0, heads_of(model, "joint.1:0,2"))
    elif applied == "negative":
        patched = negative.apply(model, with_references(5) if references else families.text(5))
    else:
        patched = model.clone()
        request(patched, ReadWeights({PLACE: None}, lambda call, w: None))
    text = with_references if references else families.text
    settings = {"positive": text(1), "negative": families.text(2, 9), "size": SIZE, "steps": 4}
    block = model.model.diffusion_model.transformer_blocks[0]
    runs: list[int] = []
    handle = block.register_forward_hook(lambda _, args, out: runs.append(args[4]))
    try:
        kept = sample(patched, **settings)
        texts_kept, runs[:] = sum(n > 0 for n in runs), []
        close(kept, sample(without_memory(patched), **settings))
        assert sum(n > 0 for n in runs) > texts_kept
    finally:
        handle.remove()
    differs(kept, sample(model, **settings)) if applied != "read" else close(kept, sample(model, **settings))
    # In perturbed passes as well, and a negative's in every conditional forward.
    assert texts_kept == 2 + {"softpag": 2, "negative": 4, "read": 0}[applied]
