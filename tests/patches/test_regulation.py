"""Attention Regulation against the paper's equations under autograd in float64, and on ComfyUI's models."""

from __future__ import annotations

from typing import Any

import comfy.sample
import pytest
import torch
from torch import Tensor

from attune.language.words import Words
from attune.methods import regulation as maths
from attune.patches import regulation
from attune.patches.hook.call import AttentionCall
from attune.patches.hook.install import model_sites, request
from attune.patches.hook.requests import BlendOutputs, EditWeights, ReadWeights
from attune.tests import families
from attune.tests.families import words
from attune.tests.helpers import close, differs

Settings = regulation.Settings
sample = families.sample


# --- words ------------------------------------------------------------------------------------------------------------


def test_start_and_end_tokens():
    def found(total, content, **counts):
        special = tuple(sorted(set(range(total)) - set(content)))
        return regulation.start_and_end(Words("", (), (), special, total, counts))

    assert found(77, range(1, 6), l=77) == (0, 6)
    assert found(77, range(1, 76), l=77) == (0, 76)
    assert found(154, [*range(1, 76), *range(78, 90)], l=154, g=154) == (0, 76, 77, 90)
    assert found(154, [*range(1, 6), *range(77, 83)], l=77, g=77, t5xxl=77) == (0, 6, 83)  # SD3: T5 after CLIP
    assert found(256, range(0, 9), l=77, t5xxl=256) == (9,)  # FLUX: T5 alone


# --- on ComfyUI's models ----------------------------------------------------------------------------------------------

TWO = words((1,), (2, 3))
WHOLE = Settings(end_percent=1.0)
RESTORED = [0, 5]


