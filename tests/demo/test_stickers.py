"""The world of stickers: its captions, its splits, the reader, and the parts of the model that ship."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from attune.demo.stickers import model, reader, world
from attune.language.scb import style_prompt
from attune.tests.helpers import DATA
from attune.tools.training.stickers import renderer, scenery
from attune.tools.training.stickers.styles import BRICK, FILTERS, PIXEL

SAMPLES = sorted((DATA / "stickers").glob("*.jpg"))  # pictures of world.scenes("test", 5), in order


def some(split, count, seed=0, things=None):
    return list(itertools.islice(world.scenes(split, seed, things), count))


# --- captions and splits ---------------------------------------------------------------------------------------------


def test_what_a_caption_states_can_be_read_from_its_words():
    rng = np.random.default_rng(0)
    for scene in some("train", 300):
        for full in (True, False):
            caption = world.describe(scene, rng, full)
            assert world.parse(caption.text) == caption


def test_other_words_are_no_captions():
    for text in ("a red zebra", "a red", "", "a cat in a palace"):
        with pytest.raises(ValueError, match="world of stickers"):
            world.parse(text)


def test_the_style_composition_benchmark_can_be_said():
    for index in range(0, 300, 7):
        prompt = style_prompt(index)
        caption = world.parse(prompt.prompt)
        subject, background = world.parse(prompt.subject), world.parse(f"a dog in {prompt.background}")
        assert caption.things == subject.things and caption.things[0].style
        assert (caption.place, caption.style) == (background.place, background.style)
        assert caption.place in world.SCENES and caption.style in world.STYLES


def test_captions_state_only_what_is_there():
    rng = np.random.default_rng(1)
    for scene in some("train", 200):
        caption = world.describe(scene, rng)
        drawn = {t.noun: t for t in scene.things}
        assert {s.noun for s in caption.things} == set(drawn)
        for stated in caption.things:
            thing = drawn[stated.noun]
            for word in ("colour", "accessory", "style"):
                assert getattr(stated, word) in (None, getattr(thing, word))
        assert caption.place in (None, scene.place)
        assert caption.style in (None, scene.style)
        if caption.relation:
            left, right = (drawn[s.noun] for s in caption.things)
            assert left.x < right.x


def test_details_are_left_out_a_third_of_the_time():
    rng, said = np.random.default_rng(2), []
    for scene in some("train", 1500):
        drawn = {t.noun: t for t in scene.things}
        for stated in world.describe(scene, rng).things:
            if drawn[stated.noun].accessory:
                said.append(stated.accessory is not None)
    assert abs(np.mean(said) - 2 / 3) < 0.05


def test_unseen_pairs_are_never_drawn_for_training():
    assert {noun for noun, _ in world.HELD_OUT_PAIRS} == set(world.NOUNS)
    for scene in some("train", 1500):
        assert not any((t.noun, d) in world.HELD_OUT_PAIRS for t in scene.things for d in t.details)
    assert any((t.noun, d) in world.HELD_OUT_PAIRS for s in some("test", 100) for t in s.things for d in t.details)


def test_splits_share_no_contents():
    keys = {split: {s.key for s in some(split, 400)} for split in world.SPLITS}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["tune"] and not keys["tune"] & keys["test"]


def test_things_do_not_touch_and_stay_in_the_picture():
    for scene in some("train", 300):
        edges = [(t.x - t.width / 2, t.x + t.width / 2) for t in scene.things]
        assert edges[0][0] >= 4 and edges[-1][1] <= world.SIZE - 4 + 1e-6
        assert all(a[1] < b[0] for a, b in itertools.pairwise(edges))


def test_prompts_say_everything_and_are_the_same_every_time():
    captions = world.prompts("tune", 30)
    assert captions == world.prompts("tune", 30)
    assert len({c.text for c in captions}) == 30
    assert all(len(c.things) == 2 and c.place for c in captions)


# --- styles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", world.STYLES)
def test_a_style_changes_a_picture_and_keeps_its_size_and_range(style):
    picture = np.asarray(Image.open(SAMPLES[8]), np.float32)[64:192, 64:192] / 255
    out, cover = FILTERS[style](picture, np.ones(picture.shape[:2], np.float32), np.random.default_rng(0))
    assert out.shape == picture.shape and cover.shape == picture.shape[:2]
    assert out.min() >= 0 and out.max() <= 1
    assert np.abs(out - picture).mean() > 0.01


def test_pixel_art_is_flat_in_its_squares_and_lego_is_not():
    picture = np.asarray(Image.open(SAMPLES[8]), np.float32)[64:192, 64:192] / 255
    full = np.ones(picture.shape[:2], np.float32)

    def spread(style, side):
        out = FILTERS[style](picture, full, np.random.default_rng(0))[0]
        return out.reshape(128 // side, side, 128 // side, side, 3).std(axis=(1, 3)).max()

    assert spread("pixel-art", PIXEL) < 1e-6 < spread("lego", BRICK)


# --- the renderer, with stand-ins for the drawings, which are fetched for training only ---------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Scenes with a red ellipse for every thing and a green one for every piece of scenery."""

    def ellipse(colour):
        y, x = np.mgrid[-1:1:100j, -1:1:200j]
        pixels = np.zeros((100, 200, 4), np.uint8)
        pixels[..., :3], pixels[..., 3] = colour, 255 * (x**2 + y**2 < 1)
        return Image.fromarray(pixels, "RGBA")

    monkeypatch.setattr(renderer, "drawing", lambda *_: ellipse((220, 20, 30)))
    monkeypatch.setattr(scenery, "icon", lambda *_: ellipse((20, 160, 60)))
    scenery._sized.cache_clear()
    yield renderer.render
    scenery._sized.cache_clear()


