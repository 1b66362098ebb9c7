"""Captured attention maps: right, bounded, of the right picture, and made into masks."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

from attune.methods import maps as maths
from attune.patches import scfg
from attune.patches.hook.install import model_sites
from attune.patches.maps import record as maps
from attune.patches.maps.layers import auto_sites
from attune.patches.maps.reading import token_maps
from attune.patches.maps.record import Settings
from attune.patches.maps.recorder import apply as capture
from attune.patches.observer import Observer
from attune.server import graph
from attune.tests import families
from attune.tests.families import heads_of
from attune.tests.patches.hook.test_attention import reference

sample = families.sample


def seen(model, place, **settings):
    """Every conditional map at a place, softmax written out: a list of ``[pictures, H, M, N]``, one per evaluation."""
    found = []

    def change(weights, v, roles):
        if (roles == 0).any():
            found.append(weights[roles == 0])
        return weights @ v

    sample(reference(model, place, change), **settings)
    return found


@pytest.mark.parametrize("steps", ["mean", "last", "every step", "every 2nd step"])
@pytest.mark.parametrize("tokens", [7, 11], ids=["one batch", "two batches"])
def test_what_is_kept(steps, tokens):
    model, settings = families.shared("sd15"), {"steps": 3, "batch": 2, "size": (8, 12), "negative": families.text(2, tokens)}
    patched, held = capture(model, Settings("both", steps, "fp32"), heads_of(model, "middle.0.0"))
    assert torch.equal(sample(patched, **settings), sample(model, **settings))
    record = held.record()
    cross, own = seen(model, ("middle.0.0", "cross"), **settings), seen(model, ("middle.0.0", "self"), **settings)
    right = {
        "mean": {-1: torch.stack(cross).mean(0)},
        "last": {-1: cross[-1]},
        "every step": dict(enumerate(cross)),
        "every 2nd step": {0: cross[0], 2: cross[2]},
    }[steps]
    place = record.cross["middle.0.0"]
    assert place.grid == (4, 6) and record.steps == sorted(right)
    for step, frame in right.items():
        torch.testing.assert_close(place.frames[step], frame, rtol=1e-3, atol=1e-5)
    pixels = record.pixels["middle.0.0"].frames[max(right)]
    last = {"mean": torch.stack(own).mean(0), "last": own[-1], "every step": own[2], "every 2nd step": own[2]}[steps]
    torch.testing.assert_close(pixels[:, 0], last.mean(1), rtol=1e-3, atol=1e-5)
    assert record.bytes == sum(t.numel() * 4 for p in record.places() for t in p.frames.values())


@pytest.mark.parametrize(("name", "site"), [("sd3", "joint.1"), ("flux", "double.1"), ("flux", "single.2")])
def test_joint_attention_is_kept_as_pixels_to_words_and_pixels_to_pixels(name, site):
    model, settings = families.shared(name), {"steps": 1, "size": (8, 12)}
    patched, held = capture(model, Settings(precision="fp32"), heads_of(model, site))
    sample(patched, **settings)
    (whole,) = seen(model, (site, "joint"), **settings)
    words = whole.shape[-1] - 4 * 6
    record = held.record()
    torch.testing.assert_close(record.cross[site].frames[-1], whole[:, :, words:, :words], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(record.pixels[site].frames[-1], whole[:, :, words:, words:].mean(1, True), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", families.EVERY)
def test_every_family_and_what_auto_means(name):
    model = families.shared(name)
    patched, held = capture(model, Settings(kind="both", precision="fp16"))
    assert torch.equal(sample(patched), sample(model))
    record = held.record()
    tokens = token_maps(record, powers=2, sigma=0.5)
    assert tokens.ndim == 4 and tokens.isfinite().all()
    family, sites = model_sites(model)
    assert list(record.cross) == [s.name for s in auto_sites(sites, family)]
    torch.testing.assert_close(tokens.mean((2, 3)).mean(), torch.tensor(1.0), rtol=0.3, atol=0)
    for site in sites:  # the static grid is the one met at run time
        if site.name in record.cross:
            side = families.latent(model).shape[-1]
            assert record.cross[site.name].grid == (-(-side // site.stride),) * 2


def test_the_limit_is_said_before_it_is_reached():
    model = families.shared("sd15")
    patched, held = capture(model, Settings(kind="both", steps="every step", precision="fp32", limit_mb=0.05))
    with pytest.raises(ValueError, match="limit"):
        sample(patched, steps=4, size=(16, 16))
    assert not held.records
    sample(capture(model, Settings(kind="cross", precision="fp16", limit_mb=0.05))[0])


def test_an_interrupted_run_leaves_no_maps_and_the_next_one_is_clean():
    model = families.shared("sd15")
    patched, held = capture(model, Settings(kind="cross", precision="fp32"))

    def stop(step, *rest):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(patched, steps=3, callback=stop)
    assert not held.records
    with pytest.raises(ValueError, match="no attention maps yet"):
        held.record()
    sample(patched, seed=3)
    again, other = capture(model, Settings(kind="cross", precision="fp32"))
    sample(again, seed=3)
    for ours, right in zip(held.record().places(), other.record().places(), strict=True):
        assert torch.equal(ours.frames[-1], right.frames[-1])


def test_maps_are_of_the_picture_that_comes_in():
    """One model, two samplers: each picture gets its own run's maps; a run that is gone is not replaced by another."""

    def prompt(seed, source="3"):
        return {
            "1": {"class_type": "Capture", "inputs": {}},
            "3": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "seed": seed}},
            "4": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "seed": seed + 1}},
            "5": {"class_type": "VAEDecode", "inputs": {"samples": [source, 0]}},
            "6": {"class_type": "Show", "inputs": {"image": ["5", 0], "maps": ["1", 1]}},
        }

    class Sampler(Observer):
        def origin(self):
            return self.made

    sampler = Sampler()
    held = maps.Maps(observer=sampler)

    def ran(node, prompt):
        sampler.made = (node, graph.lineage(prompt, node))
        record = maps.Record((8, 8), 1)
        held.publish(record)
        return record

    first, second = ran("3", prompt(1)), ran("4", prompt(1))
    assert held.record(graph.made_by(prompt(1), "6")) is first
    assert held.record(graph.made_by(prompt(1, "4"), "6")) is second
    assert held.record() is second
    again = ran("3", prompt(7))
    assert held.record(graph.made_by(prompt(7), "6")) is again
    assert held.record(graph.made_by(prompt(1), "6")) is first  # a cached picture, whose run is still known
    for seed in range(20, 20 + maps.KEPT_RUNS):
        ran("3", prompt(seed))
    with pytest.raises(ValueError, match="another picture"):
        held.record(graph.made_by(prompt(1), "6"))
    loaded = prompt(1)
    loaded["5"] = {"class_type": "LoadImage", "inputs": {}}
    with pytest.raises(ValueError, match="another picture"):
        held.record(graph.made_by(loaded, "6"))


