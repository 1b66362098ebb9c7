"""SoftPAG in real sampling runs: parity with core's PAG, naïve references, reuse, neighbours, cost."""

import comfy.controlnet
import comfy.ops
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_extras.nodes_freelunch import FreeU
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from torch.utils.flop_counter import FlopCounterMode

from attune.patches import softpag
from attune.patches.hook import prefix_cache
from attune.patches.hook.families import family_of
from attune.patches.hook.install import model_sites
from attune.patches.hook.views import with_blocks
from attune.server import layouts
from attune.tests import families
from attune.tests.families import heads_of
from attune.tests.helpers import close

sample = families.sample


def differs(a, b):
    assert (a - b).abs().max() > 1e-2 * b.abs().max()


def naive(model, scale, u, heads, tokens="all"):
    """SoftPAG in a full second pass, one head and one row at a time, softmax written out; sites are known by counting calls."""
    calls = families.calls_of(model)
    chosen = dict(heads.chosen)
    patched = model.clone()

    def guidance(args):
        number = 0

        def override(func, q, k, v, heads, *rest, **kwargs):
            nonlocal number
            if families.of_text_apart(model, kwargs):
                return func(q, k, v, heads, *rest, **kwargs)
            name, kind = calls[number % len(calls)]  # conditions with areas take several forwards
            number += 1
            out = func(q, k, v, heads, *rest, **kwargs).clone()
            if kind == "cross" or name not in chosen or (kind == "self" and name.split(".")[0] == "joint"):
                return out
            if not kwargs.get("skip_reshape"):
                q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
            d = q.shape[-1]
            image = slice(0, None)
            if kind == "joint":
                _, image = families.image_tokens(model, args["input"].shape[-2:], q.shape[2])
            own = {"all": slice(0, None), "image": image, "text": families.text_tokens(model)}[tokens]
            for row in range(len(q)):
                for h in chosen[name]:
                    attended = (q[row, h] @ k[row, h].T / d**0.5).softmax(-1) @ v[row, h]
                    mixed = (1 - u) * attended + u * v[row, h, -len(attended) :]
                    out[row, own, h * d : (h + 1) * d] = mixed[own]
            return out

        options = args["model_options"]
        options = {
            **options,
            "transformer_options": {**options["transformer_options"], "optimized_attention_override": override},
        }
        (perturbed,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + scale * (args["cond_denoised"] - perturbed)

    patched.set_model_sampler_post_cfg_function(guidance)
    return patched


class Counter:
    """How often each block runs, seen by hooks on the modules."""

    def __init__(self, model):
        diffusion_model = model.model.diffusion_model
        self.family = family_of(diffusion_model)
        self.order = self.family.blocks()
        self.runs = dict.fromkeys(self.order, 0)
        self.handles = []
        for block in self.order:
            module = self.family.block(block)
            module = module[0] if hasattr(diffusion_model, "input_blocks") else module
            self.handles.append(module.register_forward_hook(lambda *_, block=block: self._count(block)))

    def _count(self, block):
        self.runs[block] += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def test_equals_core_pag():
    model = families.shared("sd15")
    core = PerturbedAttentionGuidance.execute(model, 3.0).result[0]
    ours = softpag.apply(model, 3.0, 1.0, 0, 1, 0)
    close(sample(ours), sample(core))
    differs(sample(ours), sample(model))


def test_nothing_to_do_changes_nothing():
    model = families.shared("sd15")
    plain = sample(model)
    for scale, u in ((0, 1), (3, 0)):
        assert torch.equal(sample(softpag.apply(model, scale, u, 0, 1, 0)), plain)
    with pytest.raises(ValueError, match="start_percent"):
        softpag.apply(model, 3, 1, 0.6, 0.5, 0)


SELECTIONS = {
    "sd15": "input.3.0:1,3 middle.0.0:0 output.*.*:2",
    "sdxl": "middle.0.1:0-2 output.1.0:3",
    "sd3": "joint.1:0,2 joint.2:1",
    "sd35": "joint.0:1 joint.2:0,1",
    **dict.fromkeys(("flux", "flux2", "chroma"), "double.1:0,3 single.1:1-2"),
    **dict.fromkeys(("qwen_image", "qwen_image21", "lumina2", "z_image", "krea2"), "joint.1:0,2 joint.2:1"),
    **dict.fromkeys(("wan", "cosmos_predict2", "anima"), "block.1:0,2 block.2:1"),
}


@pytest.mark.parametrize("name", families.EVERY)
@pytest.mark.parametrize(("cfg", "u", "size", "batch"), [(3.0, 0.3, (7, 10), 2), (1.0, 1.0, (8, 8), 1)])
def test_any_heads_equal_the_naive_reference(name, cfg, u, size, batch):
    model = families.shared(name)
    heads = heads_of(model, SELECTIONS[name])
    if name in ("sd15", "sdxl", "cosmos_predict2", "anima"):  # which do not pad
        size = (size[0] // 2 * 2 + 2, size[1])
    settings = {"cfg": cfg, "size": size, "batch": batch}
    ours = sample(softpag.apply(model, 2.0, u, 0, 1, 0, heads), **settings)
    close(ours, sample(naive(model, 2.0, u, heads), **settings))
    differs(ours, sample(model, **settings))


def test_a_film_of_several_frames():
    model = families.shared("wan")
    heads = heads_of(model, SELECTIONS["wan"])
    for tokens in ("all", "image"):
        ours = sample(softpag.apply(model, 2.0, 0.4, 0, 1, 0, heads, tokens=tokens), size=(8, 6), frames=3, batch=2)
        close(ours, sample(naive(model, 2.0, 0.4, heads), size=(8, 6), frames=3, batch=2))


@pytest.mark.parametrize("name", [name for name in families.EVERY if name not in families.SEPARATE])
@pytest.mark.parametrize("tokens", ["all", "image", "text"])
def test_the_tokens_of_joint_attention(name, tokens):
    model = families.shared(name)
    heads = heads_of(model, SELECTIONS[name])
    if tokens == "text" and name in families.TEXT_APART:
        with pytest.raises(ValueError, match="computes its text apart"):
            softpag.apply(model, 2.0, 0.4, 0, 1, 0, heads, tokens=tokens)
        return
    for u in (0.4, 1.0):
        ours = sample(softpag.apply(model, 2.0, u, 0, 1, 0, heads, tokens=tokens), batch=2)
        close(ours, sample(naive(model, 2.0, u, heads, tokens), batch=2))
        if tokens != "all" and name not in families.TEXT_APART:
            whole = sample(softpag.apply(model, 2.0, u, 0, 1, 0, heads), batch=2)
            assert (ours - whole).abs().max() > 1e-3 * whole.abs().max()


def reference(model, scale, heads, change):
    """SoftPAG in a full second pass whose attention is ``change(weights, q, k, v, first image token) -> out``, in float64."""
    sites = model_sites(model)[1]
    calls = [(s.name, kind) for s in sites for kind in s.kinds]
    chosen = dict(heads.chosen)
    patched = model.clone()

    def guidance(args):
        number = 0

        def override(func, q, k, v, heads, *rest, **kwargs):
            nonlocal number
            name, kind = calls[number % len(calls)]
            number += 1
            out = func(q, k, v, heads, *rest, **kwargs).clone()
            if name not in chosen or kind not in ("self", "joint") or (kind == "self" and name.startswith("joint")):
                return out
            if not kwargs.get("skip_reshape"):
                q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
            d = q.shape[-1]
            pixels = -(-args["input"].shape[-2] // 2) * -(-args["input"].shape[-1] // 2)
            for h in chosen[name]:
                mine = (q[:, h].double(), k[:, h].double(), v[:, h].double())
                weights = (mine[0] @ mine[1].mT / d**0.5).softmax(-1)
                moved = change(weights, *mine, 0 if kind == "self" else q.shape[2] - pixels)
                out[..., h * d : (h + 1) * d] = moved.to(out.dtype)
            return out

        options = args["model_options"]
        options = {
            **options,
            "transformer_options": {**options["transformer_options"], "optimized_attention_override": override},
        }
        (perturbed,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + scale * (args["cond_denoised"] - perturbed)

    patched.set_model_sampler_post_cfg_function(guidance)
    return patched


def _mean_query(weights, q, k, v, first):
    mean = q.mean(1, keepdim=True).expand_as(q)
    return (mean @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def _image_sees_no_text(weights, q, k, v, first):
    out = weights.clone()
    out[:, first:, :first] = 0
    return out / out.sum(-1, keepdim=True)


def _one_hot(weights, *_):
    return torch.zeros_like(weights).scatter(-1, weights.argmax(-1, keepdim=True), 1.0)


def _square_roots(weights, target, u):
    mixed = ((1 - u) * weights.sqrt() + u * target.sqrt()) ** 2
    return mixed / mixed.sum(-1, keepdim=True)


MOVES = {
    ("uniform", "linear"): lambda w, q, k, v, first: 0.4 * w + 0.6 * torch.full_like(w, 1 / w.shape[-1]),
    ("mean query", "linear"): lambda w, *a: 0.4 * w + 0.6 * _mean_query(w, *a),
    ("temperature", "linear"): lambda w, *a: 0.4 * w + 0.6 * (w.log() / 0.7).softmax(-1),
    ("maximum", "linear"): lambda w, *a: 0.4 * w + 0.6 * _one_hot(w),
    ("image-text mask", "linear"): lambda w, *a: 0.4 * w + 0.6 * _image_sees_no_text(w, *a),
    ("mean query", "log-linear"): lambda w, *a: (0.4 * w.log() + 0.6 * _mean_query(w, *a).log()).softmax(-1),
    ("identity", "Fisher-Rao"): lambda w, *a: _square_roots(w, torch.eye(w.shape[-1], dtype=w.dtype).expand_as(w), 0.6),
}


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
@pytest.mark.parametrize(("target", "path"), MOVES)
def test_other_targets_and_paths_in_a_run(name, target, path):
    model = families.shared(name)
    heads = heads_of(model, SELECTIONS[name])
    if name == "sd15" and "-" in target:
        with pytest.raises(ValueError, match="needs image and text tokens in one attention"):
            softpag.apply(model, 2.0, 0.6, heads=heads, target=target)
        return
    move = MOVES[target, path]
    ours = sample(softpag.apply(model, 2.0, 0.6, heads=heads, target=target, path=path, temperature=0.7), batch=2)
    close(ours, sample(reference(model, 2.0, heads, lambda w, q, k, v, first: move(w, q, k, v, first) @ v), batch=2), 1e-3)
    differs(ours, sample(softpag.apply(model, 2.0, 0.6, heads=heads), batch=2))


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_second_head_set_is_a_second_node(name):
    model = families.shared(name)
    a, b = (heads_of(model, item) for item in SELECTIONS[name].split(" ")[:2])
    ours = sample(softpag.apply(model, 2.0, 0.5, rescale=0.3, heads=a, heads_2=b, scale_2=1.0))
    two = softpag.apply(softpag.apply(model, 2.0, 0.5, rescale=0.3, heads=a), 1.0, 0.5, rescale=0.3, heads=b)
    close(ours, sample(two), 1e-5)
    differs(ours, sample(softpag.apply(model, 2.0, 0.5, rescale=0.3, heads=a)))
    only = sample(softpag.apply(model, 0.0, 0.5, heads=a, heads_2=b, scale_2=1.0))
    close(only, sample(softpag.apply(model, 1.0, 0.5, heads=b)), 1e-6)
    off = softpag.apply(model, 0.0, 0.5, heads=a, heads_2=b, scale_2=0.0)
    assert torch.equal(sample(off), sample(model))


def test_automatic_numbers_are_the_familys_own():
    for name, scale, u in (("sd15", 3.0, 1.0), ("sd3", 3.0, 0.5), ("flux", 8.0, 0.5)):
        model = families.shared(name)
        assert torch.equal(sample(softpag.apply(model)), sample(softpag.apply(model, scale, u)))


def test_where_to_perturb_by_itself():
    """A UNet's middle block; the depth of SD3 medium's layer 9, one of its four best in the paper, and never layer 13."""
    found = {name: layouts.preset(name)["default"] for name in ("sd15", "sdxl", "sd3", "flux")}
    assert found == {
        "sd15": "middle.0.0:0-7",
        "sdxl": " ".join(f"middle.0.{i}:0-19" for i in range(10)),
        "sd3": "joint.9:0-23",
        "flux": "single.3:0-23",
    }


def test_choices_that_mean_nothing_are_refused():
    sd15, sd3 = families.shared("sd15"), families.shared("sd3")
    for model, choices, words in (
        (sd15, {"tokens": "text"}, "model set tokens to all"),
        (sd15, {"target": "mean text query"}, "model set tokens to all"),
        (sd3, {"tokens": "text", "target": "mean image query"}, "set tokens to all"),
        (sd3, {"tokens": "words"}, "no tokens “words”; choose one of all, image, text"),
        (sd3, {"target": "noise"}, "no target “noise”"),
        (sd3, {"path": "zigzag"}, "no path “zigzag”"),
    ):
        with pytest.raises(ValueError, match=words):
            softpag.apply(model, **choices)


FIRST = [
    ("sd15", "input.3.0", ("input_blocks", 3)),
    ("sd15", "middle.0.0", ("middle_block", 0)),
    ("sd15", "output.3.0", ("output_blocks", 3)),
    ("sdxl", "middle.0.1", ("middle_block", 0)),
    ("sd3", "joint.2", ("joint_blocks", 2)),
    ("sd35", "joint.1", ("joint_blocks", 1)),
    ("flux", "double.1", ("double_blocks", 1)),
    ("flux", "single.0", ("single_blocks", 0)),
    ("flux", "single.2", ("single_blocks", 2)),
    ("flux2", "double.1", ("double_blocks", 1)),
    ("chroma", "single.1", ("single_blocks", 1)),
    ("qwen_image", "joint.2", ("transformer_blocks", 2)),
    ("z_image", "joint.1", ("layers", 1)),
    ("wan", "block.1", ("blocks", 1)),
    ("cosmos_predict2", "block.2", ("blocks", 2)),
    *([("krea2", "joint.2", ("blocks", 2))] if "krea2" in families.MORE else []),
]


@pytest.mark.parametrize(("name", "site", "first"), FIRST)
def test_nothing_before_the_first_perturbed_block_runs_twice(name, site, first, monkeypatch):
    model = families.shared(name)
    patched = softpag.apply(model, 2.0, 0.5, 0, 1, 0, heads_of(model, site))
    with Counter(model) as counter:
        fast = sample(patched, steps=2)
    place = counter.order.index(first)
    assert [counter.runs[b] for b in counter.order[:place]] == [2] * place
    assert [counter.runs[b] for b in counter.order[place:]] == [4] * (len(counter.order) - place)
    monkeypatch.setattr(prefix_cache.PrefixCache, "_recorded", lambda *_: None)
    close(fast, sample(patched, steps=2), 5e-5)  # a batch of two rows is not multiplied as two of one are


def test_two_nodes_add_up_and_both_reuse():
    model = families.shared("flux")
    a, b = heads_of(model, "double.1"), heads_of(model, "single.1:0")
    with Counter(model) as counter:
        ours = sample(softpag.apply(softpag.apply(model, 2, 1, 0, 1, 0, b), 1, 0.5, 0, 1, 0, a), steps=2)
    close(ours, sample(naive(naive(model, 2, 1, b), 1, 0.5, a), steps=2))
    assert list(counter.runs.values()) == [2, 4, 4, 6, 6]


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpm_2"])
def test_samplers(sampler):
    model = families.shared("sd15")
    heads = heads_of(model, "output.0.0:0-2")
    settings = {"sampler": sampler, "steps": 3}
    close(
        sample(softpag.apply(model, 2, 0.7, 0, 1, 0, heads), **settings), sample(naive(model, 2, 0.7, heads), **settings), 1e-3
    )


def test_outside_the_span_it_costs_nothing():
    model = families.shared("sd15")
    with Counter(model) as counter:
        sample(softpag.apply(model, 2, 1, 0.5, 0.8, 0), steps=10, scheduler="simple")
    assert counter.runs[("input_blocks", 0)] == 10
    extra = counter.runs[("middle_block", 0)] - 10
    assert 2 <= extra <= 4


def test_areas_batches_masks_weights_and_freeu():
    model = families.shared("sd15").clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    weight = model.model.state_dict()[key]
    model.add_patches({key: ("diff", (torch.ones_like(weight) * 0.05,))})
    (model,) = FreeU().patch(model, 1.3, 1.4, 0.9, 0.2)
    positive = families.text(1) + families.text(3, area=(8, 4, 0, 4), strength=0.7)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, :] = 1
    settings = {"positive": positive, "batch": 2, "noise_mask": mask}
    heads = heads_of(model, "output.1.0")
    ours = sample(softpag.apply(model, 2, 1, 0, 1, 0, heads), **settings)
    close(ours, sample(naive(model, 2, 1, heads), **settings))


@pytest.mark.parametrize("first", ["core", "ours"])
def test_beside_another_packs_perturbed_pass(first):
    model = families.shared("sd15")
    heads = heads_of(model, "output.1.0:1")

    def stack(own):
        if first == "core":
            return own(PerturbedAttentionGuidance.execute(model, 1.0).result[0])
        return PerturbedAttentionGuidance.execute(own(model), 1.0).result[0]

    ours = stack(lambda m: softpag.apply(m, 2, 0.5, 0, 1, 0, heads))
    close(sample(ours), sample(stack(lambda m: naive(m, 2, 0.5, heads))))


def test_several_perturbations_in_one_batch_equal_one_by_one():
    model = families.shared("sd15")
    sites = model_sites(model)[1]
    several = [
        softpag.Perturbation({"middle.0.0": (0, 1)}, 1.0),
        softpag.Perturbation({"output.1.0": (2,)}, 0.5),
        softpag.Perturbation({"middle.0.0": (3,), "output.3.0": (0,)}, 0.8),
    ]
    patched = softpag.apply(model, 1e-9, 1, 0, 1, 0)
    seen = []

    def check(args):
        together = softpag.perturbed_predictions(args, several, sites)
        seen.append(together)
        for one, p in zip(together, several, strict=True):
            close(one, softpag.perturbed_predictions(args, [p], sites)[0])
        differs(together[0], together[1])
        return args["denoised"]

    patched.set_model_sampler_post_cfg_function(check)
    sample(patched, steps=1, batch=2)
    assert len(seen) == 1


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet that gives fixed residuals for every block."""

    def __init__(self, shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.parts = {k: [torch.randn(s, generator=generator) for s in v] for k, v in shapes.items()}

    def get_control(self, x, *_):
        return {k: [t.expand(len(x), *t.shape[1:]).clone() for t in v] for k, v in self.parts.items()}


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_control_residuals_do_not_reach_the_recording(name):
    model = families.shared(name)
    if name == "sd15":
        shapes = {"input": [(1, 64, 4, 4), (1, 64, 4, 4), (1, 32, 8, 8), (1, 32, 8, 8)], "middle": [(1, 64, 4, 4)]}
        heads = heads_of(model, "output.2.0")
    else:
        shapes = {"input": [(1, 16, 64)] * 2, "output": [(1, 16, 64)] * 3}
        heads = heads_of(model, "single.1")
    control = {"control": Residuals(shapes)}
    settings = {"positive": families.text(1, **control), "negative": families.text(2, **control)}
    ours = sample(softpag.apply(model, 2, 1, 0, 1, 0, heads), **settings)
    close(ours, sample(naive(model, 2, 1, heads), **settings))
    differs(ours, sample(softpag.apply(model, 2, 1, 0, 1, 0, heads)))


@pytest.mark.parametrize(("first", "limit"), [(("middle_block", 0), 1.38), (("output_blocks", 11), 1.10)])
def test_cost_on_sd15_at_512(first, limit, monkeypatch):
    """Multiply-adds of the true SD1.5 UNet, counted on tensors without data: a CFG step and the perturbed pass beside it."""
    monkeypatch.setattr(prefix_cache, "equal", lambda a, b: True)
    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[2, 2, 2, 2],
        channel_mult=[1, 2, 4, 4],
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_middle=1,
        transformer_depth_output=[1] * 9 + [0] * 3,
        context_dim=768,
        legacy=False,
        device="meta",
        operations=comfy.ops.disable_weight_init,
    )
    prefixes, family = prefix_cache.PrefixCache(), family_of(unet)

    def attend(function, q, k, v, heads, *args, **kwargs):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return (q @ k.transpose(-1, -2) @ v).transpose(1, 2).flatten(2)

    def cost(roles, blocks):
        rows = len(roles)
        x, t, c = (torch.empty(rows, *shape, device="meta") for shape in ((4, 64, 64), (), (77, 768)))
        options = {"cond_or_uncond": roles, "uuids": roles, "sigmas": torch.ones(1), "optimized_attention_override": attend}
        model = with_blocks(unet, family.attributes, blocks(x, options))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t, context=c, transformer_options=options)
        return counter.get_total_flops()

    plain = cost([1, 0], lambda x, options: prefixes.recorders(family, [first], x, options))
    perturbed = cost([0], lambda x, options: prefixes.stand_ins(family, first, x, options))
    assert prefixes.replays == 1
    assert 1.0 < (plain + perturbed) / plain <= limit
    assert cost([0], lambda *_: {}) == pytest.approx(plain / 2)
