"""The attention hook: every verb against softmax written out, its neighbours, and that nothing stays behind."""

import comfy.ldm.modules.attention as backends
import comfy.model_management
import comfy.samplers
import pytest
import torch

from attune.patches.hook import install as hook
from attune.patches.hook.families import family_of
from attune.patches.hook.forward import Forward
from attune.patches.hook.install import model_sites, request
from attune.patches.hook.requests import BlendOutputs, EditWeights, ReadWeights, ShareMap, Span
from attune.patches.hook.tensors import CallTensors
from attune.tests import families
from attune.tests.helpers import close, differs

sample = families.sample
PLACE = ("middle.0.0", "self")
CROSS = ("middle.0.0", "cross")


def with_requests(model, *requests):
    patched = model.clone()
    request(patched, *requests)
    return patched


def reference(model, place, change):
    """The model with softmax written out at one place: ``change(weights [B,H,M,N], v [B,H,N,d], roles) -> out [B,H,M,d]``."""
    calls = [(s.name, kind) for s in model_sites(model)[1] for kind in s.kinds]
    number = calls.index(place)
    patched = model.clone()
    seen = {"calls": 0}

    def override(func, q, k, v, heads, *rest, **kwargs):
        here = seen["calls"] % len(calls) == number
        seen["calls"] += 1
        if not here:
            return func(q, k, v, heads, *rest, **kwargs)
        if not kwargs.get("skip_reshape"):
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        chunks = kwargs["transformer_options"]["cond_or_uncond"]
        roles = torch.tensor(chunks).repeat_interleave(len(q) // len(chunks))
        return change(weights, v, roles).transpose(1, 2).flatten(2)

    patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    return patched


# --- verbs ---


def test_blend_with_heads_of_its_own_per_role():
    model = families.shared("sd15")
    requests = [
        BlendOutputs({PLACE: (0, 2)}, lambda call, heads: 0.5 * heads.out + 0.5 * heads.v, rows="cond"),
        BlendOutputs({PLACE: (1,)}, lambda call, heads: torch.zeros_like(heads.out), rows="uncond"),
    ]

    def change(weights, v, roles):
        out = weights @ v
        cond, uncond = (roles == 0).nonzero().flatten(), (roles == 1).nonzero().flatten()
        for h in (0, 2):
            out[cond, h] = 0.5 * out[cond, h] + 0.5 * v[cond, h]
        out[uncond, 1] = 0
        return out

    ours = sample(with_requests(model, *requests), batch=2)
    close(ours, sample(reference(model, PLACE, change), batch=2))
    differs(ours, sample(model, batch=2))


@pytest.mark.parametrize("tokens", [7, 11], ids=["one batch", "two batches"])
@pytest.mark.parametrize("place", [PLACE, CROSS])
@pytest.mark.parametrize("rows", ["cond", "uncond", "all"])
def test_read(tokens, place, rows):
    model = families.shared("sd15")
    maps, expected = [], []
    columns = (4, 1)

    def change(weights, v, roles):
        wanted = {"cond": roles == 0, "uncond": roles == 1, "all": roles >= 0}[rows]
        if wanted.any():
            expected.append(weights[wanted][:, [1, 3]][..., list(columns)])
        return weights @ v

    def read(call, weights):
        assert (call.height, call.width) == (4, 6)
        maps.append(weights)

    single = ReadWeights({place: (1, 3)}, read, rows=rows, columns=columns)
    mean = ReadWeights({place: (1, 3)}, read, rows=rows, columns=columns, mean_heads=True)
    settings = {"steps": 1, "batch": 2, "size": (8, 12), "negative": families.text(2, tokens)}
    ours = sample(with_requests(model, single, mean), **settings)
    assert torch.equal(ours, sample(model, **settings))  # reading changes nothing
    sample(reference(model, place, change), **settings)
    assert len(maps) == 2 * len(expected) > 0
    for one, averaged, right in zip(maps[::2], maps[1::2], expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(averaged, right.mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "site"), [("sd3", "joint.1"), ("sd35", "joint.0"), ("flux", "double.1"), ("flux", "single.1")]
)
def test_read_of_joint_attention_is_image_to_text(name, site):
    model = families.shared(name)
    maps, expected = [], []

    def change(weights, v, roles):
        tokens = weights.shape[-1] - 4 * 5
        expected.append(weights[roles == 0][:, :, tokens:, :tokens])
        return weights @ v

    def read(call, weights):
        assert (call.height, call.width) == (4, 5)
        maps.append(weights)

    settings = {"steps": 1, "size": (7, 10)}
    sample(with_requests(model, ReadWeights({(site, "joint"): None}, read, rows="cond")), **settings)
    sample(reference(model, (site, "joint"), change), **settings)
    torch.testing.assert_close(maps[0], expected[0], rtol=1e-3, atol=1e-5)


def test_edits_in_order_on_conditional_rows_only_and_readers_see_them():
    model = families.shared("sd15")
    first, second, seen = (1, 3), (3, 5), []

    def scale(call, weights):
        total = 1 + weights.sum(-1, keepdim=True)  # twice the weight, divided by the new sum
        return 2 * weights / total, 1 / total

    requests = [
        EditWeights({CROSS: None}, scale, rows="cond", columns=first),
        EditWeights({CROSS: (0, 2)}, lambda call, w: (w.flip(-1), None), rows="cond", columns=second),
        ReadWeights({CROSS: None}, lambda call, w: seen.append(w), rows="cond"),
    ]
    maps = []

    def change(weights, v, roles):
        cond = roles == 0
        new = weights[cond].clone()
        new[..., list(first)] *= 2
        new = new / new.sum(-1, keepdim=True)
        new[:, [0, 2]] = new[:, [0, 2]][..., [0, 1, 2, 5, 4, 3, 6]]
        torch.testing.assert_close(new.sum(-1), torch.ones_like(new[..., 0]))
        maps.append(new)
        weights = weights.clone()
        weights[cond] = new
        return weights @ v

    ours = sample(with_requests(model, *requests))
    close(ours, sample(reference(model, CROSS, change)))
    differs(ours, sample(model))
    torch.testing.assert_close(seen[0], maps[0], rtol=1e-4, atol=1e-6)


def test_share_uses_the_first_rows_map():
    model = families.shared("sd15")
    share = ShareMap({PLACE: None}, lambda call: torch.zeros(call.batch, dtype=torch.long))
    ours = sample(with_requests(model, share), batch=2)
    close(ours, sample(reference(model, PLACE, lambda weights, v, roles: weights[:1] @ v), batch=2))
    differs(ours, sample(model, batch=2))


def test_gradients_flow_through_a_captured_map():
    patched = families.build("sd15")
    maps = []
    request(patched, ReadWeights({CROSS: None}, lambda call, w: maps.append(w), columns=(1,), mean_heads=True))
    model, context = patched.model, families.text(1)[0][0]
    options = {**patched.model_options["transformer_options"], "wrappers": patched.wrappers, "cond_or_uncond": [0]}
    with torch.enable_grad():
        x = torch.randn(1, 4, 8, 8, requires_grad=True)
        model.apply_model(x, torch.tensor([2.0]), c_crossattn=context, transformer_options=options)
        (gradient,) = torch.autograd.grad(maps[0].sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


# --- neighbours ---


def test_chains_with_another_override_and_attn1_patches():
    model = families.shared("sd15").clone()
    called = {"override": 0, "patch": 0}

    def override(func, *args, **kwargs):
        called["override"] += 1
        return func(*args, **kwargs) * 0.5

    def patch(n, context, value, extra):
        called["patch"] += 1
        return n, context, value

    model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    model.set_model_attn1_patch(patch)
    plain = sample(model, steps=1)
    count = dict(called)
    read = ReadWeights({PLACE: None}, lambda call, w: None)
    assert torch.equal(sample(with_requests(model, read), steps=1), plain)
    assert called == {k: 2 * v for k, v in count.items()} and all(count.values())


def test_an_owner_of_a_block_keeps_its_effect_and_its_tensors():
    model = families.shared("sd15").clone()
    kept, maps = [], []

    def owner(q, k, v, extra):
        out = backends.optimized_attention(q, k, v, extra["n_heads"]) + 0.3
        kept.append((out, out.clone()))
        return out

    model.set_model_attn2_replace(owner, "middle", 0)
    block_replaced = sample(model, steps=1)
    differs(block_replaced, sample(families.shared("sd15"), steps=1))
    read = ReadWeights({CROSS: None}, lambda call, w: maps.append(w))
    assert torch.equal(sample(with_requests(model, read), steps=1), block_replaced)
    assert len(maps) == 1 and torch.allclose(maps[0].sum(-1), torch.tensor(1.0))
    blend = BlendOutputs({CROSS: (1,)}, lambda call, heads: heads.out * 0)
    differs(sample(with_requests(model, blend), steps=1), block_replaced)
    assert all(torch.equal(out, copy) for out, copy in kept)


def cropped_state(model):
    """What could stay behind: hooks, modules and keys of options."""
    modules = list(model.model.diffusion_model.modules())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    return [id(m) for m in modules], hooks, sorted(model.model_options.get("transformer_options", {}))


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_nothing_stays_behind(name):
    from attune.patches import softpag

    patched = softpag.apply(families.shared(name), 2, 1, 0, 1, 0)
    before = cropped_state(patched)
    plain = sample(families.shared(name), steps=1)
    sites = model_sites(patched)[1]
    place = (sites[-1].name, sites[-1].kind)
    runs = []

    def act(call, heads):
        runs.append(call.run)
        if fail:
            raise RuntimeError("broken")
        return heads.out

    def stop(*_):
        raise comfy.model_management.InterruptProcessingException()

    request(patched, BlendOutputs({place: None}, act))
    before = cropped_state(patched)
    fail = False
    sample(patched, steps=1)
    first = runs[0]
    assert cropped_state(patched) == before
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, steps=2, callback=stop)
    assert cropped_state(patched) == before
    fail = True
    with pytest.raises(RuntimeError, match="broken"):
        sample(patched, steps=1)
    assert cropped_state(patched) == before
    assert runs[-1] is not first and runs[-1] is not None
    assert torch.equal(sample(families.shared(name), steps=1), plain)


def test_outside_its_span_nothing_is_installed(monkeypatch):
    model = families.shared("sd15")
    never = BlendOutputs({PLACE: None}, lambda call, heads: heads.out * 0, span=Span(0.99, 0.995))
    monkeypatch.setattr(hook, "Forward", None)  # whoever needs it fails
    assert torch.equal(sample(with_requests(model, never)), sample(model))


# --- layouts and backends ---


@pytest.mark.parametrize("backend", ["attention_pytorch", "attention_split", "attention_sub_quad", "attention_basic"])
@pytest.mark.parametrize("layout", ["flat", "heads in", "heads in and out"])
@pytest.mark.parametrize("masked", [False, True])
def test_backends_layouts_and_masks(backend, layout, masked):
    model = families.shared("sd15")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, generator=generator) for n in (16, 6, 6))
    mask = torch.randn(2, 16, 6, generator=generator) if masked else None
    maps = []
    asked = [
        EditWeights({CROSS: None}, lambda call, w: (w * 0, None), columns=(2,), rows="cond"),
        ReadWeights({CROSS: None}, lambda call, w: maps.append(w)),
        BlendOutputs({CROSS: (3,)}, lambda call, heads: heads.out * 2),
    ]
    options = {"cond_or_uncond": [1, 0]}
    forward = Forward(family_of(model.model.diffusion_model), asked, torch.zeros(2, 4, 8, 8), None, options)
    forward.at(*CROSS)
    forward.shape = [2, 32, 4, 4]
    settings = {"mask": mask} if masked else {}
    given = (q, k, v)
    if layout == "flat":
        given = tuple(t.transpose(1, 2).flatten(2) for t in given)
    else:
        settings["skip_reshape"] = True
    if layout == "heads in and out":
        settings["skip_output_reshape"] = True
    out = forward.override(getattr(backends, backend), *given, 4, **settings)
    weights = q @ k.transpose(-1, -2) / 8**0.5
    weights = (weights if mask is None else weights + mask[:, None]).softmax(-1)
    weights[1, :, :, 2] = 0
    right = weights @ v
    right[:, 3] *= 2
    out = out if layout == "heads in and out" else out.unflatten(-1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[0], weights, rtol=1e-4, atol=1e-5)