def test_a_short_prompt_beside_a_long_one():
    """ComfyUI repeats the shorter context: folding brings its own columns back."""
    model = families.shared("sd15")
    alone, beside = (capture(model, Settings("cross", precision="fp32"), heads_of(model, "middle.0.0")) for _ in range(2))
    sample(alone[0], negative=families.text(2, 7), steps=1)
    sample(beside[0], negative=families.text(2, 14), steps=1)
    one, two = (held.record().cross["middle.0.0"].frames[-1] for _, held in (alone, beside))
    assert (one.shape[-1], two.shape[-1]) == (7, 14)
    torch.testing.assert_close(maths.folded(two, 7), one, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="different prompts"):
        maths.folded(one, 5)


def test_areas_are_passed_over():
    model = families.shared("sd15")
    part = families.text(3, area=(8, 8, 0, 0), strength=1.0)
    patched, held = capture(model, Settings(kind="cross", precision="fp32"))
    sample(patched, positive=part + families.text(1), size=(8, 16))
    assert held.record().latent == (8, 16)
    with pytest.raises(ValueError, match="area"):
        sample(patched, positive=part, size=(8, 16))


def test_a_clone_of_the_model_fills_the_same_handle():
    """Any node after this one clones the model, and cloning copies what is on it."""
    model = families.shared("sd15")
    captured, held = capture(model, Settings(kind="cross"))
    guided, used = scfg.apply(captured.clone())
    sample(guided.clone())
    assert len(held.records) == len(used.records) == 1
    assert held.record().cross.keys() == used.record().cross.keys() and used.record().bytes > 0