class Spy:
    """Sees every call of attention of a run with its full map, before and after the edit."""

    def __init__(self, model: Any):
        self.seen: list[tuple[str, int | None, tuple[int, ...], Tensor]] = []
        _, sites = model_sites(model)
        where = {(s.name, kind): None for s in sites for kind in s.kinds if kind != "self"}
        self.model = model.clone()
        request(self.model, ReadWeights(where, self.look))

    def look(self, call: AttentionCall, weights: Tensor) -> None:
        roles = tuple(role for role in call.chunks for _ in range(call.batch // len(call.chunks)))
        self.seen.append((call.site.name, call.step, roles, weights.clone()))


def looked(model: Any, **settings: Any) -> list[tuple[str, int | None, tuple[int, ...], Tensor]]:
    spy = Spy(model)
    sample(spy.model, **settings)
    return spy.seen


@pytest.mark.parametrize("name", families.EVERY)
def test_changes_conditional_rows_of_its_layers_and_columns_keep_their_sum(name):
    model = families.shared(name)
    patched = regulation.apply(model, TWO, WHOLE)
    family, sites = model_sites(model)
    chosen = {s.name for s in regulation.auto_layers(sites, family)}
    settings = {"steps": 1, "size": (8, 12), "batch": 2}
    first = None
    for (site, _, roles, before), (other, _, _, after) in zip(
        looked(model, **settings), looked(patched, **settings), strict=True
    ):
        assert site == other
        if first is None and site in chosen:  # everything before the first regulated layer is equal
            first = site
            raised = torch.tensor([r == 0 for r in roles])
            torch.testing.assert_close(after[~raised], before[~raised], rtol=1e-4, atol=1e-6)
            new, old = after[raised].double(), before[raised].double()
            torch.testing.assert_close(new[..., RESTORED], old[..., RESTORED])
            off = [(w[..., [1, 2, 3]].mean(2) - 0.2).abs().mean() for w in (new, old)]  # from a fifth of the picture each
            assert off[0] < 0.5 * off[1]
            assert (new - old).abs().max() > 0.01
            if family == "unet":  # all but the restored two come from rows that sum to one
                total = new.sum(-1) - old[..., RESTORED].sum(-1)
                others = [4, 6]
                factor = (new[..., others] / old[..., others]).mean(-1)
                unrestored = total + (old[..., RESTORED] * factor[..., None]).sum(-1)
                torch.testing.assert_close(unrestored, torch.ones_like(unrestored), rtol=1e-4, atol=1e-4)
    assert first is not None
    differs(sample(patched, **settings), sample(model, **settings))


def last_layer(model: Any) -> Any:
    """The last layer of `auto_layers`: what little rounding there is before it is not raised by layers that were edited already."""
    family, sites = model_sites(model)
    site = regulation.auto_layers(sites, family)[-1]
    return regulation.Heads(family, ((site.name, tuple(range(site.heads))),))


def slow_run(model: Any, targets: list[int], restored: list[int], settings: dict[str, Any], seed: int = 0):
    """Another way to the same: attention written out in float64 at the last layer, the edit put into all of the map."""
    _, sites = model_sites(model)
    calls = [(s, kind) for s in sites for kind in s.kinds]
    chosen = {name for name, _ in last_layer(model).chosen}
    patched = model.clone()
    averages: dict[str, tuple[int, Tensor]] = {}
    seen = {"calls": 0}

    def override(func, q, k, v, heads, *rest, **kwargs):
        site, kind = calls[seen["calls"] % len(calls)]
        seen["calls"] += 1
        options = kwargs["transformer_options"]
        if site.name not in chosen or kind == "self":
            return func(q, k, v, heads, *rest, **kwargs)
        a, b, c = (t.double().reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        scores = a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5
        weights = scores.softmax(-1)
        step = int((options["sample_sigmas"] >= options["sigmas"][0] * (1 - 1e-6)).sum()) - 1
        chunks = options["cond_or_uncond"]
        pictures = len(q) // len(chunks)
        grid = tuple(options["activations_shape"][-2:])
        start = chunks.index(0) * pictures
        rows = slice(start, start + pictures)
        if site.name not in averages or averages[site.name][0] != step:
            flat = maths.with_others(scores[rows].softmax(-1), torch.tensor(targets)).flatten(1, 2).float()
            p = maths.problem(grid, len(targets), like=flat)
            if site.name in averages:
                before = averages[site.name][1]
                best = maths.solve(flat, before.flatten(1, 2).float(), p, again=True)
            else:
                theta = maths.start(len(targets), heads, seed + 1_000_003 * site.layer + 7_919 * step, flat)
                before = best = maths.solve(flat, maths.additive(theta.repeat(1, pictures, 1, 1), p), p)
            before, best = (t.reshape(-1, pictures, heads, flat.shape[-1]).double() for t in (before, best))
            averages[site.name] = (step, 0.25 * before + 0.75 * best)
        edit = torch.zeros_like(scores[rows])
        edit[..., targets] = 0.99**step * averages[site.name][1][:-1].permute(1, 2, 3, 0)
        new = (scores[rows] + edit).softmax(-1)
        new[..., restored] = weights[rows][..., restored]
        weights[rows] = new
        return (weights @ c).transpose(1, 2).flatten(2).to(q.dtype)

    patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    return sample(patched, **settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd15", {"steps": 3, "size": (12, 20), "batch": 2}),
        ("sdxl", {"steps": 2, "size": (16, 16)}),
        ("sd15", {"steps": 2, "sampler": "heun", "size": (16, 16)}),
        ("sd15", {"steps": 2, "sampler": "dpm_2", "size": (16, 16)}),
    ],
)
def test_equals_the_written_out_run(name, settings):
    model = families.shared(name)
    ours = sample(regulation.apply(model, TWO, WHOLE, heads=last_layer(model)), **settings)
    close(ours, slow_run(model, [1, 2, 3], RESTORED, settings), 5e-3)
    differs(ours, sample(model, **settings))


def test_words_in_the_second_chunk():
    model = families.shared("sd15")
    many = words((80,), (81, 82), total=154, content=[*range(1, 76), *range(78, 90)])
    settings = {"positive": families.text(1, 154), "negative": families.text(2, 154), "steps": 2, "size": (16, 16)}
    ours = sample(regulation.apply(model, many, WHOLE, heads=last_layer(model)), **settings)
    close(ours, slow_run(model, [80, 81, 82], [0, 76, 77, 90], settings), 5e-3)


@pytest.mark.parametrize("name", families.NAMES)
@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"start_percent": 1.0}])
def test_off_is_off_to_the_bit(name, settings):
    model = families.shared(name)
    assert torch.equal(
        sample(regulation.apply(model, TWO, Settings(**{"end_percent": 1.0, **settings})), steps=2), sample(model, steps=2)
    )


