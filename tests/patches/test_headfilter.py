"""The head filter against loops over heads, in whole runs of every family."""

import pytest
import torch

from attune.demo import model as demo_model
from attune.methods import headfilter as maths
from attune.nodes.headfilter import AttuneHeadFilter
from attune.patches import fusion, headfilter, scfg, softpag
from attune.patches.hook.install import model_sites, request
from attune.patches.hook.requests import BlendOutputs
from attune.patches.hook.sites import select
from attune.patches.maps import recorder
from attune.patches.maps.record import Settings as Kept
from attune.tests import families
from attune.tests.families import heads_of, words, written_out
from attune.tests.helpers import close, differs
from attune.tools.benchmarks.shared.pictures import generate

sample = families.sample
TWO = {"steps": 2, "size": (8, 12), "batch": 2}
CHOSEN = {
    "sd15": "middle.0.0:1,2 output.1.0:0",
    "sdxl": "middle.0.*:1 output.1.1:0,2-3",
    "sd3": "joint.1:0,2",
    "sd35": "joint.0:1 joint.1:0",
    **dict.fromkeys(("flux", "flux2", "chroma"), "double.1:1-2 single.0:3"),
    **dict.fromkeys(("qwen_image", "qwen_image21", "lumina2", "z_image", "krea2"), "joint.1:0,2"),
    **dict.fromkeys(("wan", "cosmos_predict2", "anima"), "block.1:0,2"),
}


def slow(model, chosen, kinds, others, size=(8, 8)):
    """The model with the silenced heads written over, one at a time."""
    speaking = dict(chosen.chosen)

    def change(seen):
        out = seen.out
        if seen.site.name not in speaking or seen.kind not in kinds:
            return out
        for head in range(seen.site.heads):
            if head in speaking[seen.site.name]:
                continue
            for row in range(len(out)):
                image = out[row, head, seen.image]
                if others == "zero":
                    said = torch.zeros_like(image[0])
                elif others == "mean":
                    said = sum(image) / len(image)
                else:
                    value = seen.value[row, head, seen.pixels]
                    said = sum(value) / len(value)
                for pixel in range(len(image)):
                    image[pixel] = said
        return out

    return written_out(model, change, size)


@pytest.mark.parametrize("others", maths.OTHERS)
@pytest.mark.parametrize("name", families.EVERY)
def test_equals_the_written_out_run(name, others):
    model = families.shared(name)
    chosen = heads_of(model, CHOSEN[name])
    ours = sample(headfilter.apply(model, chosen, "both", others), **TWO)
    close(ours, sample(slow(model, chosen, ("self", "cross", "joint"), others, (8, 12)), **TWO), 1e-3)
    differs(ours, sample(model, **TWO))


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_one_kind_only_and_a_split_batch(kind):
    model, settings = families.shared("sd15"), {**TWO, "negative": families.text(2, 11)}
    chosen = heads_of(model, CHOSEN["sd15"])
    for others in maths.OTHERS:
        ours = sample(headfilter.apply(model, chosen, kind, others), **settings)
        close(ours, sample(slow(model, chosen, (kind,), others), **settings), 1e-3)


@pytest.mark.parametrize("name", families.NAMES)
def test_all_heads_of_a_layer_are_the_plain_model_to_the_last_bit(name):
    model = families.shared(name)
    family, sites = model_sites(model)
    patched = headfilter.apply(model, select(" ".join(s.name for s in sites), sites, family), "both")
    assert torch.equal(sample(patched), sample(model))


def test_other_layers_are_untouched():
    """Everything before the one layer is equal to the last bit, and so is the other kind of attention in it."""
    model = families.shared("sd15")
    found = []
    for patched in (model.clone(), headfilter.apply(model, heads_of(model, "middle.0.0:0"), "cross")):
        seen = {}

        def look(call, heads, seen=seen):
            seen[call.site.name, call.kind] = heads.out.clone()
            return heads.out

        places = {(s.name, kind): None for s in model_sites(model)[1] for kind in s.kinds}
        request(patched, BlendOutputs(places, look))
        sample(patched, steps=1)
        found.append(seen)
    plain, filtered = found
    assert torch.equal(plain["input.1.0", "cross"], filtered["input.1.0", "cross"])
    assert torch.equal(plain["middle.0.0", "self"], filtered["middle.0.0", "self"])
    own = filtered["middle.0.0", "cross"]
    assert torch.equal(own[:, :1], plain["middle.0.0", "cross"][:, :1]) and not own[:, 1:].any()
    differs(filtered["output.0.0", "self"], plain["output.0.0", "self"])


def test_bad_input_is_told():
    model, sd3 = families.shared("sd15"), families.shared("sd3")
    chosen = heads_of(model, "middle.0.0:0")
    with pytest.raises(ValueError, match="Head Filter: kind must be one of self, cross, both"):
        headfilter.apply(model, chosen, "joint")
    with pytest.raises(ValueError, match="others must be one of zero, mean, uniform attention"):
        headfilter.apply(model, chosen, "both", "noise")
    with pytest.raises(ValueError, match="selected on another model"):
        headfilter.apply(sd3, chosen, "both")
    with pytest.raises(ValueError, match="set kind to “both”"):
        headfilter.apply(sd3, heads_of(sd3, "joint.1:0"), "cross")


@pytest.mark.parametrize("name", families.NAMES)
def test_stacks_and_leaves_nothing(name):
    model = families.shared(name)
    before = (str(model.model_options), str(model.wrappers))
    one = headfilter.apply(model, heads_of(model, CHOSEN[name]), "both", "mean")
    alone = sample(one)
    others = [
        headfilter.apply(one, heads_of(model, CHOSEN[name]), "both", "zero"),
        fusion.apply(one, words((1, 2))),
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
    schema = AttuneHeadFilter.define_schema()
    assert [i.id for i in schema.inputs] == ["model", "heads", "kind", "others"]
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))
    pictures = [generate(model, clip, vae, ["a red star"], 5.0, 1, 4)]
    for others in maths.OTHERS:
        (patched,) = AttuneHeadFilter.execute(model, heads_of(model, "*.*.*:0"), "cross", others).args
        pictures.append(generate(patched, clip, vae, ["a red star"], 5.0, 1, 4))
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            differs(one, other)