def test_owners_are_where_the_things_are_drawn(drawn):
    for scene in some("train", 12, seed=3):
        picture, owner = drawn(scene)
        assert picture.shape == (world.SIZE, world.SIZE, 3) and picture.dtype == np.uint8
        assert set(np.unique(owner)) == set(range(len(scene.things) + 1))
        for i, t in enumerate(scene.things, 1):
            y, x = np.nonzero(owner == i)
            assert abs(x.mean() - t.x) < 3 and abs(y.mean() - t.y) < 3
            assert abs(np.ptp(x) + 1 - t.width) < 12 and abs(np.ptp(y) + 1 - t.width / 2) < 12
            if not t.style:
                assert np.abs(picture[owner == i] - np.array((220, 20, 30))).mean() < 12


def test_the_same_scene_is_the_same_picture(drawn):
    for scene in some("train", 6, seed=4):
        assert (drawn(scene)[0] == drawn(scene)[0]).all()


def test_a_thing_changes_the_picture_only_around_itself(drawn):
    scene = world.Scene((world.Thing("car", "red", "", "", 100.0, 150.0, 80.0, 0, False),), "forest", "", 7)
    with_it, owner = drawn(scene)
    without, _ = drawn(world.Scene((), "forest", "", 7))
    changed = (with_it != without).any(axis=-1)
    y, x = np.nonzero(owner == 1)
    assert changed[owner == 1].mean() > 0.95
    assert not changed[: y.min() - 24].any() and not changed[y.max() + 24 :].any()
    assert not changed[:, : x.min() - 24].any() and not changed[:, x.max() + 24 :].any()


def test_other_drawings_can_stand_in_for_some_things(drawn):
    scene = next(s for s in some("train", 20, seed=3, things=2) if not s.things[1].style)
    blue = Image.new("RGBA", (64, 64), (10, 20, 240, 255))
    picture, owner = renderer.render(scene, {1: blue})
    assert np.abs(picture[owner == 2] - np.array((10, 20, 240))).mean() < 12


# --- the reader ------------------------------------------------------------------------------------------------------


trained = pytest.mark.skipif(not reader.WEIGHTS.is_file(), reason="the reader of stickers is still being trained")


@pytest.fixture(scope="module")
def readings():
    pictures = torch.from_numpy(np.stack([np.asarray(Image.open(p)) for p in SAMPLES])).float() / 255
    return reader.read(reader.load_reader(), pictures)


