"""Refine Attention against loops and its own Gaussian, and against whole runs with softmax written out."""

import pytest
import torch

from attune.demo import model as demo_model
from attune.language.words import prompt_words
from attune.methods import refine as maths
from attune.nodes.refine import AttuneRefineMaps
from attune.patches import fusion, headfilter, refine, regulation, scfg, softpag
from attune.patches.hook.install import model_sites, request
from attune.patches.hook.requests import ReadWeights
from attune.patches.hook.sites import select
from attune.patches.maps import recorder
from attune.patches.maps.record import Settings as Kept
from attune.tests import families
from attune.tests.families import words, written_out
from attune.tests.helpers import close, differs
from attune.tests.methods.test_refine import slow_refine
from attune.tools.benchmarks.shared.pictures import generate

sample = families.sample
TWO = words((1,), (3, 4))
TARGETS = (1, 3, 4)


def slow(model, targets, rounds, keep, sigma, size=(8, 8), length=7, copies=1):
    """The model with every map refined in its conditional rows. ``copies``: ComfyUI repeats the prompt."""

    def change(seen):
        if seen.kind == "self":
            return seen.out
        for row, role in enumerate(seen.roles):
            for head in range(seen.weights.shape[1] if role == 0 else 0):
                image = seen.weights[row, head, seen.image]
                at = [c + i * length for c in targets for i in range(copies)]
                image[:] = slow_refine(image, at, seen.grid, rounds, keep, sigma)
        return seen.out

    return written_out(model, change, size, length)


def test_every_token_leaves_out_the_start_tokens():
    assert refine.every_token(77) == tuple(range(1, 77))
    assert refine.every_token(154) == (*range(1, 77), *range(78, 154))
    assert refine.every_token(7) == tuple(range(1, 7))


# --- runs ---


@pytest.mark.parametrize("name", [*families.NAMES, "qwen_image", "z_image", "wan"])  # the reference is very slow
def test_equals_the_written_out_run(name):
    model, settings = families.shared(name), {"steps": 1, "size": (8, 12), "batch": 2}
    ours = sample(refine.apply(model, TWO, 2, 0.6, 0.8), **settings)
    close(ours, sample(slow(model, TARGETS, 2, 0.6, 0.8, (8, 12)), **settings), 2e-3)
    differs(ours, sample(model, **settings))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_without_words_it_is_every_token_but_the_first(name):
    model, settings = families.shared(name), {"steps": 1, "negative": families.text(2, 11)}
    ours = sample(refine.apply(model, rounds=1), **settings)
    close(ours, sample(slow(model, range(1, 7), 1, 0.7, 0.8), **settings), 2e-3)


def test_a_prompt_that_comfyui_repeats():
    model, settings = families.shared("sd15"), {"steps": 1, "negative": families.text(2, 14)}
    ours = sample(refine.apply(model, TWO, 1), **settings)
    close(ours, sample(slow(model, TARGETS, 1, 0.7, 0.8, copies=2), **settings), 2e-3)


@pytest.mark.parametrize("name", families.NAMES)
def test_off_is_the_plain_model_to_the_last_bit(name):
    model = families.shared(name)
    plain = sample(model)
    assert torch.equal(sample(refine.apply(model, TWO, 0)), plain)
    assert torch.equal(sample(refine.apply(model, TWO, start_percent=1.0)), plain)


def test_span_and_rows():
    """It works inside its span, in the conditional rows, and rows of the map sum to one."""
    model = families.shared("sd15")
    found = []
    for patched in (model.clone(), refine.apply(model, TWO, 1, end_percent=0.4)):
        seen = []
        place = {("input.1.0", "cross"): None}  # nothing before it is changed in a step
        request(patched, ReadWeights(place, lambda call, w, seen=seen: seen.append((call.step, call.chunks, w.clone()))))
        sample(patched, steps=4)
        found.append(seen)
    (step, chunks, plain), (_, _, refined) = found[0][0], found[1][0]
    assert step == 0
    for row, role in enumerate(chunks):
        if role == 0:
            differs(refined[row], plain[row])
            torch.testing.assert_close(refined[row].sum(-1), torch.ones_like(refined[row, ..., 0]))
        else:
            torch.testing.assert_close(refined[row], plain[row])
    zeros = [[(float((w[chunks.index(0)][..., 1] == 0).float().mean())) for _, chunks, w in seen] for seen in found]
    assert zeros[0] == [0] * 4 and zeros[1][0] > 0 and zeros[1][3] == 0


