"""S-CFG against the paper's equations written out, against the released code's departures, and on ComfyUI's models."""

from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import comfy.model_management
import comfy.samplers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfy_extras.nodes_model_advanced import RescaleCFG

from attune.methods import scfg as maths
from attune.patches import scfg
from attune.patches.hook.install import model_sites
from attune.patches.maps.layers import auto_sites, every_site
from attune.patches.observer import Observer
from attune.tests import families
from attune.tests.helpers import close, differs
from attune.tests.methods.test_scfg import slow_layer, slow_ratios

sample = families.sample
Settings = scfg.Settings
ONES = Settings(min_ratio=1.0, max_ratio=1.0)


# --- on ComfyUI's models ----------------------------------------------------------------------------------------------


def slow_rescale(guided, conditional, x, sigma, multiplier):
    """Core's RescaleCFG of one picture's denoised predictions, in float64: the velocity's deviation goes to the conditional one's."""
    x = x / (sigma**2 + 1)
    velocity, wanted = ((x - d) * (sigma**2 + 1) ** 0.5 / sigma for d in (guided, conditional))
    rescaled = velocity * wanted.std() / velocity.std()
    return x - (multiplier * rescaled + (1 - multiplier) * velocity) * sigma / (sigma**2 + 1) ** 0.5


def reference_model(
    model,
    reference="foreground",
    released=False,
    cfg_limits=(0.8, 3.0, 15.0),
    powers=4,
    sigma=0.5,
    rescale=0.0,
    layers=auto_sites,
):
    """Another way to the same: softmax written out everywhere, everything kept, S-CFG as the model's CFG function."""
    family, sites = model_sites(model)
    calls = [(s.name, kind) for s in sites for kind in s.kinds]
    chosen = {s.name for s in layers(sites, family)}
    patched = model.clone()
    kept, seen = {}, {"calls": 0}

    def override(func, q, k, v, heads, *rest, **kwargs):
        name, kind = calls[seen["calls"] % len(calls)]
        seen["calls"] += 1
        if name in chosen:
            a, b = (t.double().reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k))
            weights = (a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5).softmax(-1).mean(1)
            chunks = kwargs["transformer_options"]["cond_or_uncond"]
            for role, part in zip(chunks, weights.chunk(len(chunks)), strict=True):
                kept.setdefault(role, {}).setdefault(name, {})[kind] = (
                    part,
                    kwargs["transformer_options"]["activations_shape"][-2:],
                )
        return func(q, k, v, heads, *rest, **kwargs)

    def segment(layers, picture, pair):
        grids = [tuple(layer["cross"][1]) for layer in layers.values()]
        size, out = max(grids), []
        for layer, grid in zip(layers.values(), grids, strict=True):
            cross = layer["cross"][0][picture].numpy()
            if pair:
                cross = np.stack([cross[:, 0], cross[:, 1:].sum(1)], 1)
            out.append(slow_layer(cross, layer["self"][0][picture].numpy(), grid, size, powers, sigma, released))
        return np.mean(out, axis=0).argmax(0)

    def large(labels, size):
        return F.interpolate(torch.from_numpy(labels)[None, None].double(), size=size, mode="nearest")[0, 0].numpy().astype(int)

    def cfg(args):
        c, u, scale = args["cond_denoised"].double(), args["uncond_denoised"].double(), args["cond_scale"]
        out = []
        for i in range(len(c)):
            size = tuple(c.shape[-2:])
            owner, front = large(segment(kept[0], i, False), size), large(segment(kept[1], i, True), size) == 1
            region = {"foreground": front, "background": ~front, "image": np.ones_like(front)}[reference]
            delta = (c[i] - u[i]).square().sum(0).sqrt().numpy()
            low, high, limit = cfg_limits
            ratio = slow_ratios(delta, owner, region, low, high, limit / scale, sigma, released)
            guided = u[i] + scale * torch.from_numpy(ratio) * (c[i] - u[i])
            out.append(slow_rescale(guided, c[i], args["input"][i].double(), float(args["sigma"][i]), rescale))
        kept.clear()
        return args["input"] - torch.stack(out).float()

    patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    patched.set_model_sampler_cfg_function(cfg)
    return patched


