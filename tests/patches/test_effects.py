"""Every node that patches a model says whether it had an effect, and if not why; what it says is true to the last bit."""

import dataclasses

import pytest
import torch

from attune.language.weights import Weighted
from attune.patches import fix, fusion, gate, headfilter, negative, refine, regulation, scfg, softpag, weights
from attune.patches.hook.install import model_sites, request
from attune.patches.hook.requests import COND, EditWeights
from attune.patches.hook.sites import select
from attune.patches.observer import Observer
from attune.tests import families
from attune.tests.families import words
from attune.tests.helpers import differs
from attune.tests.patches.test_gate import Fake, FakeVae

WORDS = words((1, 2), (3, 4))
NEVER = {"start_percent": 0.313, "end_percent": 0.314}  # no step of three


class Told(Observer):
    """What it was told, in order."""

    def __init__(self):
        self.effects = []

    def effect(self, missing):
        self.effects.append(missing)


def weighing(model, observer, weight=1.5, **span):
    chosen = [Weighted(WORDS.phrases[0], weight)]
    return weights.apply(model, WORDS, chosen, None, weights.Settings(**span), observer)


def filtering(model, observer, selection="middle.*.*:0"):
    family, sites = model_sites(model)
    return headfilter.apply(model, select(selection, sites, family), "both", observer=observer)


def gating(model, observer, base=0.0, **settings):
    known = {"threshold": 0.5, "softness": 0.1, "every": 1, "start_percent": 0.0, "end_percent": 1.0, **settings}
    return gate.apply(model, WORDS, Fake(base), FakeVae(model), observer=observer, **known)


METHODS = {
    "softpag": lambda model, observer, **s: softpag.apply(model, observer=observer, **s),
    "headfilter": filtering,
    "negative": lambda model, observer, **s: negative.apply(model, families.text(9), observer=observer, **s),
    "fusion": lambda model, observer, **s: fusion.apply(model, WORDS, observer=observer, **s),
    "refine": lambda model, observer, **s: refine.apply(model, WORDS, observer=observer, **s),
    "regulation": lambda model, observer, **s: regulation.apply(model, WORDS, regulation.Settings(**s), observer=observer),
    "scfg": lambda model, observer, **s: scfg.apply(model, scfg.Settings(**s), observer)[0],
    "weights": weighing,
    "gate": gating,
    "fix": lambda model, observer, strength=fix.NORMAL: fix.apply(model, WORDS, fix.MIXED, strength, observer)[0],
}
OFF = [
    ("softpag", {"scale": 0.0}, "scale is 0"),
    ("softpag", {"perturbation": 0.0}, "perturbation is 0"),
    ("headfilter", {"selection": "middle.*.*"}, "none is silenced"),
    ("negative", {"scale": 1.0}, "scale is 1"),
    ("negative", {"alpha": 0.0}, "alpha is 0"),
    ("fusion", {"strength": 0.0}, "strength is 0"),
    ("refine", {"rounds": 0}, "rounds is 0"),
    ("regulation", {"strength": 0.0}, "strength is 0"),
    ("weights", {"weight": 1.0}, "all weights are 1"),
    ("gate", {"floor": 1.0}, "floor is 1"),
    ("fix", {"strength": fix.OFF}, "strength is off"),
]
SPANS = [name for name in METHODS if name not in ("headfilter", "fusion", "fix")]


def sample(model, cfg=3.0):
    return families.sample(model, steps=3, cfg=cfg)


@pytest.fixture(scope="module")
def plain():
    return sample(families.shared("sd15"))


@pytest.mark.parametrize("name", METHODS)
def test_an_effect_is_told_after_every_run(name, plain):
    observer = Told()
    patched = METHODS[name](families.shared("sd15"), observer)
    assert observer.effects == []
    differs(sample(patched), plain)
    assert observer.effects == [None]
    sample(patched.clone())  # of another node
    assert observer.effects == [None, None]


@pytest.mark.parametrize("name, settings, why", OFF)
def test_what_is_off_says_so_when_the_node_runs(name, settings, why, plain):
    observer = Told()
    patched = METHODS[name](families.shared("sd15"), observer, **settings)
    assert len(observer.effects) == 1 and why in observer.effects[0]
    assert torch.equal(sample(patched), plain) and len(observer.effects) == 1


@pytest.mark.parametrize("name", SPANS)
def test_no_step_in_the_span(name, plain):
    observer = Told()
    patched = METHODS[name](families.shared("sd15"), observer, **NEVER)
    assert torch.equal(sample(patched), plain)
    assert len(observer.effects) == 1 and "between start_percent 0.313 and end_percent 0.314" in observer.effects[0]


def test_cfg_1(plain):
    observer = Told()
    patched = METHODS["scfg"](families.shared("sd15"), observer)
    sample(patched, cfg=1.0)
    assert len(observer.effects) == 1 and "raise cfg" in observer.effects[0]
    for name in ("softpag", "negative", "weights"):  # need none
        METHODS[name](families.shared("sd15"), told := Told())
        sample(METHODS[name](families.shared("sd15"), told), cfg=1.0)
        assert told.effects == [None]


def test_gates_that_stay_open(plain):
    observer = Told()
    assert torch.equal(sample(gating(families.shared("sd15"), observer, base=9.0, softness=0.0)), plain)
    assert observer.effects == [gate.OPEN]
    families.sample(gating(families.shared("sd15"), observer), steps=1)
    assert observer.effects[1:] == [gate.SHORT]


def test_words_that_no_layer_reads():
    model, observer = families.shared("sd15"), Told()
    patched = model.clone()
    nobody = EditWeights({("middle.0.0", "cross"): None}, lambda call, w: None, rows=COND, columns=(1,))
    request(patched, nobody, tell=observer.effect)
    assert torch.equal(sample(patched), sample(model))
    assert len(observer.effects) == 1 and "no layer that it changes was used" in observer.effects[0]


def test_a_method_is_not_told_of_anothers_effect(plain):
    one, two = Told(), Told()
    sample(weighing(METHODS["scfg"](families.shared("sd15"), one), two, **NEVER))
    assert one.effects == [None] and len(two.effects) == 1 and two.effects[0] is not None


def test_every_setting_of_a_span_is_watched():
    """A method with a span that a new node brings is in `SPANS`."""
    having = {
        m.__name__.rpartition(".")[2]
        for m in (softpag, negative, refine, regulation, scfg, weights, gate, fusion, headfilter)
        if any(f.name == "start_percent" for f in dataclasses.fields(m.Settings))
    }
    assert having == set(SPANS)