def test_strength_and_span():
    model = families.shared("sd15")
    plain = sample(model, steps=4)
    outs = [sample(regulation.apply(model, TWO, Settings(strength=s)), steps=4) for s in (1e-4, 0.5, 1.0)]
    close(outs[0], plain, 1e-2)
    differs(outs[1], outs[2])
    steps = {step for _, step, _, _ in looked(regulation.apply(model, TWO), steps=4)}
    assert steps == {0, 1, 2, 3}
    differs(outs[2], sample(regulation.apply(model, TWO, WHOLE), steps=4))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_repeated_prompt_is_the_same_prompt(name):
    """Beside a negative prompt twice or three times as long, ComfyUI repeats the positive one; the edit is the same."""
    plain = families.shared(name)
    model = regulation.apply(plain, TWO, WHOLE, heads=last_layer(plain))
    long = families.text(2, 7)
    settings = {"size": (16, 16), "steps": 1}
    for times in (2, 3):
        longer = [[long[0][0].repeat(1, times, 1), long[0][1]]]
        close(
            sample(plain, negative=longer, **settings), sample(plain, negative=long, **settings)
        )  # nor does the plain picture change
        close(sample(model, negative=longer, **settings), sample(model, negative=long, **settings), 5e-3)


def test_hook_gives_sums_over_copies_and_spreads_the_change():
    """Any edit and read with a period sees the prompt as if it were there once."""
    model, place = families.shared("sd15"), ("middle.0.0", "cross")
    long = families.text(2, 7)
    runs = []
    for times in (1, 2, 3):
        maps: list[Tensor] = []
        patched = model.clone()

        def act(call: AttentionCall, w: Tensor) -> tuple[Tensor, Tensor]:
            new = torch.stack([w[..., 0] * 0.5, w[..., 1] + 0.1], -1)
            return new, (1 - new.sum(-1, keepdim=True)) / (1 - w.sum(-1, keepdim=True))

        request(
            patched,
            EditWeights({place: (0, 2)}, act, rows="cond", columns=(4, 2), prompt_columns=7),
            ReadWeights({place: None}, lambda call, w, maps=maps: maps.append(w), rows="cond", prompt_columns=7),
            ReadWeights(
                {place: None}, lambda call, w, maps=maps: maps.append(w), rows="cond", columns=(2, 5), prompt_columns=7
            ),
        )
        out = sample(patched, negative=[[long[0][0].repeat(1, times, 1), long[0][1]]], batch=2)
        runs.append((out, maps))
    for out, maps in runs[1:]:
        close(out, runs[0][0], 1e-3)
        for ours, right in zip(maps, runs[0][1], strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-5)
    assert runs[0][1][0].shape[-1] == 7
    torch.testing.assert_close(runs[0][1][0].sum(-1), torch.ones(2, 4, 16), rtol=1e-4, atol=1e-4)
    differs(runs[0][0], sample(model, negative=long, batch=2))


def test_a_prompt_of_another_length_is_left_alone():
    model = families.shared("sd15")
    patched = model.clone()
    place = ("middle.0.0", "cross")
    request(patched, EditWeights({place: None}, lambda call, w: (w * 0, None), columns=(9,), prompt_columns=11))
    assert torch.equal(sample(patched), sample(model))


def test_only_the_prompt_that_the_words_belong_to():
    """A second positive prompt, of another length too, is not edited."""
    model = families.shared("sd15")
    both = [*families.text(1), *families.text(5, 14)]
    seen = looked(regulation.apply(model, TWO, WHOLE), positive=both, steps=1)
    plain = looked(model, positive=both, steps=1)
    first = next(s.name for s in regulation.auto_layers(model_sites(model)[1], "unet"))
    changed = 0
    for (site, _, _, before), (_, _, _, after) in zip(plain, seen, strict=True):
        if site == first:
            rows = (after - before).abs().amax((1, 2, 3)) > 1e-3
            changed += int(rows.sum())
    assert changed == 1


