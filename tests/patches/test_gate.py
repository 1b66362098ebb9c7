"""The semantic gate against softmax written out, and what it looks at, when and how often."""

import comfy.model_management
import comfy.sample
import latent_preview
import numpy as np
import pytest
import torch

from attune.demo import model as demo_model
from attune.language.words import prompt_words
from attune.nodes.gate import AttuneSemanticGate
from attune.patches import fusion, gate, softpag
from attune.patches.maps import recorder
from attune.patches.maps.record import Settings as Kept
from attune.scoring.scorers import Scorer
from attune.tests import families
from attune.tests.families import words, written_out
from attune.tests.helpers import close, differs
from attune.tests.methods.test_gate import slow_gate
from attune.tools.benchmarks.shared.pictures import generate

sample = families.sample
PHRASES = words((1, 2), (2, 4))  # both have column 2
SETTINGS = {"threshold": 0.3, "softness": 0.1, "every": 2, "start_percent": 0.0, "end_percent": 1.0, "floor": 0.2}


class Fake(Scorer):
    """Scores by call, picture and phrase; knows what it was asked."""

    name = key = "fake"

    def __init__(self, base=0.0):
        self.base, self.asked = base, []

    def scores(self, images, texts):
        self.asked.append((images.clone(), list(texts)))
        n = len(self.asked)
        return torch.tensor([[self.base + 0.1 * n + 0.2 * b + 0.15 * p for p in range(len(texts))] for b in range(len(images))])


class FakeVae:
    """A picture from a latent, by its first three channels."""

    def __init__(self, model):
        self.patcher, self.latent_channels, self.decoded = model.clone(), model.model.latent_format.latent_channels, []

    def decode(self, latent):
        self.decoded.append(latent.clone())
        return latent[:, :3].movedim(1, -1).sigmoid()


# --- runs ---


def slow(model, gates_of, size):
    """The model with ``gates_of(step)[picture][column]`` on every weight of its conditional rows."""

    def change(seen):
        if seen.kind == "self":
            return seen.out
        pictures = len(seen.roles) // len(set(seen.roles))
        for row, role in enumerate(seen.roles):
            found = gates_of(seen.step) if role == 0 else None
            if found is not None:
                image = seen.weights[row, :, seen.image]
                text = image[..., seen.text]
                for column, gain in found[row % pictures].items():
                    text[..., column] *= gain
                image /= image.sum(-1, keepdim=True)
        return seen.out

    return written_out(model, change, size)


@pytest.mark.parametrize("mode", gate.MODES)
@pytest.mark.parametrize("name", families.EVERY)
def test_equals_the_written_out_run(name, mode):
    model, scorer = families.shared(name), Fake()
    settings = {"steps": 5, "size": (8, 12), "batch": 2}
    ours = sample(gate.apply(model, PHRASES, scorer, FakeVae(model), **SETTINGS, mode=mode), **settings)
    assert len(scorer.asked) == 2  # after steps 0 and 2; nothing follows the last one

    def gates_of(step):
        n = 0 if step == 0 else 1 if step <= 2 else 2  # the score of step 2 holds from step 3 on
        if not n:
            return None
        out = []
        for b in range(2):
            first, second = (slow_gate(0.1 * n + 0.2 * b + 0.15 * p) for p in range(2))
            found = {1: first, 2: max(first, second), 4: second}
            out.append(found if mode == gate.DAMP else {c: 1 / g for c, g in found.items()})
        return out

    close(ours, sample(slow(model, gates_of, (8, 12)), **settings), 1e-3)
    differs(ours, sample(model, **settings))


def test_a_picture_does_not_depend_on_its_batch():
    model = families.shared("sd15")
    both = sample(gate.apply(model, PHRASES, Fake(), FakeVae(model), **SETTINGS), steps=4, batch=2)

    class Second(Fake):
        def scores(self, images, texts):
            return super().scores(images, texts) + 0.2

    noise = comfy.sample.prepare_noise(families.latent(model, batch=2), 0)
    alone = gate.apply(model, PHRASES, Second(), FakeVae(model), **SETTINGS)
    one = comfy.sample.sample(
        alone,
        noise[1:],
        4,
        3.0,
        "euler",
        "normal",
        families.text(1),
        families.text(2),
        noise[1:] * 0,
        disable_pbar=True,
        seed=0,
    )
    close(both[1:], one, 1e-3)


@pytest.mark.parametrize(
    ("sampler", "every", "start", "end", "steps", "expected"),
    [
        ("euler", 1, 0.0, 1.0, 4, 3),
        ("euler", 3, 0.0, 1.0, 8, 3),
        ("heun", 1, 0.0, 1.0, 4, 3),  # two evaluations a step, one look
        ("euler", 2, 0.5, 1.0, 8, 2),
        ("euler", 1, 0.0, 0.5, 8, 3),
        ("euler", 1, 0.0, 1.0, 1, 0),
    ],
)
def test_it_looks_as_often_as_it_says_and_no_more(sampler, every, start, end, steps, expected, monkeypatch):
    model, scorer = families.shared("sd15"), Fake()
    vae, loaded = FakeVae(model), []
    settings = {**SETTINGS, "every": every, "start_percent": start, "end_percent": end}
    patched = gate.apply(model, PHRASES, scorer, vae, **settings)
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda models, *a, **k: (loaded.append(list(models)), load(models, *a, **k))[1],
    )
    sample(patched, steps=steps, sampler=sampler)
    assert len(scorer.asked) == len(vae.decoded) == expected
    assert all(texts == ["word 0", "word 1"] for _, texts in scorer.asked)
    # Before sampling everything is loaded together, after every look the model is brought back.
    assert vae.patcher in loaded[0] and len(loaded) == 1 + expected
    assert all(any(m.model is model.model for m in models) for models in loaded)


