"""Phrase fusion against whole runs with softmax written out, and its phrases on real prompts."""

import dataclasses

import pytest
import torch

from attune.demo import model as demo_model
from attune.language.decompose import decompose
from attune.language.phrases import fusable
from attune.language.words import Phrase, Words, prompt_words
from attune.nodes.detail import encode
from attune.nodes.fusion import AttunePhraseFusion
from attune.patches import fusion, headfilter, prompts, refine, regulation, scfg, softpag
from attune.patches.detail import sampler as detail
from attune.patches.hook.install import model_sites, request
from attune.patches.hook.requests import ReadWeights
from attune.patches.hook.sites import select
from attune.patches.maps import recorder
from attune.patches.maps.record import Settings as Kept
from attune.tests import families
from attune.tests.families import words, written_out
from attune.tests.helpers import close, differs
from attune.tests.methods.test_fusion import slow_fuse
from attune.tools.benchmarks.shared.pictures import generate

sample = families.sample
PHRASES = words((1, 2), (4, 5, 6))
TWO = {"steps": 2, "size": (8, 12), "batch": 2}


def slow(model, groups, strength, size=(8, 8), length=7, uuid=None, copies=1):
    """The model with every map fused in loops, in its conditional rows."""

    def change(seen):
        if seen.kind == "self":
            return seen.out
        for row, role in enumerate(seen.roles):
            for head in range(seen.weights.shape[1] if role == 0 else 0):
                image = seen.weights[row, head, seen.image]
                whole = image[:, seen.text].unflatten(1, (copies, -1))
                fused = slow_fuse(whole.sum(1), groups, strength)
                image[:, seen.text] = (whole + ((fused - whole.sum(1)) / copies)[:, None]).flatten(1)
        return seen.out

    return written_out(model, change, size, length)


def test_clip_and_t5_are_fused_apart():
    sd3 = Words("", (Phrase("red car", (1, 2, 77, 78), {"l": (1, 2), "t5xxl": (0, 1)}),), (), (), 154, {"l": 77, "t5xxl": 77})
    assert fusion.groups(sd3) == ((1, 2), (77, 78))
    flux = Words("", (Phrase("red car", (0, 1), {"l": (1, 2), "t5xxl": (0, 1)}),), (), (), 256, {"l": 77, "t5xxl": 256})
    assert fusion.groups(flux) == ((0, 1),)


# --- runs ---


@pytest.mark.parametrize(("name", "tokens"), [*((n, 7) for n in families.EVERY), ("sd15", 11), ("sdxl", 11)])  # 11: two batches
def test_equals_the_written_out_run(name, tokens):
    model, settings = families.shared(name), {**TWO, "negative": families.text(2, tokens)}
    ours = sample(fusion.apply(model, PHRASES, 0.8), **settings)
    close(ours, sample(slow(model, [(1, 2), (4, 5, 6)], 0.8, (8, 12)), **settings), 1e-3)
    differs(ours, sample(model, **settings))


def test_a_film_of_several_frames():
    model, settings = families.shared("wan"), {"steps": 1, "size": (8, 12), "frames": 2, "batch": 2}
    ours = sample(fusion.apply(model, PHRASES, 0.8), **settings)
    close(ours, sample(slow(model, [(1, 2), (4, 5, 6)], 0.8, (8, 12)), **settings), 1e-3)


def test_a_prompt_of_two_chunks_and_one_that_comfyui_repeats():
    model = families.shared("sd15")
    long = words((75, 80), total=154, content=range(1, 150))
    settings = {"positive": families.text(1, 154), "negative": families.text(2, 77), "steps": 1}
    close(sample(fusion.apply(model, long, 1.0), **settings), sample(slow(model, [(75, 80)], 1.0), **settings), 1e-3)
    settings = {"positive": families.text(1, 7), "negative": families.text(2, 14), "steps": 1}
    ours = sample(fusion.apply(model, PHRASES, 1.0), **settings)
    close(ours, sample(slow(model, [(1, 2), (4, 5, 6)], 1.0, copies=2), **settings), 1e-3)


