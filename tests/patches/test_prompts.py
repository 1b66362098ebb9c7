"""Words and the prompt that they are of: what is compared before a run, and what is said."""

import pytest
import torch

from attune.language.words import PROMPT, Phrase, Prompt, Words, column_lengths
from attune.patches import fusion, prompts, refine, regulation
from attune.patches.maps import pictures, recorder
from attune.patches.observer import Observer
from attune.server import graph
from attune.tests import families

CHUNK = 7


def encoded(seed: int, weighted: float = 1.0) -> torch.Tensor:
    """A context as CLIP makes it: the start column knows nothing of the text, the last ones know all of it."""
    start = torch.randn(1, 1, families.WIDTH, generator=torch.Generator().manual_seed(0))
    rest = torch.randn(1, CHUNK - 1, families.WIDTH, generator=torch.Generator().manual_seed(seed))
    rest[:, 1] *= weighted
    return torch.cat([start, rest], dim=1)


def words(text: str, seed: int | None = None, tokens: str = "") -> Words:
    lengths = () if seed is None else column_lengths(encoded(seed))
    two = (Phrase("one", (1, 2), {"l": (1, 2)}),)
    return Words(text, two, two, (0, 4, 5, 6), CHUNK, {"l": CHUNK}, tokens=tokens, lengths=lengths)


def refused(own: Words, cond: dict, observer: Observer | None = None) -> str:
    with pytest.raises(ValueError) as error:
        prompts.compare_words("Some Node", own, cond, observer or Observer())
    return str(error.value)


def test_a_conditioning_that_knows_its_tokens_is_compared_by_them():
    cond = {"cross_attn": encoded(2), PROMPT: Prompt("a dog", "d0")}
    said = refused(words("a cat", 1, "c0"), cond)
    assert "Some Node" in said and "“a cat”" in said and "“a dog”" in said
    prompts.compare_words("Some Node", words("a (dog:1.2)", 1, "d0"), cond)  # the tokens are the same


def test_one_that_does_not_is_compared_by_its_columns():
    class Told(Observer):
        def prompt_text(self):
            return "a dog"

    said = refused(words("a cat", 1), {"cross_attn": encoded(2)}, Told())
    assert "“a cat”" in said and "“a dog”" in said
    assert "is another one" in refused(words("a cat", 1), {"cross_attn": encoded(2)})
    same = encoded(1, weighted=1.4)  # a weight changes its own columns only
    prompts.compare_words("Some Node", words("a cat", 1), {"cross_attn": same})
    prompts.compare_words("Some Node", words("a cat", 1), {"cross_attn": 1.001 * encoded(1)})  # rounding
    prompts.compare_words("Some Node", words("a cat", 1), {"cross_attn": 1.3 * encoded(2)})  # another CLIP: nobody knows
    prompts.compare_words("Some Node", words("a cat"), {"cross_attn": encoded(2)})  # words from a saved file know nothing


@pytest.mark.parametrize("method", [regulation, fusion, refine])
def test_a_run_with_words_of_another_prompt_ends_before_its_first_step(method):
    model = families.shared("sd15")
    patched = method.apply(model, words("a cat", tokens="c0"))
    steps: list[int] = []
    other = [[encoded(2), {"pooled_output": torch.zeros(1, families.WIDTH), PROMPT: Prompt("a dog", "d0")}]]
    with pytest.raises(ValueError, match=r"of the prompt “a cat”.*is “a dog”.*conditioning output"):
        families.sample(patched, positive=other, callback=lambda *args: steps.append(1))
    assert not steps
    own = [[encoded(2), {**other[0][1], PROMPT: Prompt("a cat", "c0")}]]
    assert families.sample(patched, positive=own).isfinite().all()


def test_maps_are_not_shown_for_words_of_another_prompt():
    patched, held = recorder.apply(families.shared("sd15"))
    families.sample(
        patched,
        positive=[[encoded(2), {"pooled_output": torch.zeros(1, families.WIDTH), PROMPT: Prompt("a dog", "d0")}]],
        steps=1,
    )
    record, image = held.record(), torch.zeros(1, 64, 64, 3)
    for paint in (pictures.show, pictures.segmentation):
        with pytest.raises(ValueError, match=r"of the prompt “a cat”.*is “a dog”"):
            paint(record, words("a cat", tokens="c0"), image)
        assert paint(record, words("a dog", tokens="d0"), image)[0].isfinite().all()


def test_the_workflow_tells_the_text_that_is_sampled():
    prompt = {
        "1": {"class_type": "PrimitiveString", "inputs": {"value": "a dog"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": ["1", 0], "clip": ["9", 0]}},
        "3": {"class_type": "ConditioningSetArea", "inputs": {"conditioning": ["2", 0]}},
        "4": {"class_type": "KSampler", "inputs": {"positive": ["3", 0], "negative": ["8", 0], "model": ["9", 0]}},
        "5": {"class_type": "CFGGuider", "inputs": {"positive": ["2", 0]}},
        "6": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["5", 0]}},
        "7": {"class_type": "KSampler", "inputs": {"positive": ["7", 0]}},
    }
    assert [graph.prompt_text(prompt, node) for node in ("4", "6", "7", "no")] == ["a dog", "a dog", None, None]
