"""Negative prompts at cfg 1 against attention written out, in whole runs of every family."""

import pytest
import torch

from attune.demo import model as demo_model
from attune.nodes.negative import AttuneNegative
from attune.patches import headfilter, negative, softpag
from attune.patches.maps import recorder
from attune.patches.maps.record import Settings as Kept
from attune.tests import families
from attune.tests.families import heads_of, text
from attune.tests.helpers import close, differs
from attune.tools.benchmarks.shared.pictures import generate

sample = families.sample
ONE = {"steps": 2, "size": (8, 12), "batch": 2, "cfg": 1.0}
STRONG = (6.0, 1.7, 0.6)


def guided(plus, minus, scale, tau, alpha):
    """The paper's equations; a token's norm is over heads and their widths."""
    beyond = plus + (scale - 1) * (plus - minus)
    ratio = beyond.abs().sum((1, 3), keepdim=True) / plus.abs().sum((1, 3), keepdim=True)
    return alpha * beyond / ratio * ratio.clamp(max=tau) + (1 - alpha) * plus


def reference(model, scale, tau, alpha, size=(8, 12)):
    """The model with the unconditional rows as the negative, both in one batch, and every attention to text written out in float64.

    In joint attention the picture's tokens of both rows get the guided output, as in ComfyUI's own node.
    """
    calls, real = families.calls_of(model), tuple(families.latent(model, *size).shape[-2:])
    patched = model.clone()
    patched.model_options["disable_cfg1_optimization"] = True
    count = [0]

    def override(func, q, k, v, heads, *rest, **kwargs):
        if families.of_text_apart(model, kwargs):
            return func(q, k, v, heads, *rest, **kwargs)
        _, kind = calls[count[0] % len(calls)]
        count[0] += 1
        if not kind:
            return func(q, k, v, heads, *rest, **kwargs)
        if not kwargs.get("skip_reshape"):
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        q, k, v = q.double(), k.double(), v.double()
        roles = kwargs["transformer_options"]["cond_or_uncond"]
        rows = len(q) // len(roles)
        plus, minus = (slice(roles.index(r) * rows, (roles.index(r) + 1) * rows) for r in (0, 1))

        def attend(a, b, c):
            return (a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5).softmax(-1) @ c

        out = attend(q, k, v)
        if kind == "cross":
            out[plus] = guided(out[plus], attend(q[plus], k[minus], v[minus]), scale, tau, alpha)
        elif kind == "joint":
            _, image = families.image_tokens(model, real, q.shape[2])
            both = guided(out[plus, :, image], out[minus, :, image], scale, tau, alpha)
            out[plus, :, image] = out[minus, :, image] = both
        return out.transpose(1, 2).flatten(2).float()

    patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    return patched


@pytest.mark.parametrize("name", families.EVERY)
def test_equals_the_written_out_run(name):
    """Of texts with one pooled vector: the batch's second picture is modulated by its own, ours by the prompt's."""
    model, other = families.shared(name), text(2, pooled_output=text(1)[0][1]["pooled_output"])
    ours = sample(negative.apply(model, other, *STRONG), negative=text(3), **ONE)
    close(ours, sample(reference(model, *STRONG), negative=other, **ONE), 2e-3)
    differs(ours, sample(model, **ONE))


@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_equals_comfyuis_own_node(name):
    """Where that one acts on attention to the text, and has the prompt's pooled text on its second picture."""
    core = pytest.importorskip("comfy_extras.nodes_nag", reason="in newer versions of ComfyUI")
    model, other = families.shared(name), text(2, pooled_output=text(1)[0][1]["pooled_output"])
    scale, tau, alpha = STRONG
    theirs = core.NAGuidance.execute(model, scale, alpha, tau).args[0]
    close(sample(negative.apply(model, other, *STRONG), **ONE), sample(theirs, negative=other, **ONE), 1e-3)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_cfg_batches_and_lengths(name):
    """With CFG only the conditional prediction changes, however ComfyUI cuts the batch; the negative is longer or shorter than the prompt."""
    model = families.shared(name)
    for tokens in (3, 21):
        one = negative.apply(model, text(2, tokens), *STRONG)
        alone = sample(one, **ONE)
        settings = {**ONE, "cfg": 3.0}
        seen = []
        one.set_model_sampler_post_cfg_function(lambda args, seen=seen: seen.append(args["cond_denoised"]) or args["denoised"])
        together = sample(one, negative=text(3), **settings)
        apart = sample(one, negative=text(3, 29), **settings)  # a text that ComfyUI cannot put beside the prompt
        close(seen[0], seen[2], 1e-3)
        differs(together, apart)
        differs(together, alone)