@pytest.mark.parametrize("name", families.NAMES)
def test_off_is_the_plain_model_to_the_last_bit(name):
    model = families.shared(name)
    plain = sample(model)
    assert torch.equal(sample(fusion.apply(model, PHRASES, 0.0)), plain)
    assert torch.equal(sample(fusion.apply(model, words((3,)))), plain)  # single tokens have nothing to share


def test_only_the_prompt_that_the_words_are_of():
    model = families.shared("sd15")
    other = [[families.text(5)[0][0], {**families.text(5)[0][1], "area": (4, 8, 0, 0), "strength": 1.0}]]
    both = [*other, *families.text(1)]
    seen = []

    def look(call, weights):
        seen.append((call.uuids, [float((w[..., 1] - w[..., 2]).abs().max()) for w in weights]))

    patched = fusion.apply(model, PHRASES, 1.0)
    request(patched, ReadWeights({("middle.0.0", "cross"): None}, look, rows="cond", columns=(0, 1, 2)))
    sample(patched, positive=both, steps=1)
    gaps = [gap for _, found in seen for gap in found]
    assert len(gaps) == 2 and min(gaps) < 1e-6 < 1e-3 < max(gaps)  # one of the two prompts is fused, the other is not


def test_chosen_heads_only_and_readers_see_it():
    model = families.shared("sd15")
    heads = select("middle.0.0:0,2", model_sites(model)[1], "unet")
    seen = []
    patched = fusion.apply(model, PHRASES, 1.0, heads)
    request(patched, ReadWeights({("middle.0.0", "cross"): None}, lambda call, w: seen.append(w), rows="cond"))
    sample(patched, steps=1)
    gap = (seen[0][0][..., 1] - seen[0][0][..., 2]).abs().amax(-1)
    assert (gap[[0, 2]] < 1e-6).all() and (gap[[1, 3]] > 1e-4).all()
    torch.testing.assert_close(seen[0].sum(-1), torch.ones_like(seen[0][..., 0]))


def test_bad_input_is_told_before_sampling(monkeypatch):
    model = families.shared("sd15")
    with pytest.raises(ValueError, match="Phrase Fusion: there are no words"):
        fusion.apply(model, words())
    with pytest.raises(ValueError, match=r"strength must be from 0 to 1, not 1\.5"):
        fusion.apply(model, PHRASES, 1.5)
    with pytest.raises(ValueError, match="another model"):
        fusion.apply(model, PHRASES, heads=select("joint.1", model_sites(families.shared("sd3"))[1], "sd3"))
    steps = []
    with pytest.raises(
        ValueError, match="words are of a prompt with 12 token columns, and the sampler's positive prompt has 7"
    ):
        sample(fusion.apply(model, words((1, 2), total=12)), callback=lambda *a: steps.append(a))
    assert not steps
    wordless = tuple(dataclasses.replace(site, kinds=("self",)) for site in model_sites(model)[1])
    monkeypatch.setattr(prompts, "model_sites", lambda model: ("unet", wordless))
    with pytest.raises(ValueError, match="no attention to text; connect"):
        fusion.apply(model, PHRASES)


@pytest.mark.parametrize("name", families.NAMES)
def test_stacks_with_every_other_node_and_leaves_nothing(name):
    model = families.shared(name)
    before = (str(model.model_options), str(model.wrappers))
    family, sites = model_sites(model)
    heads = select(f"{sites[-1].name}:0", sites, family)
    one = fusion.apply(model, PHRASES)
    stacks = [
        fusion.apply(one, words((2, 3))),
        headfilter.apply(one, heads, "both"),
        refine.apply(one, PHRASES, 1),
        softpag.apply(one, 3.0, 1.0, 0.0, 1.0, 0.0),
        scfg.apply(one)[0],
        regulation.apply(one, words((3,)), regulation.Settings(iterations=2)),
    ]
    alone = sample(one)
    for stacked in stacks:
        assert not torch.equal(sample(stacked), alone)
    kept, held = recorder.apply(one, Kept("cross"))
    assert torch.equal(sample(kept), alone) and held.record().bytes
    assert (str(model.model_options), str(model.wrappers)) == before
    assert torch.equal(sample(one), alone)