def test_state_lives_in_one_run(monkeypatch):
    """A second run, a run after one that was interrupted, and one after another size all begin anew."""
    patched = regulation.apply(families.shared("sd15"), TWO, WHOLE)
    right = sample(patched, steps=3)

    class StopError(Exception):
        pass

    def stop(*args: Any) -> None:
        raise StopError

    with pytest.raises(StopError):
        sample(patched, steps=3, callback=stop)
    assert torch.equal(sample(patched, steps=3), right)
    sample(patched, steps=3, size=(12, 8), seed=9)
    assert torch.equal(sample(patched, steps=3), right)


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 3), ("heun", 5), ("dpm_2", 5)])
def test_the_edit_moves_on_once_a_step(sampler, evaluations, monkeypatch):
    model, solved, forwards = families.shared("sd15"), [], []
    true_solve, true_edit = maths.solve, regulation._Regulation.edit
    monkeypatch.setattr(maths, "solve", lambda *args, **more: solved.append(1) or true_solve(*args, **more))
    monkeypatch.setattr(regulation._Regulation, "edit", lambda *args: forwards.append(1) or true_edit(*args))
    sample(regulation.apply(model, TWO, WHOLE), sampler=sampler, steps=3)
    layers = len(regulation.auto_layers(model_sites(model)[1], "unet"))
    assert len(solved) == 3 * layers and len(forwards) == evaluations * layers


def test_the_seed_decides(monkeypatch):
    model = regulation.apply(families.shared("sd15"), TWO, WHOLE)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def run(seed: int) -> Tensor:
        latent = torch.zeros_like(noise)
        settings = {"seed": seed, "disable_pbar": True}
        return comfy.sample.sample(
            model, noise, 2, 3.0, "euler", "normal", families.text(1), families.text(2), latent, **settings
        )

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(5)
    assert torch.equal(run(2**64 - 1), run(2**64 - 1))


def test_a_picture_does_not_depend_on_its_batch():
    model = families.shared("sd15")
    model = regulation.apply(model, TWO, WHOLE, heads=last_layer(model))
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def run(part: Tensor) -> Tensor:
        latent = torch.zeros_like(part)
        return comfy.sample.sample(
            model, part, 1, 3.0, "euler", "normal", families.text(1), families.text(2), latent, seed=1, disable_pbar=True
        )

    together = run(noise)
    for i in range(3):
        close(together[i : i + 1], run(noise[i : i + 1]), 5e-3)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_cond_and_uncond_in_one_batch_or_two(sampler, monkeypatch):
    model = families.shared("sd15")
    model = regulation.apply(model, TWO, WHOLE, heads=last_layer(model))
    settings = {"sampler": sampler, "size": (16, 16)}
    together = sample(model, **settings)
    monkeypatch.setattr(type(model.model), "memory_required", lambda *args, **kwargs: 1e30)
    close(sample(model, **settings), together, 5e-3)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_bf16_models_stay_in_their_dtype(name):
    model = families.build(name).clone()
    model.model.diffusion_model.to(torch.bfloat16)
    model.model.manual_cast_dtype = None
    model.model.diffusion_model.dtype = torch.bfloat16
    seen = set()
    patched = regulation.apply(model, TWO, WHOLE)
    place = ("middle.0.0", "self") if name == "sd15" else ("single.1", "joint")
    request(patched, BlendOutputs({place: (0,)}, lambda call, heads: seen.add(heads.out.dtype) or heads.out))
    out = sample(patched)
    assert out.isfinite().all() and seen == {torch.bfloat16}
    differs(out, sample(model))


def test_layers_of_a_selection_and_their_heads():
    model = families.shared("sd15")
    family, _ = model_sites(model)
    heads = regulation.Heads(family, (("middle.0.0", (1, 3)),))
    before, after = (looked(m, steps=1) for m in (model, regulation.apply(model, TWO, WHOLE, heads=heads)))
    for (site, _, roles, a), (_, _, _, b) in zip(before, after, strict=True):
        if site == "middle.0.0":
            changed = (a - b).abs().amax((2, 3)) > 1e-3
            assert changed.tolist() == [[r == 0 and h in (1, 3) for h in range(4)] for r in roles]
            break