def test_it_sees_the_estimate():
    model, scorer, shown = families.shared("sd15"), Fake(), []
    vae = FakeVae(model)
    sample(
        gate.apply(model, PHRASES, scorer, vae, **{**SETTINGS, "every": 1}),
        steps=4,
        callback=lambda i, x0, x, n: shown.append(x0),
    )
    for seen, x0 in zip(vae.decoded, shown, strict=False):
        close(seen, model.model.process_latent_out(x0))
    assert len(vae.decoded) == 3


def test_without_a_vae_it_sees_the_preview():
    model, scorer, shown = families.shared("sd15"), Fake(), []
    patched = gate.apply(model, PHRASES, scorer, None, **{**SETTINGS, "every": 1})
    sample(patched, steps=3, batch=2, size=(6, 8), callback=lambda i, x0, x, n: shown.append(x0))
    form = model.model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors, getattr(form, "latent_rgb_factors_bias", None))
    for (images, _), x0 in zip(scorer.asked, shown, strict=False):
        assert images.shape == (2, 48, 64, 3)
        picture = torch.from_numpy(np.asarray(previewer.decode_latent_to_preview(x0)).copy()) / 255
        assert (images[0, ::8, ::8] - picture).abs().max() < 2 / 255


@pytest.mark.parametrize("name", families.NAMES)
def test_off_is_the_plain_model_to_the_last_bit(name):
    model = families.shared(name)
    plain = sample(model, steps=3)
    scorer = Fake()
    assert torch.equal(sample(gate.apply(model, PHRASES, scorer, None, floor=1.0), steps=3), plain)
    assert not scorer.asked
    seen = Fake(100.0)  # every gate is wide open
    assert torch.equal(sample(gate.apply(model, PHRASES, seen, None, **SETTINGS), steps=3), plain)
    assert seen.asked


def test_state_ends_with_the_run_and_it_stacks():
    model, scorer = families.shared("sd15"), Fake()
    before = (str(model.model_options), str(model.wrappers))
    one = gate.apply(model, PHRASES, scorer, None, **SETTINGS)
    alone = sample(one, steps=4)
    scorer.asked.clear()
    assert torch.equal(sample(one, steps=4), alone)
    for stacked in (fusion.apply(one, PHRASES), softpag.apply(one, 3.0, 1.0, 0.0, 1.0, 0.0)):
        scorer.asked.clear()
        assert not torch.equal(sample(stacked, steps=4), alone)
    scorer.asked.clear()
    kept, held = recorder.apply(one, Kept("cross"))
    assert torch.equal(sample(kept, steps=4), alone) and held.record().bytes
    assert (str(model.model_options), str(model.wrappers)) == before
    other = Fake()
    two = gate.apply(one, PHRASES, other, None, **SETTINGS)
    scorer.asked.clear()
    assert not torch.equal(sample(two, steps=4), alone)
    assert len(scorer.asked) == len(other.asked) == 2


def test_bad_input_is_told_before_sampling():
    model, scorer = families.shared("sd15"), Fake()
    flux = families.shared("flux")
    for changes, said in (
        ({"words": words()}, "no words"),
        ({"mode": "sing"}, "mode must be"),
        ({"floor": 2.0}, "floor must be"),
        ({"floor": 0.0, "mode": "invert"}, "above 0 to invert"),
        ({"every": 0}, "every must be"),
        ({"softness": -1.0}, "softness at least 0"),
        ({"start_percent": 0.9, "end_percent": 0.1}, "swap them"),
        ({"vae": FakeVae(flux)}, "connect the VAE that belongs"),
    ):
        with pytest.raises(ValueError, match=said):
            gate.apply(model, **{"words": PHRASES, "scorer": scorer, **changes})
    with pytest.raises(ValueError, match="Prompt Words"):
        sample(gate.apply(model, words((1, 2), total=12), scorer, None, **SETTINGS))
    assert not scorer.asked


def test_no_preview_means_a_vae_is_needed():
    model = demo_model.load()[0]
    if getattr(model.model.latent_format, "latent_rgb_factors", None) is None:
        with pytest.raises(ValueError, match="connect the VAE"):
            gate.apply(model, PHRASES, Fake())


def test_the_node_on_the_bundled_model():
    model, clip, vae = demo_model.load()
    text = "a red striped star and a blue circle on a grey wall"
    found, scorer = prompt_words(clip, text, "red striped star, blue circle"), Fake(-0.5)
    schema = AttuneSemanticGate.define_schema()
    assert [i.id for i in schema.inputs] == [
        "model",
        "words",
        "scorer",
        "vae",
        "threshold",
        "softness",
        "every",
        "start_percent",
        "end_percent",
        "floor",
        "mode",
    ]
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))
    (patched,) = AttuneSemanticGate.execute(model, found, scorer, vae, floor=0.05).args
    plain, gated = (generate(m, clip, vae, [text] * 2, 5.0, 1, 10) for m in (model, patched))
    differs(gated, plain)
    assert scorer.asked[0][0].shape == (2, 128, 128, 3) and scorer.asked[0][1] == ["red striped star", "blue circle"]
