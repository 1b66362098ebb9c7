"""Scorers of comparisons with small random weights, against what they are said to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
)

from attune.prove import bench, judges, suites
from attune.prove import found as looking
from attune.prove import pictures as many_of

# --- scorers with small random weights --------------------------------------------------------------------------------

PICTURE = (torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "a", "red", "circle", "star", "?", "photo", "of")


def _tokenizer(place):
    (place / "vocab.txt").parent.mkdir(parents=True, exist_ok=True)
    (place / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    return BertTokenizerFast(vocab=str(place / "vocab.txt"), model_max_length=16)


def _blip_config():
    text = {
        **SIZES,
        "vocab_size": len(VOCABULARY),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 16,
        "projection_dim": 16,
    }
    text |= {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 32, "patch_size": 8, "projection_dim": 16}
    return BlipConfig(text_config=text, vision_config=vision, projection_dim=16)


def test_questions_are_asked_of_blip(folders):
    place = folders[0] / "blip"
    tokenizer = _tokenizer(place)
    torch.manual_seed(0)
    network = BlipForQuestionAnswering(_blip_config()).eval()
    network.save_pretrained(place)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(place)
    tokenizer.save_pretrained(place)
    (judge,), missing = judges.judges(["vqa: blip"])
    item = suites.Item("a red star and a circle", (suites.Thing("star", "a red star"), suites.Thing("circle", "a circle")))
    found = judge.values(PICTURE, item)
    assert not missing and set(found) == {"all", "thing 1", "thing 2"} and all(0 < v < 1 for v in found.values())
    assert found["all"] == pytest.approx(found["thing 1"] * found["thing 2"], rel=1e-5)
    inputs = judge.processor(images=PICTURE[0].numpy(), text="a circle?", return_tensors="pt", do_rescale=False)
    inputs["input_ids"][0, 0] = 3  # the token after the decoder's first, as in BLIP's own code
    with torch.no_grad():
        asked = network.text_encoder(
            **{k: inputs[k] for k in ("input_ids", "attention_mask")},
            encoder_hidden_states=network.vision_model(inputs["pixel_values"])[0],
        )[0]
        said = network.text_decoder(input_ids=torch.tensor([[2]]), encoder_hidden_states=asked).logits[0, 0].softmax(-1)
    yes, no = said[VOCABULARY.index("yes")], said[VOCABULARY.index("no")]
    assert found["thing 2"] == pytest.approx(float(yes / (yes + no)), rel=1e-3)


@pytest.mark.parametrize("headed", [False, True])
def test_a_reward_reads_picture_and_text_together(folders, headed):
    place = folders[0] / "reward"
    tokenizer, config = _tokenizer(place), _blip_config()
    torch.manual_seed(0)
    network = BlipForImageTextRetrieval(config).eval()
    network.save_pretrained(place)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(place)
    tokenizer.save_pretrained(place)
    weight = torch.randn(1, 16)
    if headed:
        state = {"layers.0.weight": weight, "layers.0.bias": torch.zeros(1)}
        save_file(state, place / "head.safetensors", {"mean": "0.5", "std": "2"})
    (judge,), missing = judges.judges(["reward: reward"])
    got = judge.values(PICTURE, suites.Item("a red star"))["all"]
    inputs = judge.processor(images=PICTURE[0].numpy(), text="a red star", return_tensors="pt", do_rescale=False)
    if not headed:
        inputs["input_ids"][0, 0] = 3
    with torch.no_grad():
        found = network(**inputs)
    read = found.question_embeds[0, 0]
    wanted = (weight[0] @ read - 0.5) / 2 if headed else found.itm_score.softmax(-1)[0, 1]
    assert not missing and got == pytest.approx(float(wanted), rel=1e-2, abs=1e-3)


def test_clip_and_preference_judge_phrases_too(folders):
    from attune.tests.scoring.tiny import tiny_folder

    tiny_folder(folders[0] / "clip")
    found, missing = judges.judges(["clip_t: clip", "clip_iqa: clip", "preference: clip"])
    item = suites.Item("a red star", (suites.Thing("star", "a red star"),))
    values = [judge.values(torch.rand(1, 40, 40, 3), item) for judge in found]
    assert not missing and set(values[0]) == {"all", "thing 1"} and values[0]["all"] == pytest.approx(values[0]["thing 1"])
    assert 0 <= values[1]["all"] <= 1


def _owl(place):
    from transformers import CLIPTokenizerFast, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    letters = [
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {c: i for i, c in enumerate(letters)}
    tokenizer = CLIPTokenizerFast(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", model_max_length=32)
    text = {
        **SIZES,
        "vocab_size": len(letters),
        "max_position_embeddings": 32,
        "bos_token_id": 52,
        "eos_token_id": 53,
        "pad_token_id": 53,
    }
    config = Owlv2Config(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 8}, projection_dim=16)
    Owlv2ForObjectDetection(config).save_pretrained(place)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(place)
    tokenizer.save_pretrained(place)


def _dino(place):
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    tokenizer = _tokenizer(place)
    backbone = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 1], window_size=2, out_indices=[1, 2, 3]
    )
    words = BertConfig(**SIZES, vocab_size=len(VOCABULARY), max_position_embeddings=16)
    small = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "num_queries": 4,
    }
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_text_len": 16, "num_feature_levels": 3}
    config = GroundingDinoConfig(backbone_config=backbone, text_config=words, **small)
    GroundingDinoForObjectDetection(config).save_pretrained(place)
    size = {"shortest_edge": 32, "longest_edge": 64}
    GroundingDinoProcessor(GroundingDinoImageProcessor(size=size), tokenizer).save_pretrained(place)
    tokenizer.save_pretrained(place)


@pytest.mark.parametrize("make", [_owl, _dino])
def test_detectors_of_random_weights_find_or_do_not(folders, make):
    from attune.tests.scoring.tiny import tiny_folder

    torch.manual_seed(0)
    make(folders[1] / "detector")
    tiny_folder(folders[0] / "clip")
    (rate, styles), missing = judges.judges(["detection: detector", "scb: detector, clip"])
    item = suites.Item("a star and a circle", (suites.Thing("star", "a star"), suites.Thing("circle", "a circle")))
    picture = torch.rand(1, 40, 40, 3)
    assert not missing and set(rate.values(picture, item)) == {"all", "share", "thing 1", "thing 2"}
    assert -1 <= styles.values(picture, item)["all"] <= 1


class Eyes:
    """In place of a detector: sees stars only, two of them."""

    def __init__(self, folder):
        pass

    def find_all(self, picture, name, least, overlap):
        return {"star": [((0, 0, 8, 8), 0.9), ((0, 8, 8, 16), 0.5)], "moon": [((8, 0, 16, 8), 0.8)]}.get(name, [])

    def find(self, picture, name, least=0.0):
        return ((0, 0, 8, 8), 0.9) if name == "star" else None


def test_the_detection_rate_is_of_things(monkeypatch):
    for name, new in (("Detector", Eyes), ("model_folder", lambda *_: None), ("files_of", lambda *_: [])):
        monkeypatch.setattr(looking, name, new)
    (judge,), _ = judges.judges(["detection: any"])
    item = suites.Item("a star and a circle", (suites.Thing("star", "a star"), suites.Thing("circle", "a circle")))
    assert judge.values(torch.rand(1, 16, 16, 3), item) == {"all": 0.0, "share": 0.5, "thing 1": 1.0, "thing 2": 0.0}


@pytest.mark.parametrize(
    ("things", "group", "wanted"),
    [
        ([("star", 2)], "count", {"all": 1.0, "count": 1.0}),
        ([("star", 3)], "count", {"all": 0.0, "count": 0.0}),
        ([("moon", 2)], "count", {"all": 0.0, "count": 0.0}),
        ([("star", 1), ("moon", 1)], "left of", {"all": 1.0, "present": 1.0, "position": 1.0}),
        ([("star", 1), ("moon", 1)], "above", {"all": 0.0, "present": 1.0, "position": 0.0}),
        ([("star", 1), ("sun", 1)], "left of", {"all": 0.0, "present": 0.0, "position": 0.0}),
        ([("star", 1), ("moon", 1)], "", {}),
    ],
)
def test_things_are_counted_and_placed(monkeypatch, things, group, wanted):
    for name, new in (("Detector", Eyes), ("model_folder", lambda *_: None), ("files_of", lambda *_: [])):
        monkeypatch.setattr(looking, name, new)
    (judge,), _ = judges.judges(["counts: any"])
    item = suites.Item("", tuple(suites.Thing(noun, noun, (), count) for noun, count in things), group)
    assert judge.values(PICTURE, item) == wanted


def test_places_by_the_rule_of_geneval():
    middle = (40, 40, 60, 60)
    for box, wanted in [
        ((0, 40, 20, 60), {"left of"}),
        ((80, 40, 100, 60), {"right of"}),
        ((40, 0, 60, 20), {"above"}),
        ((0, 80, 20, 100), {"left of", "below"}),
        (middle, set()),
        ((42, 40, 62, 60), set()),
    ]:
        assert looking.relations(box, middle) == wanted


def test_the_frechet_distance_is_that_of_normal_distributions(folders, tmp_path):
    from attune.tests.scoring.tiny import tiny_folder

    torch.manual_seed(0)
    one, other = (torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) for _ in range(2))
    c1, c2 = (torch.from_numpy(np.cov(x.T.numpy())) for x in (one, other))
    values = torch.linalg.eigvals(c1 @ c2).real.clamp_min(0)
    wanted = (one.mean(0) - other.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * values.sqrt().sum()
    assert many_of.frechet(many_of.moments(one), many_of.moments(other)) == pytest.approx(float(wanted), rel=1e-9)
    tiny_folder(folders[0] / "clip")
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(bench.png_of(torch.rand(1, 16, 16, 3)))
    many, apart = judges.judges([f"frechet: clip, {tmp_path}", "distance: clip"])[0]
    same = [bench.tensor_of((tmp_path / f"{i}.png").read_bytes()) for i in range(3)]
    assert many.of(same) == pytest.approx(0, abs=1e-5) and many.of([PICTURE, PICTURE]) > 1e-5
    assert apart.apart(PICTURE, PICTURE) == pytest.approx(0, abs=1e-6) and apart.apart(PICTURE, PICTURE.flip(1)) > 0
    assert judges.judges(["frechet: clip, /nowhere"])[0] == []