@pytest.mark.parametrize("name", families.NAMES)
def test_nothing_is_the_plain_model_to_the_last_bit(name):
    model = families.shared(name)
    plain = sample(model, **ONE)
    for settings in ((1.0, 2.5, 0.5), (4.0, 2.5, 0.0)):
        assert torch.equal(sample(negative.apply(model, text(2), *settings), **ONE), plain)
    half = negative.apply(model, text(2), *STRONG, start_percent=0.5, end_percent=0.6)
    assert torch.equal(sample(half, **ONE), plain)
    close(sample(negative.apply(model, text(1), *STRONG), text(1), **ONE), plain, 1e-4)  # nothing to go away from


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_negative_is_modulated_by_its_own_pooled_text(name):
    model = families.shared(name)
    own, prompts = text(2), text(2, pooled_output=text(1)[0][1]["pooled_output"])
    differs(sample(negative.apply(model, own, *STRONG), **ONE), sample(negative.apply(model, prompts, *STRONG), **ONE))


@pytest.mark.parametrize("name", families.NAMES)
def test_stacks_and_leaves_nothing(name):
    model = families.shared(name)
    before = (str(model.model_options), str(model.wrappers))
    one = negative.apply(model, text(2), *STRONG)
    alone = sample(one, **ONE)
    others = [
        negative.apply(one, text(5, 9), *STRONG),
        headfilter.apply(one, heads_of(model, "L1H0"), "both"),
        softpag.apply(one, 3.0, 1.0),
        softpag.apply(negative.apply(model, text(2), 1.0), 3.0, 1.0),
    ]
    found = [sample(stacked, **ONE) for stacked in others]
    for i, picture in enumerate(found):
        differs(picture, alone)
        for other in found[:i]:
            differs(picture, other)
    close(sample(negative.apply(softpag.apply(model, 3.0, 1.0), text(2), *STRONG), **ONE), found[2], 1e-4)
    kept, held = recorder.apply(one, Kept())
    assert torch.equal(sample(kept, **ONE), alone) and held.record().bytes
    assert (str(model.model_options), str(model.wrappers)) == before
    assert torch.equal(sample(one, **ONE), alone)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_perturbed_pass_has_the_negative_too(name):
    """SoftPAG that perturbs nothing to speak of adds nothing, so both of its predictions went away from the negative."""
    model = families.shared(name)
    one = negative.apply(model, text(2), *STRONG)
    close(sample(softpag.apply(one, 3.0, 1e-6), **ONE), sample(one, **ONE), 1e-3)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_under_areas(name):
    """Two prompts, one of them in a part of the picture: each goes away from the negative, together or apart."""
    model = families.shared(name)
    left = text(1) + text(4, area=(8, 8, 0, 0))
    one = negative.apply(model, text(2), *STRONG)
    differs(sample(one, left, **{**ONE, "size": (8, 16)}), sample(model, left, **{**ONE, "size": (8, 16)}))
    whole = text(1) + text(4)
    longer = text(1) + text(4, 29)
    for prompt in (whole, longer):
        assert sample(one, prompt, **ONE).isfinite().all()


def test_bad_input_is_told():
    model = families.shared("sd15")
    with pytest.raises(ValueError, match="the negative holds 2 prompts"):
        negative.apply(model, text(2) + text(3))
    with pytest.raises(ValueError, match="the negative has an area of its own"):
        negative.apply(model, text(2, area=(4, 4, 0, 0)))
    with pytest.raises(ValueError, match="set it to 1 or more"):
        negative.apply(model, text(2), tau=0.5)
    with pytest.raises(ValueError, match="after end_percent"):
        negative.apply(model, text(2), start_percent=0.5, end_percent=0.4)
    with pytest.raises(RuntimeError, match="works with KSampler"):
        patched = negative.apply(model, text(2))
        options = {**patched.model_options["transformer_options"], "cond_or_uncond": [0]}
        options["wrappers"] = patched.wrappers
        model.model.apply_model(families.latent(model), torch.ones(1), c_crossattn=text(1)[0][0], transformer_options=options)


def test_every_family_has_its_own_strength():
    assert negative.strengths("unet", -1, -1, -1) == (5.0, 2.5, 0.5)
    assert negative.strengths("flux", -1, -1, -1) == (5.0, 2.5, 0.25)
    assert negative.strengths("flux", 7.0, -1, 1.0) == (7.0, 2.5, 1.0)


def test_the_node_on_the_bundled_model():
    model, clip, vae = demo_model.load()
    schema = AttuneNegative.define_schema()
    assert [i.id for i in schema.inputs] == ["model", "negative", "scale", "tau", "alpha", "start_percent", "end_percent"]
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))
    (patched,) = AttuneNegative.execute(
        model, clip.encode_from_tokens_scheduled(clip.tokenize("a star " * 40)), 5.0, 2.5, 0.5, 0, 1
    ).args
    drawn = [generate(m, clip, vae, ["a red star"], 1.0, 1, 4) for m in (model, patched)]
    differs(*drawn)
