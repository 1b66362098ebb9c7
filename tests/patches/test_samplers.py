"""The table of samplers against what ComfyUI's samplers do."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError

import comfy.samplers
import pytest
import torch
from comfy.k_diffusion import sampling as k_diffusion

from attune.patches import samplers
from attune.patches.samplers import (
    NONE,
    NORMAL,
    SAMPLERS,
    TREE,
    TREE_ON_DEVICE,
    SamplerNeeds,
    evaluations,
    needs,
    noise_sampler,
)
from attune.tests import families

EVERY = list(comfy.samplers.KSampler.SAMPLERS)
CFG, SEED = 3.0, 5


def plain(name, steps=5, **more):
    return families.sample(families.shared("sd15"), cfg=CFG, steps=steps, sampler=name, size=(4, 4), seed=SEED, **more)


def schedule(name, steps=5, scheduler="normal", denoise=1.0):
    return comfy.samplers.KSampler(families.shared("sd15"), steps, "cpu", name, scheduler, denoise).sigmas


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("how", [{}, {"steps": 1}, {"steps": 2}, {"scheduler": "karras", "denoise": 0.7}, {"last_step": 3}])
def test_evaluations_are_counted_or_refused(name, how, monkeypatch):
    """In every step: the callback, which comes after a step's first evaluation, sees as many as all steps before have."""
    assert name in SAMPLERS, f"{name} is new: add its row"
    if SAMPLERS[name].evaluations is None:
        with pytest.raises(ValueError, match=name):
            evaluations(name, schedule(name))
        return
    calls, seen = [], {}
    predict = comfy.samplers.CFGGuider.predict_noise
    monkeypatch.setattr(comfy.samplers.CFGGuider, "predict_noise", lambda *a, **k: (calls.append(1), predict(*a, **k))[1])
    sigmas = schedule(name, how.get("steps", 5), how.get("scheduler", "normal"), how.get("denoise", 1.0))
    if "last_step" in how:  # a schedule that does not end at 0
        sigmas = sigmas[: how["last_step"] + 1]
    plain(name, callback=lambda i, x0, x, n: seen.setdefault(i, len(calls)), **how)
    right = evaluations(name, sigmas)
    assert len(right) == len(sigmas) - 1 and sum(right) == len(calls)
    if not name.startswith("uni_pc"):  # tells after the step
        assert seen == {i: sum(right[:i]) + 1 for i in range(len(right))}


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_noise_is_of_the_kind_in_the_table(name, monkeypatch):
    """Given what it would have drawn itself, a sampler makes the same picture; one without noise makes the same whatever is drawn."""
    kind = SAMPLERS[name].noise
    function = comfy.samplers.sampler_object(name).sampler_function
    takes = "noise_sampler" in inspect.signature(function).parameters
    assert takes == (kind != NONE)
    made = []
    normal, tree = k_diffusion.default_noise_sampler, k_diffusion.BrownianTreeNoiseSampler
    with monkeypatch.context() as patch:
        patch.setattr(k_diffusion, "default_noise_sampler", lambda *a, **k: (made.append(NORMAL), normal(*a, **k))[1])
        patch.setattr(
            k_diffusion,
            "BrownianTreeNoiseSampler",
            lambda *a, **k: (made.append(TREE if k["cpu"] else TREE_ON_DEVICE), tree(*a, **k))[1],
        )
        right = plain(name)
    if kind == NONE:
        with monkeypatch.context() as patch:
            patch.setattr(k_diffusion, "default_noise_sampler", lambda *a, **k: lambda *levels: torch.full((1,), 7.0))
            assert torch.equal(plain(name), right)
        return
    assert set(made) == {kind}
    own = comfy.samplers.sampler_object

    def given(which):
        sampler = own(which)
        inner = sampler.sampler_function

        def function(model, x, sigmas, extra_args, **kwargs):
            kwargs["noise_sampler"] = noise_sampler(kind, x, sigmas, extra_args["seed"])
            return inner(model, x, sigmas, extra_args=extra_args, **kwargs)

        return comfy.samplers.KSAMPLER(function, sampler.extra_options, sampler.inpaint_options)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.samplers, "sampler_object", given)
        assert torch.equal(plain(name), right)


def test_linear_samplers_are_linear(monkeypatch):
    """With the model in the middle replaced by a linear one, a mixture of runs is the run of the mixture."""
    model = families.shared("sd15")

    class Wrapped:
        inner_model = type("Guider", (), {"model_patcher": model, "inner_model": model.model})

        def __call__(self, x, sigma, **kwargs):
            return x * (1 / (1 + sigma[0] ** 2)) + x.roll(1, -1) * 0.3

    def noise(sigma, after):
        return torch.full((1, 4, 6, 6), 0.2, dtype=torch.float64)

    a, b = torch.randn(2, 1, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for name in (n for n in EVERY if SAMPLERS[n].linear):
        own = comfy.samplers.sampler_object(name)
        sigmas = schedule(name).double()
        more = {} if SAMPLERS[name].noise == NONE else {"noise_sampler": noise}
        out = [own.sampler_function(Wrapped(), x.clone(), sigmas, disable=True, **more) for x in (a, b, 0.3 * a + 0.7 * b)]
        torch.testing.assert_close(0.3 * out[0] + 0.7 * out[1], out[2], msg=name)


def test_rows_cannot_be_changed_and_others_are_refused():
    with pytest.raises(TypeError):
        SAMPLERS["euler"] = SamplerNeeds(7)
    with pytest.raises(FrozenInstanceError):
        SAMPLERS["euler"].evaluations = 7
    assert needs("heun", "HeadHunter").evaluations == 2
    with pytest.raises(ValueError, match=r"HeadHunter: the sampler “best” is not known\. Choose one of: euler, euler_cfg_pp, "):
        needs("best", "HeadHunter")
    with pytest.raises(ValueError, match=r"keeps too much\. Choose one of: heun\.$"):
        needs("lms", "Detail", ["heun"], "keeps too much")


def test_a_name_says_nothing():
    """Newer ComfyUIs have them; a name with “_sde” does not mean a Brownian tree."""
    assert samplers.SAMPLERS["exp_heun_2_x0_sde"] == SamplerNeeds(2, NORMAL)
    assert samplers.SAMPLERS["exp_heun_2_x0"] == SamplerNeeds(2)