@pytest.mark.parametrize(
    ("name", "reference", "released"),
    [("sd15", "foreground", False), ("sd15", "background", True), ("sd15", "image", False), ("sdxl", "foreground", True)],
)
def test_equals_the_equations_on_real_models(name, reference, released):
    model, settings = families.shared(name), {"size": (10, 14), "batch": 2, "cfg": 4.0, "steps": 2}
    ours = sample(scfg.apply(model, Settings(reference, form="released" if released else "paper"))[0], **settings)
    close(ours, sample(reference_model(model, reference, released), **settings), 1e-3)
    differs(ours, sample(model, **settings))


@pytest.mark.parametrize("first", [True, False])
def test_a_rescale_by_another_node_covers_it(first):
    """As in the released code, which rescales after S-CFG's sum; in whichever order the two nodes are."""
    model, settings = families.shared("sd15"), {"size": (10, 14), "batch": 2, "cfg": 6.0, "steps": 2}
    rescaled = RescaleCFG().patch(model, 0.7)[0]
    both = scfg.apply(rescaled)[0] if first else RescaleCFG().patch(scfg.apply(model)[0], 0.7)[0]
    ours = sample(both, **settings)
    close(ours, sample(reference_model(model, rescale=0.7), **settings), 1e-3)
    differs(ours, sample(rescaled, **settings))


def test_nodes_after_cfg_see_the_models_own_predictions():
    model, seen = families.shared("sd15").clone(), []
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(args["uncond_denoised"].clone()) or args["denoised"])
    sample(scfg.apply(model)[0], steps=1)
    sample(scfg.apply(scfg.apply(model)[0])[0], steps=1)  # twice, too
    sample(model, steps=1)
    assert len(seen) == 3 and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[2])


def test_all_layers_are_the_published_ones():
    model = families.shared("sdxl")
    family, sites = model_sites(model)
    assert [s.name for s in every_site(sites, family)] == [s.name for s in sites if "cross" in s.kinds and s.stride in (2, 4)]
    settings = {"size": (8, 12), "cfg": 4.0, "steps": 1}
    ours = sample(scfg.apply(model, Settings(layers="all"))[0], **settings)
    close(ours, sample(reference_model(model, layers=every_site), **settings), 1e-3)
    differs(ours, sample(scfg.apply(model)[0], **settings))


def test_at_cfg_1_it_says_so_and_shows_no_heat():
    class Watching(Observer):
        said: ClassVar[list] = []
        shown: ClassVar[list] = []

        def watching(self):
            return True

        def effect(self, missing):
            self.said.append(missing)

        def layer(self, *args):
            self.shown.append("layer")

        def regions(self, *args):
            self.shown.append("regions")

    observer = Watching()
    patched, maps = scfg.apply(families.shared("sd15"), observer=observer)
    assert torch.equal(sample(patched, cfg=1.0, steps=3), sample(families.shared("sd15"), cfg=1.0, steps=3))
    assert len(observer.said) == 1 and "cfg 1" in observer.said[0] and not observer.shown
    assert maps.record().cross  # they are of use to other nodes all the same
    sample(patched, cfg=3.0, steps=1)
    assert observer.said[1:] == [None] and "regions" in observer.shown and "layer" in observer.shown


