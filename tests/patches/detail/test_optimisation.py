"""Detail++'s optimisation against the whole model with softmax written out, and what is left of it when it fails."""

from __future__ import annotations

import gc
import weakref
from importlib.util import find_spec

import pytest
import torch

from attune.demo import model as demo_model
from attune.language.decompose import decompose
from attune.methods import detail as maths
from attune.patches.detail import blending, gradient
from attune.patches.detail.blending import Blending
from attune.patches.detail.branches import BRANCH
from attune.patches.detail.encode import encode
from attune.patches.detail.sampler import FUSED, check
from attune.patches.detail.session import OPTIMIZE, Settings
from attune.patches.hook.install import model_sites
from attune.tests import families
from attune.tests.helpers import close, differs
from attune.tests.patches.detail.test_detail import branches, read_names, run


def losses(model, x, sigma, context, columns, align, content=range(1, 6)):
    """The loss of each picture, by the whole model with softmax written out."""
    sites, read = model_sites(model)[1], read_names(model)
    calls = [(s.name, kind) for s in sites for kind in s.kinds]
    seen, maps = iter(calls), []

    def override(func, q, k, v, heads, *rest, **kwargs):
        name, kind = next(seen)
        if not kwargs.get("skip_reshape"):
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        if kind == "cross" and name in read:
            grid = [-(-n // next(s for s in sites if s.name == name).stride) for n in x.shape[-2:]]
            maps.append(weights.mean(1)[..., list(content)].unflatten(1, grid))
        return (weights @ v).transpose(1, 2).flatten(2)

    options = {"optimized_attention_override": override}
    model.model.apply_model(x, sigma, c_crossattn=context.expand(len(x), -1, -1), transformer_options=options)
    places = [[list(content).index(c) for c in own] for own in columns]
    return maths.objective(maths.subject_maps(torch.stack(maps).mean(0), places), align)


@pytest.mark.parametrize(
    ("name", "optimize"), [*(("sd15", o) for o in OPTIMIZE[1:]), ("wan", OPTIMIZE[2]), ("cosmos_predict2", OPTIMIZE[1])]
)
def test_the_gradient_is_that_of_the_whole_model(name, optimize, monkeypatch):
    if name != "sd15" and find_spec(FUSED) is not None:
        pytest.skip("this ComfyUI's kernels have no gradient there")
    model, found = families.shared(name), []
    whole = blending.gradient
    monkeypatch.setattr(blending, "gradient", lambda *a: (found.append((a[3][:2].clone(), a[4][:2], g := whole(*a))), g)[1])
    monkeypatch.setattr(maths, "UPDATES", (1, 1))
    positive = branches((7, 7, 14, 7))
    no_backward = model.clone()  # as with SageAttention
    no_backward.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: f(*a, **k).detach()
    with torch.inference_mode():
        run(no_backward, positive, 2, (6, 8), steps=3, optimize=optimize, optimize_steps=2)
    assert len(found) == 2
    columns, align = [(2, 3), (4,)], optimize == OPTIMIZE[2]
    for x, sigma, (loss, ours) in found:
        z = x.clone().requires_grad_()
        before = losses(model, z, sigma.clone(), positive[0][0], columns, align)
        close(loss, before.detach(), 1e-4)
        (right,) = torch.autograd.grad(before.sum(), z)
        close(ours, right, 1e-3)
        direction, e = right / right.norm(), 1e-2
        with torch.no_grad():
            up, down = (
                losses(model, x + s * e * direction, sigma.clone(), positive[0][0], columns, align).sum() for s in (1, -1)
            )
        assert ((up - down) / (2 * e)).item() == pytest.approx(right.norm().item(), rel=0.2)


def test_optimising_lowers_the_loss_and_moves_the_base_only(monkeypatch):
    model, clip, _ = demo_model.load()
    lines = "* | a star and a circle\nstar | a red star and a circle\ncircle | a star and a blue circle"
    positive = encode(clip, decompose("a red star and a blue circle", manual=lines))
    moved = []
    whole = Blending._optimise

    def watch(self, x, sigma, step, kwargs):
        before = x.clone()
        whole(self, x, sigma, step, kwargs)
        moved.append((before, x.clone(), sigma[:1].clone()))

    monkeypatch.setattr(Blending, "_optimise", watch)
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    settings = {"size": (12, 16), "steps": 4, "negative": empty, "share_until": 0.75, "optimize_steps": 2}
    settings["step_size"] = 0.1
    for optimize in OPTIMIZE[1:]:
        moved.clear()
        run(model, positive, optimize=optimize, **settings)
        gains = []
        for before, after, sigma in moved[:2]:
            assert torch.equal(before[1:], after[1:]) and not torch.equal(before[:1], after[:1])
            assert (before - after).norm() < 0.5 * before.norm()
            columns, align = [(3,), (7,)], optimize == OPTIMIZE[2]
            with torch.no_grad():
                content = positive[0][1][BRANCH].content
                gains.append(
                    [losses(model, x[:1], sigma, positive[0][0], columns, align, content).item() for x in (before, after)]
                )
        assert all(b < a for a, b in gains), gains
        assert all(torch.equal(before, after) for before, after, _ in moved[2:]) and len(moved) == 3
    with_zero = run(model, positive, optimize="entropy", **{**settings, "step_size": 0.0})[0]
    assert torch.equal(with_zero, run(model, positive, masks_from="base", **settings)[0])


@pytest.mark.parametrize(("thresholds", "updates"), [((0.0,), [6, 3, 3, 3, 0]), ((1e9,), [1, 1, 1, 1, 0]), (None, None)])
def test_updates_are_repeated_while_a_pictures_loss_is_high(thresholds, updates, monkeypatch):
    """As released: one at least, six at most before timestep 900, three after; every picture of a batch for itself."""
    model, made = families.shared("sd15"), []
    whole = blending.gradient

    def watch(session, guider, inner, x, sigma, pictures, kwargs):
        losses, by_z = whole(session, guider, inner, x, sigma, pictures, kwargs)
        early = model.model.model_sampling.timestep(sigma[:1]).item() > 900
        made.append((float(sigma[0]), early, list(pictures), losses.tolist()))
        return losses, by_z

    monkeypatch.setattr(blending, "gradient", watch)
    settings = {"optimize": "entropy", "optimize_steps": 4, "share_until": 1.0, "size": (6, 8), "step_size": 0.2}
    if thresholds is None:  # one between the two pictures' losses
        monkeypatch.setattr(maths, "THRESHOLDS", (1e9,))
        run(model, branches(), 2, steps=5, **settings)
        thresholds = tuple(sum(values) / 2 for *_, values in made)
        made.clear()
    monkeypatch.setattr(maths, "THRESHOLDS", thresholds)
    run(model, branches(), 2, steps=5, **settings)
    steps = [[m for m in made if m[0] == level] for level in dict.fromkeys(m[0] for m in made)]
    assert [early for ((_, early, *_), *_) in steps] == [True, False, False, False]
    if updates is not None:
        assert [len(s) for s in steps] + [0] == updates
        assert all(pictures == [0, 1] for s in steps for _, _, pictures, _ in s)
        return
    for number, step in enumerate(steps):
        active = [0, 1]
        for _, _, pictures, values in step:
            assert pictures == active
            active = [p for p, loss in zip(pictures, values, strict=True) if loss >= thresholds[number]]
        assert not active or len(step) == (3 if number else 6)
    assert {len(pictures) for _, _, pictures, _ in made} == {1, 2}  # else the thresholds above say nothing


def test_a_step_is_as_long_as_released(monkeypatch):
    """``1750·√(1 − t/T)`` over all steps for SDXL at 1024×1024, in latents of the network's scale."""
    model, moved = families.shared("sd15"), []
    whole = blending.gradient

    def watch(session, guider, inner, x, sigma, pictures, kwargs):
        moved.append([x.clone(), x, sigma[0].item()])
        moved[-1].append(whole(session, guider, inner, x, sigma, pictures, kwargs)[1])
        return torch.full((len(pictures),), 1e9 if len(moved) in (1, 4) else 0.0), moved[-1][3]  # two updates a step

    later = Blending._optimise

    def after(self, x, *rest):
        later(self, x, *rest)
        moved.append([x.clone()])

    monkeypatch.setattr(blending, "gradient", watch)
    monkeypatch.setattr(Blending, "_optimise", after)
    run(model, branches(), steps=5, optimize="entropy", optimize_steps=2, size=(6, 8), step_size=0.01)
    for step, (first, second, end) in enumerate((moved[:3], moved[3:6])):
        for (before, _, sigma, by_z), then in ((first, second[0]), (second, end[0])):
            length = 0.01 * 1750 * (1 - step / 5) ** 0.5 * (4 * 6 * 8) / (4 * 128 * 128)
            close(before[:1] - then[:1], length * (1 + sigma**2) * by_z, 1e-3)
            assert torch.equal(before[1:], then[1:])


def test_a_picture_without_a_finite_gradient_is_left_alone(monkeypatch):
    model = families.shared("sd15")
    whole = gradient.objective

    def broken(maps, align):
        return whole(maps, align) * torch.tensor([1.0, float("nan")])[: len(maps)]

    settings = {"optimize": "entropy", "size": (6, 8), "steps": 3, "step_size": 0.1}
    right = run(model, branches(), 2, **settings)[0].unflatten(0, (4, 2))
    plain = run(model, branches(), 2, masks_from="base", **{**settings, "optimize": "off"})[0].unflatten(0, (4, 2))
    monkeypatch.setattr(gradient, "objective", broken)
    ours = run(model, branches(), 2, **settings)[0].unflatten(0, (4, 2))
    close(ours[:, 0], right[:, 0])
    close(ours[:, 1], plain[:, 1])


class StopError(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
def test_nothing_of_a_failed_gradient_pass_survives_it(where, monkeypatch):
    """Whatever ends it, out of memory too: its maps, their graph, the session and the guider are gone."""
    model, alive = families.build("sd15"), []

    def keep(*things):
        alive.extend(weakref.ref(thing) for thing in things)

    whole = gradient.subject_maps

    def failing(attention, subjects):
        keep(attention)
        if where == "loss":
            raise StopError
        maps = whole(attention, subjects)
        if where == "backward":
            maps.register_hook(lambda g: (_ for _ in ()).throw(StopError))
        return maps

    started = gradient.gradient

    def watch(session, guider, inner, x, *rest):
        keep(session, guider, inner)
        return started(session, guider, inner, x, *rest)

    read = gradient._Reading.read
    seen = []

    def count(self, call, weights):
        keep(self, weights)
        seen.append(call.site.name)
        if where == "forward" and len(seen) == 2:
            raise torch.OutOfMemoryError("no memory")
        return read(self, call, weights)

    monkeypatch.setattr(gradient, "subject_maps", failing)
    monkeypatch.setattr(blending, "gradient", watch)
    monkeypatch.setattr(gradient._Reading, "read", count)
    settings = {"optimize": "entropy", "size": (6, 8), "steps": 2}
    with pytest.raises((StopError, torch.OutOfMemoryError)):
        run(model, branches(), **settings)
    gc.collect()
    assert len(alive) > 4 and not [ref() for ref in alive if ref() is not None]
    assert all("forward" not in vars(m) for m in model.model.diffusion_model.modules())
    monkeypatch.undo()
    close(run(model, branches(), **settings)[0], run(families.build("sd15"), branches(), **settings)[0])


def test_optimising_weights_made_in_inference_mode_in_parts_and_under_a_noise_mask():
    with torch.inference_mode():
        model = families.build("sd15")
        assert next(model.model.diffusion_model.parameters()).is_inference()
        latent = {"samples": torch.randn(1, 4, 6, 8), "noise_mask": torch.ones(1, 48, 64)}
        latent["noise_mask"][..., 32:] = 0
        settings = {"latent": latent, "optimize": "entropy + centroid", "denoise": 0.9, "steps": 3}
        ours, _ = run(model, branches(), **settings)
        close(ours, run(model, branches(), branches_at_once=1, **settings)[0])
    plain = families.shared("sd15")
    close(ours, run(plain, branches(), **settings)[0])
    differs(ours, run(plain, branches(), **{**settings, "optimize": "off"})[0])


def test_kernels_without_a_gradient_are_told_before_sampling(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check("euler", Settings(), "unet")
    check("euler", Settings(optimize="off"), "wan")
    with pytest.raises(ValueError, match="set optimize to off"):
        check("euler", Settings(), "wan")
