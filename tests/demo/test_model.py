"""The bundled model: real ComfyUI objects that core nodes take, small, quick, and good enough to judge methods on."""

import json

import comfy.lora
import nodes as core
import numpy as np
import pytest
import torch
from safetensors import safe_open

from attune.demo import model, world
from attune.tools.benchmarks.shared.pictures import generate, verdicts
from attune.tools.training import shapes as train


@pytest.fixture(scope="module")
def demo():
    return model.load()


@pytest.fixture(scope="module")
def captions():
    return world.prompts("test", 100)


@pytest.fixture(scope="module")
def found(demo, captions):
    pictures = generate(*demo, [c.text for c in captions], cfg=5.0, seed=1000)
    return verdicts(pictures, captions)


def share(found, what):
    return np.mean([all(getattr(v, what)) for v in found])


def test_core_nodes_take_it_as_they_take_sd15(demo):
    patcher, clip, vae = demo
    with torch.inference_mode():
        (positive,) = core.CLIPTextEncode().encode(clip, "a (red:1.2) star and a blue circle on a grey wall")
        (negative,) = core.CLIPTextEncode().encode(clip, "")
        (latent,) = core.EmptyLatentImage().generate(136, 120, 2)
        (samples,) = core.KSampler().sample(patcher, 1, 2, 5.0, "dpmpp_2m", "karras", positive, negative, latent, 1.0)
        (image,) = core.VAEDecode().decode(vae, samples)
        (back,) = core.VAEEncode().encode(vae, image)
    assert image.shape == (2, 120, 136, 3)
    assert back["samples"].shape == samples["samples"].shape == (2, 4, 15, 17)
    assert torch.isfinite(image).all()


def test_prompts_longer_than_a_chunk_are_taken(demo):
    _, clip, _ = demo
    context = clip.encode_from_tokens(clip.tokenize("a red star and a blue circle, " * 20))
    assert context.shape[1] > 77
    assert context.shape[1] % 77 == 0


def test_lora_keys_are_mapped(demo):
    patcher, clip, _ = demo
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    assert keys["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"].startswith("diffusion_model.middle_block")
    assert any(k.startswith("lora_te") for k in comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))


def test_the_file_is_small_half_precision_and_says_where_it_comes_from():
    path = model.WEIGHTS / "shapes.safetensors"
    assert sum(f.stat().st_size for f in model.WEIGHTS.iterdir()) < 25e6
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert metadata["data_version"] == world.DATA_VERSION
        assert metadata["command"].startswith("run.py train")
        assert json.loads(metadata["metrics"])["prompts"] >= 500
        kinds = {file.get_tensor(k).dtype for k in file.keys()}  # noqa: SIM118
    assert kinds == {torch.float16, torch.int32}


def test_training_tokens_are_clips_tokens(demo):
    _, clip, _ = demo
    words = train.Words()
    for caption in world.prompts("train", 40, 3):
        assert words.ids(caption.text) == [t for t, _ in clip.tokenize(caption.text)["l"][0]]


def test_every_word_of_the_world_has_its_own_row(demo):
    _, clip, _ = demo
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    for word in (*world.NOUNS, *world.COLOURS, *world.PATTERNS, *world.BACKGROUNDS, "left", "above"):
        for number, _ in clip.tokenize(word)["l"][0][1:2]:
            assert not torch.equal(table[number], table[0]), word


def test_pictures_survive_the_autoencoder(demo):
    _, _, vae = demo
    scenes = train.take(world.scenes("test", 11), 40)
    pictures = torch.from_numpy(np.stack([world.render(s) for s in scenes])).float() / 255
    with torch.inference_mode():
        back = vae.decode(vae.encode(pictures))
    assert (back - pictures).abs().mean() < 0.03
    captions = [world.describe(s, np.random.default_rng(0), full=True) for s in scenes]
    assert np.mean([v.all_bound for v in verdicts(back, captions)]) >= 0.85


def test_the_recorded_figures_hold(found):
    """What the file says of itself, measured on 500 prompts, within what chance does to 100 of them."""
    with safe_open(model.WEIGHTS / "shapes.safetensors", "pt") as file:
        recorded = json.loads(file.metadata()["metrics"])
    for what in ("present", "colour", "pattern", "bound"):
        assert abs(share(found, what) - recorded[what]) <= 0.15, what


def test_it_draws_what_it_is_asked_for_and_still_mixes_things_up(found):
    assert share(found, "present") >= 0.85
    assert 0.50 <= share(found, "bound") <= 0.90


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="shapes"):
        model.load("../secrets")
