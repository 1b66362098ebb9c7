"""Scorers and scores: the mathematics against loops in float64, dual encoders from folders end to end, and the bundled scorer."""

from __future__ import annotations

import gc
import itertools
import json
import math
import re
import weakref
from pathlib import Path

import comfy.model_management as management
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from attune import nodes as pack
from attune.demo import scorer
from attune.methods import scores as maths
from attune.nodes import score as score_nodes
from attune.nodes import scorers as scorer_nodes
from attune.scoring import detector, folders, scorers
from attune.scoring import metrics as scoring
from attune.tests.helpers import some_pictures
from attune.tests.scoring.tiny import WORDS, tiny_folder, tiny_model, tiny_tokenizer

NODES = [
    scorer_nodes.AttuneClipScorer,
    scorer_nodes.AttunePreferenceScorer,
    scorer_nodes.AttuneDemoScorer,
    score_nodes.AttuneScore,
    score_nodes.AttuneDiversity,
    score_nodes.AttuneSCBScore,
]


# --- folders ----------------------------------------------------------------------------------------------------------


def slow_cosines(path, images, texts):
    """What the model's own forward says, one picture and one text at a time."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    network, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    preprocessor = AutoImageProcessor.from_pretrained(path)
    out = torch.empty(len(images), len(texts))
    for i, j in itertools.product(range(len(images)), range(len(texts))):
        array = (images[i].numpy() * 255).round().astype(np.uint8)
        pixels = preprocessor(images=array, return_tensors="pt")["pixel_values"]
        ids = tokenizer(texts[j], padding="max_length", truncation=True, max_length=12, return_tensors="pt")
        ids.pop("token_type_ids", None)
        with torch.no_grad():
            logits = network(pixel_values=pixels, **ids).logits_per_image
            if getattr(network, "logit_bias", None) is not None:
                logits = logits - network.logit_bias
            out[i, j] = logits[0, 0] / network.logit_scale.exp()
    return out


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_folder_of_transformers_scores_as_its_own_model_does(home, kind):
    tiny_folder(home / "tiny", kind)
    (judge,) = scorer_nodes.AttuneClipScorer.execute("tiny").args
    texts = ["a red star", "a cat", "a photo of " * 9]
    images = some_pictures()
    with torch.inference_mode():
        got = judge.scores(images, texts)
    assert got.dtype == torch.float32 and got.shape == (3, 3) and got.device.type == "cpu"
    wanted = slow_cosines(home / "tiny", images, texts)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0)
    assert wanted.std() > 1e-3  # so that a wrong pairing would show
    features = judge.features(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3), atol=1e-5, rtol=0)


def test_batches_are_their_pictures_one_by_one(home):
    tiny_folder(home / "tiny")
    judge = scorers.ClipScorer("tiny")
    images = some_pictures(scorers.CHUNK + 3)
    one = torch.cat([judge.scores(images[i : i + 1], ["a cat"]) for i in range(len(images))])
    torch.testing.assert_close(judge.scores(images, ["a cat"]), one, atol=1e-5, rtol=0)
    alpha = torch.cat([images, torch.rand(*images.shape[:3], 1)], dim=-1)
    torch.testing.assert_close(judge.scores(alpha, ["a cat"]), one, atol=1e-5, rtol=0)
    many = judge.scores(images[:1], [f"a {w}" for w in WORDS] * 6)
    torch.testing.assert_close(many[:, : len(WORDS)], many[:, -len(WORDS) :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [torch.rand(1, 3, 8, 8), torch.rand(8, 8, 3), torch.rand(0, 8, 8, 3)])
def test_what_is_no_picture_is_refused(home, bad):
    tiny_folder(home / "tiny")
    with pytest.raises(ValueError, match="IMAGE"):
        scorers.ClipScorer("tiny").scores(bad, ["a cat"])


def test_a_missing_folder_says_where_to_put_it(home):
    with pytest.raises(ValueError, match=r"(?s)no model folder “x”.*attune_scorers.*none yet.*nothing is downloaded"):
        scorers.ClipScorer("x")
    tiny_folder(home / "tiny")
    with pytest.raises(ValueError, match="There are: tiny"):
        scorers.ClipScorer("x")


@pytest.mark.parametrize("name", ["../outside", "/outside", "..", ".", "", "tiny/../../outside", "tiny/inner"])
def test_a_name_is_no_path(home, name):
    tiny_folder(home.parent / "outside")
    tiny_folder(home / "tiny" / "inner")
    tiny_folder(home / "tiny")
    for make in (scorers.ClipScorer, scorers.PreferenceScorer):
        with pytest.raises(ValueError, match="no model folder"):
            make(name.replace("/outside", str(home.parent / "outside")) if name == "/outside" else name)


def test_weights_that_can_hold_programs_are_refused(home):
    path = tiny_folder(home / "tiny")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors version"):
        scorers.ClipScorer("tiny")
    save_file({"layers.0.weight": torch.ones(1, 16), "layers.0.bias": torch.ones(1)}, path / "head.safetensors")
    with pytest.raises(ValueError, match="safetensors version"):  # a head alone is no model
        scorers.PreferenceScorer("tiny")


def test_code_in_a_folder_is_not_run(home):
    path = tiny_folder(home / "tiny")
    (path / "evil.py").write_text(f"open({str(home.parent / 'run')!r}, 'w')\nclass A: pass\n")
    for name, key in (("config.json", "AutoConfig"), ("config.json", "AutoModel")):
        config = json.loads((path / name).read_text())
        config["auto_map"] = {**config.get("auto_map", {}), key: "evil.A"}
        config["model_type"] = "evil"
        (path / name).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="CLIP Scorer"):
        scorers.ClipScorer("tiny")
    assert not (home.parent / "run").exists()


@pytest.mark.parametrize("lacking", ["tokenizer", "preprocessor"])
def test_a_folder_without_all_its_files_is_refused(home, lacking):
    tiny_folder(home / "tiny", pieces={"model", "tokenizer", "preprocessor"} - {lacking})
    with pytest.raises(ValueError, match=rf"“tiny” has no usable {lacking}.*all files"):
        scorers.ClipScorer("tiny")


def test_half_a_model_is_refused(home):
    path = tiny_folder(home / "tiny")
    weights = {k: v for k, v in load_file(path / "model.safetensors").items() if not k.startswith("text_model")}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not complete"):
        scorers.ClipScorer("tiny")
    network, _ = tiny_model("clip")
    text = type(network.text_model)
    config = network.config.text_config
    other = tiny_folder(home / "text", pieces=("tokenizer", "preprocessor"))
    config.save_pretrained(other)
    save_file({"x": torch.ones(1)}, other / "model.safetensors", {"format": "pt"})
    assert text and "text_config" not in json.loads((other / "config.json").read_text())
    with pytest.raises(ValueError, match="no encoders for both"):
        scorers.ClipScorer("text")


def test_broken_weights_are_told_in_a_sentence(home):
    path = tiny_folder(home / "tiny")
    (path / "model.safetensors").write_bytes(b"nothing like it")
    with pytest.raises(Exception, match="CLIP Scorer: the folder “tiny” cannot be read") as raised:
        scorers.ClipScorer("tiny")
    assert raised.type is ValueError


def test_the_key_follows_the_weights(home):
    path = tiny_folder(home / "tiny")
    tiny_folder(home / "same")
    first = scorers.ClipScorer("tiny").key
    assert re.fullmatch(r"[0-9a-f]{16}", first)
    assert scorers.ClipScorer("same").key == first != scorers.PreferenceScorer("tiny").key
    print_before = folders.fingerprint(folders.SCORERS, "tiny")
    weights = load_file(path / "model.safetensors")
    weights["logit_scale"] += 0.5
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    assert scorers.ClipScorer("tiny").key != first
    assert scorer_nodes.AttuneClipScorer.fingerprint_inputs("tiny") != print_before


def test_menus_name_folders_and_are_never_empty(home):
    assert scorer_nodes.folder_names(folders.SCORERS) == [scorer_nodes.NONE]
    with pytest.raises(ValueError, match="none yet"):
        scorers.ClipScorer(scorer_nodes.NONE)
    tiny_folder(home / "b")
    tiny_folder(home / ".hidden")
    (home / "no-config").mkdir()
    assert scorer_nodes.folder_names(folders.SCORERS) == ["b"]


# --- preference -------------------------------------------------------------------------------------------------------


def test_pickscore_is_the_models_own_logits(home):
    tiny_folder(home / "tiny")
    (judge,) = scorer_nodes.AttunePreferenceScorer.execute("tiny").args
    images, texts = some_pictures(), ["a cat", "a red star"]
    scale = float(load_file(home / "tiny" / "model.safetensors")["logit_scale"].exp())
    torch.testing.assert_close(
        judge.scores(images, texts), scale * slow_cosines(home / "tiny", images, texts), atol=1e-3, rtol=0
    )
    assert not judge.cosine and judge.features(images).shape == (3, 16)


@pytest.mark.parametrize("width", [16, 32])
def test_a_head_beside_an_encoder_is_used(home, width):
    path = tiny_folder(home / "tiny")
    torch.manual_seed(2)
    state = {"layers.0.weight": torch.randn(4, width), "layers.0.bias": torch.randn(4)}
    state |= {"layers.1.weight": torch.randn(1, 4), "layers.1.bias": torch.randn(1)}
    save_file(state, path / "head.safetensors", {"mean": "1.5"})
    judge, plain = scorers.PreferenceScorer("tiny"), scorers.ClipScorer("tiny")
    images, texts = some_pictures(), ["a cat", "a red star"]
    seen, said = plain.features(images), plain.text_features(texts)
    got = judge.scores(images, texts)
    for i, j in itertools.product(range(3), range(2)):
        x = torch.cat([seen[i], said[j]])[:width]
        x = state["layers.1.weight"] @ (state["layers.0.weight"] @ x + state["layers.0.bias"]) + state["layers.1.bias"]
        assert float(got[i, j]) == pytest.approx(float(x) - 1.5, abs=1e-4)
    assert not torch.equal(got[:, 0], got[:, 1]) or width == 16


def test_a_broken_head_is_told_before_anything_is_scored(home):
    path = tiny_folder(home / "tiny")
    save_file({"other": torch.ones(2)}, path / "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors in “tiny” cannot be used"):
        scorers.PreferenceScorer("tiny")
    scorers.ClipScorer("tiny")  # which has no use for it
    save_file({"layers.0.weight": torch.ones(1, 5), "layers.0.bias": torch.ones(1)}, path / "head.safetensors")
    with pytest.raises(ValueError, match="takes vectors of 5, and this encoder's have 16"):
        scorers.PreferenceScorer("tiny")


# --- memory -----------------------------------------------------------------------------------------------------------


def loaded():
    return [m.model for m in management.current_loaded_models]


def test_memory_goes_back_to_comfyui_and_comes_again(home):
    tiny_folder(home / "tiny")
    management.unload_all_models()
    judge = scorers.ClipScorer("tiny")
    assert judge.models[0] not in loaded()  # making it takes no room where models compute
    before = judge.scores(some_pictures(), ["a cat"])
    assert judge.models[0] in loaded() and judge.models[0].loaded_size() > 0
    management.unload_all_models()
    assert judge.models[0] not in loaded() and judge.models[0].loaded_size() == 0
    assert torch.equal(judge.scores(some_pictures(), ["a cat"]), before)
    management.free_memory(1e30, judge.models[0].load_device)
    assert judge.models[0] not in loaded()


@pytest.mark.parametrize("kind", scorer.KINDS)
def test_the_demo_scorers_give_their_memory_back(kind):
    judge = scorer.scorer(kind)
    judge.scores(some_pictures(1, 128, 128), ["a red star"])
    assert judge.models[0] in loaded()
    gone = weakref.ref(judge.models[0].model)
    management.unload_all_models()
    assert judge.models[0] not in loaded()
    del judge
    gc.collect()
    assert gone() is None


# --- scores as nodes --------------------------------------------------------------------------------------------------


class Colours(scorers.Scorer):
    """A picture's vector is its mean colour, a text's is the colours that it names."""

    name, key, cosine = "colours", "0", True

    def features(self, images):
        return torch.nn.functional.normalize(images.mean((1, 2)), dim=-1)

    def scores(self, images, texts):
        said = torch.tensor([[float(c in t.lower()) for c in ("red", "good", "bad")] for t in texts]) + 1e-6
        return self.features(images) @ torch.nn.functional.normalize(said, dim=-1).T


class Verdict(Colours):
    cosine = False


def painted(*colours):
    return torch.stack([torch.tensor(c, dtype=torch.float32).expand(8, 8, 3) for c in colours])


def test_scores_of_a_batch_and_their_table():
    images = painted((1, 0, 0), (0, 1, 0), (1, 1, 0))
    mean, rows = score_nodes.AttuneScore.execute(images, "red", Colours(), "clip_t").args
    assert mean == pytest.approx((1 + 0 + 0.5**0.5) / 3, abs=1e-4)
    assert [r.split("\t") for r in rows.splitlines()] == [
        ["picture", "clip_t"],
        ["1", "1.0000"],
        ["2", "0.0000"],
        ["3", "0.7071"],
        ["mean", "0.5690"],
    ]
    quality, _ = score_nodes.AttuneScore.execute(images[1:2], "", Colours(), "clip_iqa").args
    assert quality == pytest.approx(1 / (1 + math.exp(-100)), abs=1e-6)
    opposite, _ = score_nodes.AttuneScore.execute(images[1:2], "bad | good", Colours(), "clip_iqa").args
    assert opposite == pytest.approx(1 / (1 + math.exp(100)), abs=1e-6)
    wanted, _ = score_nodes.AttuneScore.execute(images[2:], "red", Colours(), "preference").args
    assert wanted == pytest.approx(100 * 0.5**0.5, abs=1e-2)
    plain, _ = score_nodes.AttuneScore.execute(images[2:], "red", Verdict(), "preference").args
    assert plain == pytest.approx(0.5**0.5, abs=1e-4)


@pytest.mark.parametrize(
    "text, judge, metric, says",
    [
        ("", Colours(), "clip_t", "the text is empty"),
        ("a", Verdict(), "clip_t", "connect CLIP Scorer|Connect CLIP Scorer"),
        ("a", Verdict(), "clip_iqa", "Connect CLIP Scorer"),
        ("a | b | c", Colours(), "clip_iqa", "two opposites"),
        ("a |", Colours(), "clip_iqa", "two opposites"),
        ("a", Colours(), "fid", "no metric"),
    ],
)
def test_scores_that_make_no_sense_are_refused(text, judge, metric, says):
    with pytest.raises(ValueError, match=says):
        score_nodes.AttuneScore.execute(painted((1, 0, 0)), text, judge, metric)


def test_diversity_of_a_batch():
    (value,) = score_nodes.AttuneDiversity.execute(painted((1, 0, 0), (0, 1, 0), (0, 1, 0)), Colours()).args
    assert value == pytest.approx(2 / 3, abs=1e-6)
    with pytest.raises(ValueError, match="only gives scores"):
        score_nodes.AttuneDiversity.execute(some_pictures(2, 128, 128), scorer.ReaderScorer("present"))


def half_and_half():
    """A picture that is red at the left and green at the right, and one the other way round."""
    image = torch.zeros(2, 10, 20, 3)
    image[0, :, :10, 0] = image[0, :, 10:, 1] = image[1, :, 10:, 0] = image[1, :, :10, 1] = 1
    return image


def test_parts_are_cut_out_by_masks():
    image = half_and_half()
    subject = image[..., 0]
    both = torch.cat([subject, 1 - subject])  # as Attention Segmentation orders them: by word, then by picture
    node = score_nodes.AttuneSCBScore
    full, rows = node.execute(image, "a red thing", "good place", Colours(), masks=both).args
    assert full == pytest.approx(1, abs=1e-4)
    assert rows.splitlines()[1].split("\t") == ["1", "a red thing", "0, 0 to 10, 10", "1.0000"]
    assert rows.splitlines()[3].split("\t")[:3] == ["2", "a red thing", "10, 0 to 20, 10"]
    whole, rows = node.execute(image, "a red thing", "good place", Colours(), masks=subject).args
    assert whole == pytest.approx((1 + 0.5**0.5) / 2, abs=1e-4) and "whole picture" in rows
    small = torch.nn.functional.interpolate(both[:, None], size=(5, 10))[:, 0]  # masks of another size
    assert node.execute(image, "a red thing", "good place", Colours(), masks=small).args[0] == pytest.approx(1, abs=1e-4)
    nothing = torch.zeros_like(both)
    lost, rows = node.execute(image, "a red thing", "good place", Colours(), masks=nothing).args
    assert lost == pytest.approx(0.5**0.5, abs=1e-4) and rows.count("whole picture") == 4


def test_a_style_score_without_what_it_needs_is_refused():
    image, node = half_and_half(), score_nodes.AttuneSCBScore
    with pytest.raises(ValueError, match="needs masks"):
        node.execute(image, "a", "b", Colours())
    with pytest.raises(ValueError, match="3 masks for 2 pictures"):
        node.execute(image, "a", "b", Colours(), masks=torch.ones(3, 10, 20))
    with pytest.raises(ValueError, match="need a phrase"):
        node.execute(image, "a", " ", Colours(), masks=torch.ones(2, 10, 20))
    with pytest.raises(ValueError, match="by cosine"):
        node.execute(image, "a", "b", Verdict(), masks=torch.ones(2, 10, 20))


def test_styles_are_not_looked_for():
    assert scoring.thing("a sketch style robot") == "robot"
    assert scoring.thing("an oil-painting style forest") == "forest"
    assert scoring.thing("the red car") == "red car"
    assert scoring.thing("a") == "a"


@pytest.fixture
def owl(home):
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor

    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": len(WORDS), "max_position_embeddings": 12, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OwlViTConfig(text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8}, projection_dim=16)
    torch.manual_seed(0)
    path = home.parent / folders.DETECTORS / "owl"
    network = OwlViTForObjectDetection(config)
    with torch.no_grad():  # random boxes are mostly nothing: bring them to the middle
        for parameter in (*network.box_head.parameters(), *network.class_head.parameters()):
            parameter.mul_(0.05)
    network.save_pretrained(path)
    OwlViTProcessor(OwlViTImageProcessor(size={"height": 32, "width": 32}), tiny_tokenizer(12)).save_pretrained(path)
    return path


def test_a_detector_gives_the_surest_box(owl):
    from transformers import OwlViTForObjectDetection, OwlViTProcessor

    found = detector.Detector("owl")
    picture = some_pictures(1, 40, 60)[0]
    box, sure = found.find(picture, "cat", 0.0)
    network, processor = OwlViTForObjectDetection.from_pretrained(owl).eval(), OwlViTProcessor.from_pretrained(owl)
    array = (picture.numpy() * 255).round().astype(np.uint8)
    inputs = processor(images=array, text=[["a photo of a cat"]], return_tensors="pt")
    with torch.no_grad():
        out = network(**inputs)
    (own,) = processor.post_process_grounded_object_detection(out, threshold=0.0, target_sizes=torch.tensor([[40, 60]]))
    best = own["scores"].argmax()
    assert sure == pytest.approx(float(own["scores"][best]), abs=1e-5)
    left, top, right, bottom = own["boxes"][best].tolist()
    assert box == maths.within((left, top, right, bottom), 40, 60)
    assert found.find(picture, "cat", 1.1) is None
    score, rows = score_nodes.AttuneSCBScore.execute(picture[None], "a red style cat", "a star", Colours(), "owl").args
    assert 0 <= score <= 1 and len(rows.splitlines()) == 4


def test_a_folder_that_is_no_detector_is_refused(home):
    path = home.parent / folders.DETECTORS / "clip"
    tiny_folder(path)
    with pytest.raises(ValueError, match="SCB Score"):
        detector.Detector("clip")
    with pytest.raises(ValueError, match="no model folder"):
        detector.Detector("../attune_scorers/tiny")


# --- the nodes --------------------------------------------------------------------------------------------------------


def test_the_nodes_are_listed_and_explained():
    import asyncio

    listed = asyncio.run(pack.Attune().get_node_list())
    for node in NODES:
        assert node in listed
        schema = node.define_schema()
        assert schema.description and all(part.tooltip for part in (*schema.inputs, *schema.outputs))
        page = Path(pack.__file__).parent.parent / "web" / "docs" / f"{schema.node_id}.md"
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {schema.display_name}\n") and all(f"**{i.id}**" in text for i in schema.inputs)


@pytest.mark.parametrize(
    "node, names",
    [
        (score_nodes.AttuneScore, ["images", "text", "scorer", "metric"]),
        (score_nodes.AttuneDiversity, ["images", "scorer"]),
        (score_nodes.AttuneSCBScore, ["image", "subject", "background", "scorer", "detector", "masks"]),
        (scorer_nodes.AttuneClipScorer, ["folder"]),
        (scorer_nodes.AttunePreferenceScorer, ["folder"]),
        (scorer_nodes.AttuneDemoScorer, ["kind"]),
    ],
)
def test_input_names_and_order_never_change(node, names):
    assert [i.id for i in node.define_schema().inputs] == names
