"""Prompt Words on encoders that are language models: chat templates, what is cut of them, padding, other languages, weights that are text."""

import pytest
import torch

from attune.language.words import encode_prompt, prompt_words
from attune.patches import prompts
from attune.tests.text_encoders import LANGUAGE_MODELS, LanguageModel, language_model

PROMPTS = (
    "a red car and a zebra, then a red  car\nagain",
    "ein größerer Stern, 一只红色的猫, naïve café zebra",
    "zebra " + "a red car, " * 80 + "firetruck",
    "user assistant You are a zebra",  # words of the templates
    "a cat \\(animal\\), long_hair zebra's 42",
)


def read(clip, name, ids):
    """What tokens say, by their tokenizer's own decoder."""
    inner = getattr(clip.tokenizer, name, None) or getattr(clip.tokenizer, f"clip_{name}")
    inner = inner.tokenizer
    ids = [int(i) for i in ids]
    said = (inner if hasattr(inner, "decode") else inner.tokenizer).decode(ids)
    return "".join(said.split())


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_every_word_is_where_its_letters_are(family):
    """The context's columns of each word hold the tokens that its tokenizer reads as that word."""
    clip = language_model(family)
    for prompt in PROMPTS:
        if family in ("pixart", "cosmos") and "一" in prompt:
            continue  # their T5 knows no Chinese
        tokens = clip.tokenize(prompt)
        context = clip.cond_stage_model.encode_token_weights(tokens)[0][0]
        found = prompt_words(clip, prompt, "zebra")
        assert found.total == len(context)
        name = next(iter(found.counts))
        for word in found.words:
            assert word.columns
            said = read(clip, name, context[list(word.columns), 0].long())
            assert word.text in said and len(said) <= len(word.text) + 3, (word, said)  # a token may end in punctuation
        own = read(clip, name, context[list(found.content), 0].long())
        assert "".join(own.split()) in "".join(prompt.replace("\\", "").split())
        assert set(found.phrases[0].columns) == {c for w in found.words if w.text.lower() == "zebra" for c in w.columns}


def test_what_is_cut_has_no_column():
    words = {family: prompt_words(language_model(family), "a red car", "car") for family in ("qwen_image", "z_image", "flux2")}
    assert words["qwen_image"].phrases[0].columns == (2,)  # its chat's opening is gone
    assert words["qwen_image"].phrases[0].encoders["qwen25_7b"][0] > 30
    assert words["z_image"].phrases[0].columns == words["z_image"].phrases[0].encoders["qwen3_4b"] == (5,)
    assert words["flux2"].phrases[0].columns[0] > 100
    assert words["qwen_image"].content[0] == 0 and words["z_image"].special[0] == words["flux2"].special[0] == 0


def test_padding_on_either_side():
    clip = language_model("flux2")
    given = {"tokenizer_options": {"mistral3_24b_min_length": 400}}
    clip.tokenize = lambda text, **more: clip.tokenizer.tokenize_with_weights(text, **given, **more)
    short, padded = prompt_words(language_model("flux2"), "a red car", "car"), prompt_words(clip, "a red car", "car")
    moved = padded.total - short.total
    assert padded.total == 400 and padded.phrases[0].columns == tuple(c + moved for c in short.phrases[0].columns)
    right = prompt_words(language_model("cosmos"), "a red car", "car")
    assert right.total == 512 and max(right.content) < 5


def test_weights_are_text_to_some():
    """The words are those without them, and what writes them is known."""
    clip, text = language_model("z_image"), "a (red car:1.4) and (zebra:-1), ((fog)) \\(old\\)"
    found = prompt_words(clip, text, "red car")
    assert [w.text for w in found.words] == ["a", "red", "car", "and", "zebra", "fog", "old"]
    assert [(p.text, round(w, 3)) for p, w in found.weighted] == [("red car", 1.4), ("zebra", -1.0), ("fog", 1.21)]
    context = clip.cond_stage_model.encode_token_weights(clip.tokenize(text))[0][0]
    said = read(clip, "qwen3_4b", context[list(found.brackets), 0])
    assert "1.4" in said and "-1" in said and not any(map(str.isalpha, said))
    assert not set(found.brackets) & set(found.content)
    weighed = prompt_words(language_model("lumina2"), text, "red car")  # ComfyUI takes them out for this one
    assert [w.text for w in weighed.words] == [w.text for w in found.words] and not weighed.weighted and not weighed.brackets


