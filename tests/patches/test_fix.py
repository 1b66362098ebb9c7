"""Fix My Prompt sets what single nodes set, to the last bit, and says so."""

import pytest
import torch

from attune.demo import model as demo_model
from attune.language.weights import Weighted
from attune.language.words import encode_prompt, prompt_words
from attune.nodes.fix import AttuneFix
from attune.patches import fix, regulation, softpag, weights
from attune.tests import families
from attune.tests.text_encoders import language_model

PROMPT = "a red striped star and a blue circle on a grey wall"


@pytest.fixture(scope="module")
def demo():
    model, clip, _ = demo_model.load()
    return model, clip


def draw(model, positive):
    return families.sample(model, positive=positive, negative=positive, size=(16, 16), steps=3, cfg=2.0)


def test_off_is_the_plain_model_with_the_prompt_encoded(demo):
    model, clip = demo
    plain = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    for problem in fix.PROBLEMS:
        patched, positive, said = AttuneFix.execute(model, clip, PROMPT, problem, fix.OFF).result
        assert torch.equal(positive[0][0], plain[0][0]) and said.startswith("Off")
        assert torch.equal(draw(patched, positive), draw(model, plain))


@pytest.mark.parametrize("problem", [fix.MIXED, fix.FLAT, fix.MISSING, fix.LOOK])
@pytest.mark.parametrize(("strength", "factor"), [(fix.GENTLE, 0.5), (fix.STRONG, 1.5)])
def test_equals_the_single_nodes(demo, problem, strength, factor):
    model, clip = demo
    patched, positive, said = AttuneFix.execute(model, clip, PROMPT, problem, strength).result
    words, _ = encode_prompt(clip, prompt_words(clip, PROMPT))
    single = {
        fix.MIXED: lambda: softpag.apply(model, 3.0 * factor),
        fix.FLAT: lambda: softpag.apply(model, 3.0 * factor),
        fix.MISSING: lambda: regulation.apply(model, words, regulation.Settings(strength=factor)),
        fix.LOOK: lambda: model,
    }[problem]()
    ours = draw(patched, positive)
    assert torch.equal(ours, draw(single, positive))
    assert torch.equal(ours, draw(model, positive)) is (problem == fix.LOOK)
    assert "single nodes" in said and ("star, circle" in said) is (problem in fix.NOUNS)
    if problem == fix.MISSING:
        assert f"strength {factor:g}" in said and "published" in said.lower()


def test_weights_of_a_text_that_its_encoder_does_not_use(demo):
    model = families.shared("z_image")
    clip = language_model("z_image")
    text = "a (red car:1.4) and a blue bench"
    words = prompt_words(clip, text, None)
    patched, said = fix.apply(model, words, fix.UNEVEN, fix.STRONG)
    (phrase,) = [phrase for phrase, _ in words.weighted]
    assert "red car: 1.6" in said
    single = weights.apply(model, words, [Weighted(phrase, 1 + 1.5 * 0.4)])
    context = families.text(1, words.total)
    assert torch.equal(families.sample(patched, positive=context), families.sample(single, positive=context))


def test_weights_that_the_encoder_uses_and_a_text_without_any(demo):
    model, clip = demo
    _, _, said = AttuneFix.execute(model, clip, f"a (star:1.4) and {PROMPT}", fix.UNEVEN, fix.NORMAL).result
    assert "used by the text encoder itself" in said
    with pytest.raises(ValueError, match=r"write its weight into the text"):
        AttuneFix.execute(model, clip, PROMPT, fix.UNEVEN, fix.NORMAL)


def test_other_families_are_told_what_is_not_known():
    words = families.words((1, 2), (4,))
    for name in ("qwen_image", "wan"):
        for problem in (fix.MIXED, fix.MISSING):
            assert "Experimental" in fix.apply(families.shared(name), words, problem)[1]
    assert "Published" in fix.apply(families.shared("flux"), words, fix.FLAT)[1]
    with pytest.raises(ValueError, match="choose one of"):
        fix.apply(families.shared("sd15"), words, "too many fingers")