def test_what_is_a_by_product_does_not_stop_a_run():
    model = families.shared("sd15")
    guided, used = scfg.apply(model)
    right = sample(guided, size=(16, 16))
    used.records.clear()
    used.settings = Settings(limit_mb=0.01)
    assert torch.equal(sample(guided, size=(16, 16)), right)
    assert not used.records


def test_one_layer_of_each_block_is_read():
    _, sites = model_sites(families.shared("sdxl"))
    assert [s.name for s in auto_sites(sites, "unet")] == ["input.3.1", "middle.0.1", "output.0.1", "output.1.1"]


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("steps", ["mean", "every step"])
@pytest.mark.parametrize("first", [True, False])
def test_sizes_that_change_within_a_run(name, steps, first):
    """Deep Shrink makes the first steps smaller: maps of another size are resized to the first."""
    model = families.shared(name)

    def shrink(given):
        return PatchModelAddDownscale.execute(given, 1, 2.0, 0.0, 0.5, True, "bicubic", "bicubic").args[0]

    for patch in (lambda given: capture(given, Settings(steps=steps)), scfg.apply):
        patched, held = patch(shrink(model)) if first else patch(model)
        patched = patched if first else shrink(patched)
        assert sample(patched, steps=4, size=(16, 16)).isfinite().all()
        record = held.record()
        for place in record.places():
            assert {frame.shape[2] for frame in place.frames.values()} == {place.grid[0] * place.grid[1]}
        for place in record.pixels.values():
            sums = torch.stack([frame.float().sum(-1) for frame in place.frames.values()])
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=5e-3, atol=5e-3)
        tokens = token_maps(record, powers=2)
        assert tokens.isfinite().all() and tokens.ndim == 4


def test_a_latent_that_grows_within_a_run():
    """SamplerLCMUpscale samples each step at a larger size."""
    for patch in (lambda given: capture(given, Settings(steps="every step")), scfg.apply):
        patched, held = patch(families.shared("sd15"))
        grown = SamplerLCMUpscale.execute(1.5, 2, "bilinear").args[0]
        sigmas = comfy.samplers.calculate_sigmas(patched.get_model_object("model_sampling"), "normal", 3)
        latent = families.latent(patched, 8, 8)
        noise = comfy.sample.prepare_noise(latent, 1)
        two = (families.text(1), families.text(2))
        out = comfy.sample.sample_custom(patched, noise, 3.0, grown, sigmas, *two, latent, disable_pbar=True, seed=1)
        assert out.shape[-1] == 12 and out.isfinite().all()
        assert token_maps(held.record()).isfinite().all()


def test_resized_weights():
    weights = torch.rand(2, 3, 6, 5)
    assert torch.equal(maths.resize_weights(weights, (2, 3), (2, 3)), weights)
    large = maths.resize_weights(weights, (2, 3), (4, 6))
    for i in range(5):
        right = torch.nn.functional.interpolate(weights[0, 1, :, i].view(1, 1, 2, 3), size=(4, 6), mode="bilinear")
        torch.testing.assert_close(large[0, 1, :, i], right.flatten())
    pixels = torch.rand(1, 1, 16, 16).softmax(-1)
    small = maths.resize_weights(pixels, (4, 4), (2, 2), keys=True)
    assert small.shape == (1, 1, 4, 4)
    torch.testing.assert_close(small.sum(-1), torch.ones(1, 1, 4))
    even = maths.resize_weights(torch.full((1, 1, 16, 16), 1 / 16), (4, 4), (2, 2), keys=True)
    torch.testing.assert_close(even, torch.full((1, 1, 4, 4), 1 / 4))