def test_a_digit_that_is_text_and_one_that_is_a_weight():
    found = prompt_words(language_model("z_image"), "(1:1)1 zebra", "zebra")
    assert [w.text for w in found.words[:2]] == ["1", "1"] and found.weighted == ()
    assert found.words[0].columns[0] + 3 < found.words[1].columns[0] + 1


@pytest.mark.parametrize("family", ["z_image", "qwen_image"])
def test_a_real_encoder_says_the_same(family):
    """A causal one with random weights: another word changes the context from that word's first column on, and nothing before."""
    from types import SimpleNamespace

    import comfy.text_encoders.llama as llama
    from comfy import sd1_clip
    from comfy.text_encoders.qwen_image import QwenImageTEModel
    from comfy.text_encoders.z_image import ZImageTEModel

    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }

    class Encoder(sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device,
                layer="last",
                textmodel_json_config=dict(small),
                dtype=torch.float32,
                special_tokens={"pad": 151643},
                layer_norm_hidden_state=False,
                model_class=llama.Qwen3_4B,
                enable_attention_masks=True,
                return_attention_masks=True,
            )

    name, kind = {"z_image": ("qwen3_4b", ZImageTEModel), "qwen_image": ("qwen25_7b", QwenImageTEModel)}[family]
    torch.manual_seed(0)
    model = kind(model_options={f"{name}_class": Encoder})
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    one = language_model(family).tokenizer
    clip = SimpleNamespace(tokenizer=one, cond_stage_model=model, tokenize=one.tokenize_with_weights)

    def encode(text):
        return model.encode_token_weights(one.tokenize_with_weights(text))[0][0]

    text = "a photo of a red firetruck and a blue car"
    found, plain = prompt_words(clip, text, "red firetruck, and"), encode(text)
    assert len(plain) == found.total
    for old, new, column in (
        ("red", "green", found.phrases[0].columns[0]),
        (" and", " or", found.phrases[0].columns[-1] + 1),
    ):
        changed = encode(text.replace(old, new))
        assert len(changed) == len(plain)
        differs = ((changed - plain).abs().amax(-1) > 1e-6).nonzero().flatten().tolist()
        assert differs[0] == column
    assert found.phrases[1].columns == (found.phrases[0].columns[-1] + 1,)


def test_a_clip_that_cannot_be_followed_is_refused():
    clip = language_model("z_image")

    class Other(type(clip.cond_stage_model)):
        def encode_token_weights(self, tokens):
            out, pooled, extra = super().encode_token_weights(tokens)
            return out, pooled, {**extra, "t5xxl_ids": out}

    clip.cond_stage_model.__class__ = Other
    with pytest.raises(ValueError, match=r"does not know how this CLIP .*qwen3_4b"):
        prompt_words(clip, "a red car", "car")


def test_the_conditioning_knows_the_prompt():
    clip = language_model("z_image")
    clip.encode_from_tokens_scheduled = lambda tokens, add_dict: [
        [clip.cond_stage_model.encode_token_weights(tokens)[0], dict(add_dict)]
    ]
    words, conditioning = encode_prompt(clip, prompt_words(clip, "a (red car:1.4)", None))
    assert conditioning[0][1]["attune_prompt"].tokens == words.tokens and len(words.lengths) == words.total


def test_anima_has_a_column_for_each_token_of_t5():
    """Its model makes the context, of T5's tokens and of what its encoder gives."""
    anima = pytest.importorskip("comfy.text_encoders.anima")
    from types import SimpleNamespace

    one = anima.AnimaTokenizer()
    model = anima.AnimaTEModel.__new__(anima.AnimaTEModel)
    torch.nn.Module.__init__(model)
    model.clip = model.clip_name = "qwen3_06b"
    model.qwen3_06b = LanguageModel(True)
    clip = SimpleNamespace(tokenizer=one, cond_stage_model=model, tokenize=one.tokenize_with_weights)
    found = prompt_words(clip, "a (red car:1.2) and a zebra", "red car")
    ids = model.encode_token_weights(one.tokenize_with_weights("a (red car:1.2) and a zebra"))[2]["t5xxl_ids"]
    assert found.total == 512 and not found.weighted  # ComfyUI uses the weights
    assert read(clip, "t5xxl", ids[list(found.phrases[0].columns)]) == "redcar"
    cond = {"cross_attn": torch.zeros(1, 9, 4), "t5xxl_ids": ids}
    prompts.compare_words("Some Node", found, cond)
    prompts.compare_columns("Some Node", found, cond)