def test_grouped_queries():
    tensors = CallTensors(torch.randn(1, 5, 32), torch.randn(1, 6, 16), torch.randn(1, 6, 16), 4, {})
    assert tensors.q.shape == (1, 4, 5, 8) and tensors.k.shape == (1, 4, 6, 8)
    assert torch.equal(tensors.v[:, 0], tensors.v[:, 1]) and not torch.equal(tensors.v[:, 1], tensors.v[:, 2])


def test_an_edit_of_the_text_leaves_what_an_owner_adds_to_it():
    """An IP-Adapter adds its picture's attention to the text's: a factor on other words is none on the picture."""
    model, seen = families.shared("sd15").clone(), {}

    def owner(q, k, v, extra):
        text = backends.optimized_attention(q, k, v, extra["n_heads"])
        seen["text"], seen["image"] = text.clone(), torch.sin(torch.arange(text.numel())).view_as(text)
        heads = lambda t: t.double().unflatten(-1, (extra["n_heads"], -1)).transpose(1, 2)  # noqa: E731
        a, b, c = map(heads, (q, k, v))
        weights = (a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5).softmax(-1)
        weights[..., 2] *= 2
        seen["right"] = (weights / weights.sum(-1, keepdim=True) @ c).transpose(1, 2).flatten(2)
        return text + seen["image"]

    def double(call, weights):
        factor = 1 / (1 + weights)
        return 2 * weights * factor, factor

    model.set_model_attn2_replace(owner, "middle", 0)
    patched = with_requests(model, EditWeights({CROSS: None}, double, columns=(2,)))
    out = {}
    patched.set_model_attn2_output_patch(lambda t, extra: out.setdefault(tuple(extra["block"]), t.clone()))
    sample(patched, steps=1)
    project = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_out
    close(out["middle", 0], project((seen["right"] + seen["image"]).float()).detach())


def test_three_prompts_at_once_are_refused():
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    model = with_requests(families.shared("sd15"), ReadWeights({CROSS: None}, lambda call, w: None))
    guider = Guider_DualCFG(model)
    guider.set_conds(families.text(1), families.text(2), families.text(3))
    guider.set_cfg(3.0, 2.0)
    noise = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="DualCFGGuider"):
        guider.sample(noise, noise, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]))