@pytest.fixture(scope="module")
def demo():
    return demo_model.load()


def test_tools_without_words_under_the_detail_sampler(demo):
    model, clip, _ = demo
    text = "a red star and a blue circle"
    branches = decompose(text, manual="* | a star and a circle\nstar | a red star and a circle")
    tools = [
        lambda m: refine.apply(m, None, 1),
        lambda m: headfilter.apply(m, select("middle.0.0:0", model_sites(m)[1], "unet"), "cross"),
    ]
    latent = {"samples": torch.zeros(1, 4, 16, 12)}
    given = (
        encode(clip, branches),
        clip.encode_from_tokens_scheduled(clip.tokenize("")),
        latent,
        1,
        3,
        5.0,
        "euler",
        "normal",
        1.0,
    )

    def run(patched):
        samples, _ = detail.sample(patched, *given, detail.Settings(), None, True)
        return samples[-1]

    outs, patched = [run(model)], model
    for tool in tools:
        patched = tool(patched)
        outs.append(run(patched))
        assert outs[-1].isfinite().all() and not torch.equal(outs[-1], outs[-2])
    assert torch.equal(run(model), outs[0])


# --- phrases ---


def texts(found):
    return [p.text for p in found.phrases]


def test_written_phrases_are_fused_each_time_on_their_own(demo):
    _, clip, _ = demo
    found = fusable(prompt_words(clip, "a red star, a blue circle and a (red:1.3) star", "red star, circle"))
    assert texts(found) == ["red star", "red star"]
    assert [p.columns for p in found.phrases] == [(2, 3), (10, 11)]
    assert fusion.groups(found) == ((2, 3), (10, 11))
    assert fusable(prompt_words(clip, "a star", "star")).phrases == ()


def test_without_words_noun_phrases_are_found(demo):
    _, clip, _ = demo
    found = fusable(prompt_words(clip, "two big red fire trucks and a cat under the (cloudy:1.2) sky, embedding:nothing"))
    assert texts(found) == ["big red fire trucks", "cloudy sky"]
    named = [w.text for w in found.words]
    for phrase in found.phrases:
        members = phrase.text.split()
        start = named.index(members[0])
        assert phrase.columns == tuple(c for w in found.words[start : start + len(members)] for c in w.columns)
    assert not fusable(prompt_words(clip, "a cat and a dog")).phrases


def test_the_node_on_the_bundled_model(demo):
    model, clip, vae = demo
    text = "a red striped star and a blue circle on a grey wall"
    found = prompt_words(clip, text)
    assert found.automatic and not prompt_words(clip, text, "star").automatic
    schema = AttunePhraseFusion.define_schema()
    assert [i.id for i in schema.inputs] == ["model", "words", "strength"]
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))
    (patched,) = AttunePhraseFusion.execute(model, found, 1.0).args
    seen = []
    request(patched, ReadWeights({("middle.0.0", "cross"): None}, lambda call, w: seen.append(w), rows="cond"))
    pictures = [generate(m, clip, vae, [text], 5.0, 1, 4) for m in (model, patched)]
    differs(*pictures)
    for group in ((2, 3, 4), (7, 8), (11, 12)):
        maps_of = torch.stack([w[..., list(group)] for w in seen])
        torch.testing.assert_close(maps_of, maps_of.mean(-1, keepdim=True).expand_as(maps_of))
    (same,) = AttunePhraseFusion.execute(
        model, dataclasses.replace(found, phrases=found.phrases[:1], automatic=False), 1.0
    ).args
    assert torch.equal(generate(same, clip, vae, [text], 5.0, 1, 4), pictures[0])  # "star" alone is one token