@trained
def test_the_reader_reads_drawn_pictures(readings):
    rng, right = np.random.default_rng(0), []
    for scene, reading in zip(some("test", len(SAMPLES), seed=5), readings, strict=True):
        verdict = reader.judge(reading, world.describe(scene, rng, full=True))
        right += [*verdict.bound, verdict.place, verdict.place_style is not False, verdict.relation is not False]
    assert np.mean(right) >= 0.95


@trained
def test_the_reader_finds_places(readings):
    for scene, reading in zip(some("test", len(SAMPLES), seed=5), readings, strict=True):
        found = {t.noun: t for t in reading.things}
        near = [abs(found[t.noun].x - t.x) < 12 and abs(found[t.noun].y - t.y) < 12 for t in scene.things if t.noun in found]
        assert all(near)


def thing(noun, colour="", accessory="", style="", x=60.0, confidence=1.0):
    return reader.Found(noun, colour, accessory, style, x, 128.0, 90.0, confidence)


def test_a_verdict_tells_presence_from_binding():
    caption = world.parse("a red car and a dog wearing a hat in a lego style forest")
    swapped = reader.Reading((thing("car", "blue"), thing("dog", accessory="hat", x=180)), "forest", "lego")
    verdict = reader.judge(swapped, caption)
    assert verdict.all_present and not verdict.all_bound
    assert verdict.bound == (False, True) and verdict.colour == (False, True) and verdict.place and verdict.place_style
    alone = reader.judge(reader.Reading((thing("dog", accessory="hat"),), "city", ""), caption)
    assert alone.present == (False, True) and not alone.place and not alone.place_style


def test_unsure_things_do_not_count_and_the_best_match_does():
    caption = world.parse("a red car")
    reading = reader.Reading((thing("car", "blue"), thing("car", "red", x=180)), "white", "")
    assert reader.judge(reading, caption).all_bound
    unsure = reader.Reading((thing("car", "red", confidence=0.4),), "white", "")
    assert not reader.judge(unsure, caption).all_present


def test_sides_are_read_from_places():
    caption = world.parse("a red car to the right of a dog")
    for x, expected in ((200.0, True), (20.0, False)):
        reading = reader.Reading((thing("car", "red", x=x), thing("dog", x=100)), "white", "")
        assert reader.judge(reading, caption).relation is expected


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="divisible by 16"):
        reader.read(reader.Reader(), torch.zeros(1, 3, 100, 100))


# --- the model -------------------------------------------------------------------------------------------------------


def test_noise_levels_are_halved_but_for_the_largest():
    levels = model.noise_levels()
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    usual = ((1 - torch.cumprod(1 - beta, 0)) / torch.cumprod(1 - beta, 0)).sqrt().float()
    assert torch.allclose(levels[:800], usual[:800] / 2)
    assert torch.allclose(levels[-1], usual[-1])
    assert (levels.diff() > 0).all()


def test_the_denoiser_is_small():
    assert sum(p.numel() for p in model.ARCHITECTURE.unet().parameters()) <= 12e6


def test_a_leak_is_a_detail_on_the_wrong_thing():
    caption = world.parse("a red car and a blue chair in a forest")
    leaks = lambda *things: reader.leaked(reader.Reading(things, "forest", ""), caption)  # noqa: E731
    assert leaks(thing("car", "blue"), thing("chair", "blue", x=180))
    assert not leaks(thing("car", "red"), thing("chair", "blue", x=180))
    assert not leaks(thing("car", "green"), thing("chair", "blue", x=180))  # wrong, but nobody's
    assert not leaks(thing("dog", "red"), thing("chair", "blue", x=180))  # not a thing of the caption
    assert not leaks(thing("car", "blue", confidence=0.4))


@pytest.mark.parametrize(("having", "nouns"), [("colour", world.OBJECTS), ("accessory", world.FACES), ("style", world.NOUNS)])
def test_prompts_in_which_everything_has_a_detail(having, nouns):
    found = world.prompts("tune", 20, having=having)
    assert len({c.text for c in found}) == 20
    for caption in found:
        assert len(caption.things) == 2 and world.parse(caption.text) == caption
        assert all(t.noun in nouns and getattr(t, having) for t in caption.things)
