"""Every node on every kind of model: what MODELS.md says of it, on a small real model of that kind.

That a method does what its equations say is held against the same with attention written out in the method's own tests; here it is the
table: a node that works changes the picture and leaves nothing on the model, one that does not is refused in a sentence.
"""

from functools import cache

import pytest
import torch

from attune.hunt.engine import Engine
from attune.hunt.settings import Settings as Hunt
from attune.language.weights import Weighted
from attune.methods.softpag import TARGETS, TEXT
from attune.patches import fusion, gate, headfilter, negative, refine, regulation, scfg, softpag, weights
from attune.patches.detail.sampler import check as check_detail
from attune.patches.detail.session import Settings as Detail
from attune.patches.hook.families import FAMILIES, WHY, family_of
from attune.patches.hook.install import model_sites
from attune.patches.hook.sites import Heads
from attune.patches.maps import recorder
from attune.patches.maps.reading import token_maps
from attune.patches.maps.record import Settings as Kept
from attune.patches.softpag import default_heads
from attune.scoring.scorers import Scorer
from attune.tests import families
from attune.tests.families import words
from attune.tests.helpers import close, differs
from attune.tools import models

TWO = words((1,), (3, 4))
RUN = {"steps": 3, "size": (8, 12)}


class Blind(Scorer):
    """Sees nothing of what is asked."""

    name = key = "blind"

    def scores(self, images, texts):
        return torch.zeros(len(images), len(texts))


class Vae:
    """A picture from a latent, by its first three channels."""

    def __init__(self, model):
        self.patcher, self.latent_channels = model.clone(), model.model.latent_format.latent_channels

    def decode(self, latent):
        flat = latent[:, :, 0] if latent.ndim == 5 else latent
        return flat[:, :3].movedim(1, -1).sigmoid()


@cache
def plain(name):
    return families.sample(families.shared(name), **RUN)


def some_heads(model):
    """Half of the heads of the layer that SoftPAG takes by itself."""
    family, sites = model_sites(model)
    site, heads = default_heads(family, sites).chosen[0]
    return Heads(family, ((site, heads[: len(heads) // 2]),))


def held_on(model):
    """What is on a model, as text."""
    held = (
        model.model_options,
        model.wrappers,
        model.callbacks,
        model.object_patches,
        model.additional_models,
        model.injections,
    )
    modules = list(model.model.diffusion_model.modules())
    return str(held), [vars(m).keys() for m in modules], [len(m._forward_hooks) for m in modules]


def captured(model):
    patched, held = recorder.apply(model, Kept(kind="both", precision="fp32"))
    assert torch.equal(families.sample(patched, **RUN), families.sample(model, **RUN))
    tokens = token_maps(held.record(), powers=2, sigma=0.5)
    assert tokens.shape[1] == 7 and tokens.isfinite().all()
    return None


def hunted(model):
    """A batch of head sets, the first of which is none: that one is the plain run."""
    settings = Hunt(seed=0, steps=3, cfg=3.0, sampler_name="euler", scheduler="normal", scale=2.0)
    empty = {"samples": families.latent(model, *RUN["size"])}
    engine = Engine(model, Vae(model), [families.text(1)], families.text(2), empty, [Blind()], ["text"], settings, 0)
    site, heads = some_heads(model).chosen[0]
    none, one = engine.latents([(), ((site, heads[0]),)], (0,))
    close(none[None], families.sample(model, **RUN))
    differs(one[None], none[None])
    return None


def detail(model):
    check_detail("euler", Detail(optimize="off"), model_sites(model)[0])


# A patched model to sample with; nothing where the check is made already.
APPLIED = {
    "SoftPAG": lambda m: softpag.apply(m, 2.0, 0.5),
    "HeadHunter": hunted,
    "Head Filter": lambda m: headfilter.apply(m, some_heads(m), "both"),
    "Capture, Show, Segmentation": captured,
    "Semantic-aware CFG": lambda m: scfg.apply(m, scfg.Settings(scfg.IMAGE, min_ratio=0.0, max_ratio=9.0, completion=1))[0],
    "Attention Regulation": lambda m: regulation.apply(m, TWO),
    "Phrase Fusion": lambda m: fusion.apply(m, TWO, 1.0),
    "Semantic Gate": lambda m: gate.apply(m, TWO, Blind(), Vae(m), every=1, start_percent=0, end_percent=1, floor=0.0),
    "Refine Attention": lambda m: refine.apply(m, TWO, 1),
    "Word Weights": lambda m: weights.apply(m, TWO, [Weighted(TWO.phrases[0], 3.0)]),
    "Negative Prompt": lambda m: negative.apply(m, families.text(5)),
    "Detail++": detail,
}
OFF = {
    "SoftPAG": lambda m: softpag.apply(m, 0.0, 0.5),
    "Phrase Fusion": lambda m: fusion.apply(m, TWO, 0.0),
    "Attention Regulation": lambda m: regulation.apply(m, TWO, regulation.Settings(strength=0.0)),
    "Refine Attention": lambda m: refine.apply(m, TWO, 0),
    "Word Weights": lambda m: weights.apply(m, TWO, [Weighted(TWO.phrases[0], 1.0)]),
    "Negative Prompt": lambda m: negative.apply(m, families.text(5), 1.0),
}


@pytest.mark.parametrize("name", families.EVERY)
def test_every_node_does_what_the_table_says(name):
    assert APPLIED.keys() == models.NODES.keys()
    model = families.shared(name)
    family = model_sites(model)[0]
    before = held_on(model)
    for node, applied in APPLIED.items():
        if models.why(node, family):
            with pytest.raises(ValueError, match=r"[^.]{20,}\."):
                applied(model)
            continue
        patched = applied(model)
        if patched is not None:
            assert (families.sample(patched, **RUN) - plain(name)).abs().max() > 1e-4 * plain(name).abs().max(), node
        if node in OFF:
            assert torch.equal(families.sample(OFF[node](model), **RUN), plain(name)), node
    assert torch.equal(families.sample(model, **RUN), plain(name))
    assert held_on(model) == before


@pytest.mark.parametrize("name", families.MORE)
def test_softpag_has_every_target(name):
    model = families.shared(name)
    joint = models.MODELS[model_sites(model)[0]].joint
    for target in TARGETS:
        if not joint and (target == "mean text query" or "-" in target):
            with pytest.raises(ValueError, match="one attention"):
                softpag.apply(model, 2.0, 0.5, target=target)
        elif TARGETS[target] == TEXT and name in families.TEXT_APART:
            with pytest.raises(ValueError, match="computes its text apart"):
                softpag.apply(model, 2.0, 0.5, target=target)
        else:
            moved = families.sample(softpag.apply(model, 8.0, 1.0, target=target), steps=1)
            assert (moved - families.sample(model, steps=1)).abs().max() > 1e-4


@pytest.mark.parametrize("name", WHY)
def test_a_refused_class_is_refused_with_its_reason(name):
    with pytest.raises(ValueError, match=f"does not know the model class {name}. {WHY[name]}"):
        family_of(type(name, (torch.nn.Module,), {})())


def test_the_page_says_what_the_table_says():
    page = models.PAGE.read_text(encoding="utf-8")
    assert models.written(page) == page, "run 'python3 run.py models'"
    assert set(models.families()) == {kind.name for kind in FAMILIES}
    assert all(models.verdict(node, family) in page for node in models.NODES for family in models.families())