def test_only_the_prompt_that_the_words_are_of():
    model = families.shared("sd15")
    area = [[families.text(5)[0][0], {**families.text(5)[0][1], "area": (4, 8, 0, 0), "strength": 1.0}]]
    for given, expected in ((TWO, 1), (None, 2)):
        seen = []
        patched = refine.apply(model, given, 1)
        look = ReadWeights({("input.1.0", "cross"): None}, lambda call, w, seen=seen: seen.extend(w), rows="cond")
        request(patched, look)
        sample(patched, positive=[*area, *families.text(1)], steps=1)
        assert len(seen) == 2 and sum(bool((w[..., 1] == 0).any()) for w in seen) == expected


def test_memory_of_the_refinement_does_not_grow_with_the_batch():
    """Its own working memory is bounded by its blocks: the largest tensor that Gaussians see stays the same."""
    model = families.shared("sd15")
    sizes, true = [], maths.smooth
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maths, "BLOCK_ELEMENTS", 2000)
        patch.setattr(maths, "smooth", lambda m, sigma: sizes.append(m.numel()) or true(m, sigma))
        sample(refine.apply(model, rounds=1), steps=1, batch=5)
    assert sizes and max(sizes) <= 2000


def test_bad_input_is_told_before_sampling():
    model = families.shared("sd15")
    with pytest.raises(ValueError, match="Refine Attention: keep must be from 0 to 1, not 2"):
        refine.apply(model, TWO, keep=2)
    with pytest.raises(ValueError, match="rounds must be from 0 to 100, not -1"):
        refine.apply(model, TWO, -1)
    with pytest.raises(ValueError, match="sigma must be from 0 to 8"):
        refine.apply(model, TWO, sigma=9)
    with pytest.raises(ValueError, match="swap them"):
        refine.apply(model, TWO, start_percent=0.9, end_percent=0.1)
    with pytest.raises(ValueError, match="no words to refine"):
        refine.apply(model, words())
    for name in ("sd3", "flux"):
        with pytest.raises(ValueError, match="connect Prompt Words"):
            refine.apply(families.shared(name))
    steps = []
    with pytest.raises(ValueError, match="words are of a prompt with 12 token columns"):
        sample(refine.apply(model, words((1, 2), total=12)), callback=lambda *a: steps.append(a))
    assert not steps


@pytest.mark.parametrize("name", families.NAMES)
def test_stacks_and_leaves_nothing(name):
    model = families.shared(name)
    before = (str(model.model_options), str(model.wrappers))
    family, sites = model_sites(model)
    one = refine.apply(model, TWO, 1)
    alone = sample(one)
    others = [
        refine.apply(one, TWO, 1, 0.9),
        fusion.apply(one, TWO),
        headfilter.apply(one, select(f"{sites[-1].name}:0", sites, family), "both"),
        regulation.apply(one, words((2,)), regulation.Settings(iterations=2)),
        softpag.apply(one, 3.0, 1.0, 0.0, 1.0, 0.0),
        scfg.apply(one)[0],
    ]
    for stacked in others:
        assert not torch.equal(sample(stacked), alone)
    kept, held = recorder.apply(one, Kept("cross"))
    assert torch.equal(sample(kept), alone) and held.record().bytes
    assert (str(model.model_options), str(model.wrappers)) == before
    assert torch.equal(sample(one), alone)


def test_the_node_on_the_bundled_model():
    model, clip, vae = demo_model.load()
    text = "a red star and a blue circle"
    schema = AttuneRefineMaps.define_schema()
    assert [i.id for i in schema.inputs] == ["model", "words", "rounds", "keep", "sigma", "start_percent", "end_percent"]
    defaults = {i.id: i.default for i in schema.inputs if i.id not in ("model", "words")}
    assert list(defaults.values()) == [2, 0.7, 0.8, 0.0, 1.0]
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))
    found = prompt_words(clip, text, "star, circle")
    pictures = [generate(model, clip, vae, [text], 5.0, 1, 4)]
    for given in ({}, {"words": found}):
        (patched,) = AttuneRefineMaps.execute(model, **defaults, **given).args
        pictures.append(generate(patched, clip, vae, [text], 5.0, 1, 4))
    assert all(p.isfinite().all() for p in pictures)
    differs(pictures[0], pictures[1])
    differs(pictures[0], pictures[2])
    differs(pictures[1], pictures[2])