@pytest.mark.parametrize("name", ["sd15", "sd3"])
@pytest.mark.parametrize("areas", [False, True])
def test_conditionings_on_threads_give_the_same_to_the_bit(name, areas, monkeypatch):
    """As where each GPU has a conditioning and a ``sigmas`` of its own: here the threads take turns at every layer."""
    model = families.shared(name)
    positive = families.text(1)
    if areas:
        positive = families.text(1, area=(8, 8, 0, 0), strength=1.0) + families.text(3, area=(8, 8, 0, 4), strength=1.0)
    patched = scfg.apply(model)[0]
    monkeypatch.setattr(type(model.model), "memory_required", lambda *args, **kwargs: 1e30)  # a forward for each conditioning
    settings = {"positive": positive, "size": (8, 12), "steps": 2, "cfg": 4.0}
    right = sample(patched, **settings)
    one_by_one = comfy.samplers._calc_cond_batch

    def on_threads(model, conds, x, timestep, model_options):
        jobs = [(role, cond) for role, given in enumerate(conds) for cond in given or ()]
        parts = [[[cond] if r == role else [] for r in range(len(conds))] for role, cond in jobs]
        with ThreadPoolExecutor(len(jobs)) as pool:
            outs = list(pool.map(lambda c: one_by_one(model, c, x, timestep.clone(), model_options), parts))
        out = [torch.zeros_like(x) for _ in conds]
        count = [torch.zeros_like(x) + 1e-37 for _ in conds]
        for (role, cond), found in zip(jobs, outs, strict=True):
            part = comfy.samplers.get_area_and_mult(cond, x, timestep)
            where = (slice(None), slice(None))
            if part.area is not None:
                h, w, top, left = part.area
                where = (*where, slice(top, top + h), slice(left, left + w))
            out[role][where] += found[role][where] * part.mult
            count[role][where] += part.mult
        return [o / c for o, c in zip(out, count, strict=True)]

    monkeypatch.setattr(comfy.samplers, "_calc_cond_batch", on_threads)
    for _ in range(3):
        close(sample(patched, **settings), right, 1e-6)


@pytest.mark.parametrize("name", families.EVERY)
def test_ratios_of_one_are_plain_cfg_to_the_bit(name):
    model = families.shared(name)
    patched, maps = scfg.apply(model, ONES)
    assert torch.equal(sample(patched), sample(model))
    assert len(maps.records) == 1 and maps.record().cross  # it did look
    runs = ((sample(scfg.apply(model)[0], seed=seed), sample(model, seed=seed)) for seed in range(5))
    assert any(not torch.equal(*run) for run in runs)  # a random model may have one region only


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde", "ddim"])
def test_cond_and_uncond_in_one_batch_or_two(sampler, monkeypatch):
    model = scfg.apply(families.shared("sd15"))[0]
    together = sample(model, sampler=sampler, steps=3)
    monkeypatch.setattr(type(model.model), "memory_required", lambda *args, **kwargs: 1e30)
    close(sample(model, sampler=sampler, steps=3), together)


def test_every_picture_of_a_batch_has_masks_of_its_own():
    model = scfg.apply(families.shared("sd15"))[0]
    empty = families.latent(model, 8, 8, 1)
    noise = torch.randn(3, *empty.shape[1:], generator=torch.Generator().manual_seed(5))

    def run(part):
        latent = torch.zeros_like(part)
        return comfy.sample.sample(
            model, part, 2, 5.0, "euler", "normal", families.text(1), families.text(2), latent, seed=1, disable_pbar=True
        )

    together = run(noise)
    for i in range(3):
        close(together[i : i + 1], run(noise[i : i + 1]), 1e-3)