def test_auto_layers_are_the_papers():
    class Block:
        def __init__(self, name: str, stride: int):
            self.name, self.stride, self.kinds = name, stride, ("self", "cross")

    names = [("input", (1, 2), 1), ("input", (4, 5), 2), ("input", (7, 8), 4), ("middle", (0,), 8)]
    names += [("output", (3, 4, 5), 4), ("output", (6, 7, 8), 2), ("output", (9, 10, 11), 1)]
    sd15 = [Block(f"{place}.{i}.0", stride) for place, blocks, stride in names for i in blocks]
    found = [s.name for s in regulation.auto_layers(tuple(sd15), "unet")]  # type: ignore[arg-type]
    assert found == ["input.7.0", "input.8.0", "output.3.0", "output.4.0", "output.5.0"]
    for name in families.NAMES:
        family, sites = model_sites(families.shared(name))
        assert regulation.auto_layers(sites, family)


def test_bad_input_is_refused_before_sampling():
    model = families.shared("sd15")
    with pytest.raises(ValueError, match="swap"):
        regulation.apply(model, TWO, Settings(start_percent=0.9, end_percent=0.1))
    with pytest.raises(ValueError, match="no words"):
        regulation.apply(model, words())
    with pytest.raises(ValueError, match="another model"):
        regulation.apply(model, TWO, heads=regulation.Heads("flux", (("double.0", (0,)),)))
    calls: list[int] = []
    patched = regulation.apply(model, words((1,), total=14))
    with pytest.raises(ValueError, match="Connect the same CLIP"):
        sample(patched, callback=lambda *args: calls.append(1))
    assert not calls


def test_stacks_with_itself_and_with_guidance():
    from attune.patches import softpag

    model = families.shared("sd15")
    one = regulation.apply(model, words((1,)), WHOLE)
    two = regulation.apply(one, words((2, 3)), WHOLE)
    differs(sample(two), sample(one))
    guided = softpag.apply(one, 3.0, 1.0, 0.0, 1.0, 0.0)
    out = sample(guided)
    assert out.isfinite().all()
    differs(out, sample(one))


def test_gradients_flow_through_the_edited_map():
    """A method that moves the latent may differentiate a regulated forward; the edit itself is a constant there."""
    model = families.shared("sd15")
    patched = regulation.apply(model, TWO, WHOLE)
    maps: list[Tensor] = []
    request(patched, ReadWeights({("output.1.0", "cross"): None}, lambda call, w: maps.append(w), columns=(1,)))
    options = {**patched.model_options["transformer_options"], "wrappers": patched.wrappers, "cond_or_uncond": [0]}
    with torch.enable_grad():
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        patched.model.apply_model(x, torch.tensor([5.0]), c_crossattn=families.text(1)[0][0], transformer_options=options)
        (slope,) = torch.autograd.grad(maps[0].square().sum(), x)
    assert slope.isfinite().all() and slope.abs().max() > 0


# --- the node ---------------------------------------------------------------------------------------------------------


def test_the_node():
    from attune.nodes.regulation import AttuneRegulation

    schema = AttuneRegulation.define_schema()
    names = "model words strength layers iterations mass_weight deviation_weight ema decay start_percent end_percent form"
    assert [i.id for i in schema.inputs] == names.split()
    defaults = {i.id: i.default for i in schema.inputs if i.id not in ("model", "words")}
    assert list(defaults.values()) == [1.0, "auto", 20, 80.0, 0.1, 0.25, 0.99, 0.0, 0.5, "paper"]
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))

    model = families.shared("sd15")
    (auto,) = AttuneRegulation.execute(model, TWO, **defaults).args
    (chosen,) = AttuneRegulation.execute(model, TWO, **{**defaults, "layers": "middle.*.*:0-1"}).args
    assert torch.equal(sample(auto), sample(regulation.apply(model, TWO)))
    differs(sample(chosen), sample(auto))
    with pytest.raises(ValueError, match="no site"):
        AttuneRegulation.execute(model, TWO, **{**defaults, "layers": "sky"})