def test_areas_and_masks():
    """Prompts for parts of the picture run and count there; one for all of it, said as an area or a mask, is a plain prompt."""
    model = families.shared("sd15")
    left = families.text(1, area=(8, 8, 0, 0), strength=1.0)
    right = families.text(3, area=(8, 8, 0, 8), strength=1.0)
    mask = torch.zeros(1, 8, 16)
    mask[..., :4] = 1
    masked = families.text(4, mask=mask, set_area_to_bounds=False)
    for positive in (left + right, families.text(1) + right, families.text(1) + masked):
        settings = {"size": (8, 16), "positive": positive, "steps": 2}
        assert torch.equal(sample(scfg.apply(model, ONES)[0], **settings), sample(model, **settings))
        out = sample(scfg.apply(model)[0], **settings)
        assert out.isfinite().all() and not torch.equal(out, sample(model, **settings))
    plain = sample(scfg.apply(model)[0], size=(8, 16))
    whole = families.text(1, area=(8, 16, 0, 0), strength=1.0)
    full = families.text(1, mask=torch.ones(1, 8, 16), set_area_to_bounds=False)
    close(sample(scfg.apply(model)[0], positive=whole, size=(8, 16)), plain)
    close(sample(scfg.apply(model)[0], positive=full, size=(8, 16)), plain)


def test_one_prompt_over_two_areas_is_one_prompt():
    """The same prompt and strength twice, whole picture: twice the same maps change nothing."""
    model = scfg.apply(families.shared("sd15"))[0]
    close(sample(model, positive=families.text(1) + families.text(1)), sample(model, positive=families.text(1)))


def test_stacks_with_cfg_functions_before_and_after_and_with_itself_off():
    model = families.shared("sd15").clone()
    model.set_model_sampler_cfg_function(lambda args: args["cond"] * 2 - args["uncond"])
    with_cfg = sample(scfg.apply(model)[0])
    differs(with_cfg, sample(scfg.apply(families.shared("sd15"))[0]))
    differs(with_cfg, sample(model))
    after = scfg.apply(families.shared("sd15"))[0].clone()
    after.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.5)
    differs(sample(after), sample(scfg.apply(families.shared("sd15"))[0]))
    # at cfg 1 ComfyUI makes no unconditional prediction, and there is no guidance to even out
    assert torch.equal(sample(scfg.apply(families.shared("sd15"))[0], cfg=1.0), sample(families.shared("sd15"), cfg=1.0))


def test_outside_its_span_it_is_plain():
    model = families.shared("sd15")
    assert torch.equal(sample(scfg.apply(model, Settings(start_percent=1.0))[0], steps=4), sample(model, steps=4))
    early, whole = (sample(scfg.apply(model, Settings(end_percent=end))[0], steps=4) for end in (0.4, 1.0))
    differs(early, sample(model, steps=4))
    differs(early, whole)


def test_bad_settings_are_refused():
    model = families.shared("sd15")
    for settings, words in (
        ({"min_ratio": 2.0, "max_ratio": 1.0}, "swap"),
        ({"start_percent": 0.9, "end_percent": 0.1}, "swap"),
        ({"reference": "sky"}, "foreground"),
    ):
        with pytest.raises(ValueError, match=words):
            scfg.apply(model, Settings(**settings))


@pytest.mark.parametrize("apart", [False, True])
def test_under_areas_the_regions_are_the_prompts_own(apart, monkeypatch):
    """ComfyUI gives the negative a positive's area, and with it its name; they must not be taken for each other."""
    model, looked_at, decided = families.shared("sd15"), [], maths.regions
    if apart:  # every conditioning in a forward of its own
        monkeypatch.setattr(type(model.model), "memory_required", lambda *args, **kwargs: 1e30)

    def regions(maps):
        looked_at.append(maps.shape[1])
        return decided(maps)

    monkeypatch.setattr(scfg.maths, "regions", regions)
    positive = families.text(1, area=(8, 8, 0, 0), strength=1.0) + families.text(3, area=(8, 8, 0, 8), strength=1.0)
    sample(scfg.apply(model)[0], positive=positive, size=(8, 16), steps=1)
    assert looked_at == [7, 7]  # tokens, not start and others


def test_a_film_is_refused_before_sampling_starts(monkeypatch):
    model = scfg.apply(families.shared("wan"))[0]
    monkeypatch.setattr(model.model, "apply_model", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(ValueError, match="Semantic-aware CFG works on pictures, and this latent has 3 frames"):
        families.sample(model, frames=3)
