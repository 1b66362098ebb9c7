"""The world of shapes: pictures say what scenes hold, captions say what scenes are, splits never mix."""

from itertools import islice

import numpy as np
import pytest

from attune.demo import world


def test_scenes_are_the_same_for_the_same_seed():
    first, second = (list(islice(world.scenes("train", 7), 20)) for _ in range(2))
    assert first == second
    assert first != list(islice(world.scenes("train", 8), 20))


@pytest.mark.parametrize("split", world.SPLITS)
def test_splits_hold_their_own_scenes(split):
    for scene in islice(world.scenes(split, 3), 300):
        assert scene.split == split
        if split == "train":
            assert not any((t.colour, t.noun) in world.HELD_OUT_PAIRS for t in scene.things)


def test_unseen_pairs_are_met_in_the_test_split():
    pairs = {(t.colour, t.noun) for scene in islice(world.scenes("test", 3), 600) for t in scene.things}
    assert pairs & world.HELD_OUT_PAIRS


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split"):
        next(world.scenes("validation", 0))


def test_things_keep_apart_and_inside():
    for scene in islice(world.scenes("train", 1), 300):
        for i, a in enumerate(scene.things):
            assert a.radius < a.x < world.SIZE - a.radius
            assert a.radius < a.y < world.SIZE - a.radius
            for b in scene.things[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_a_plain_thing_is_painted_in_its_colour():
    thing = world.Thing("circle", "blue", "plain", "", 64, 64, 22)
    picture = world.render(world.Scene((thing,), "grey", "plain", 0))
    assert tuple(picture[64, 64]) == world.COLOURS["blue"]
    assert tuple(picture[5, 5]) == world.BACKGROUNDS["grey"]


@pytest.mark.parametrize("pattern", [p for p in world.PATTERNS if p != "plain"])
def test_patterns_show_and_repeat(pattern):
    thing = world.Thing("square", "red", pattern, "large", 64, 64, 28)
    patch = world.render(world.Scene((thing,), "black", "plain", 0))[48:80, 48:80]
    assert len(np.unique(patch.reshape(-1, 3), axis=0)) > 1
    assert (patch[:, :-8] == patch[:, 8:]).all()
    assert (patch[:-8] == patch[8:]).all()


@pytest.mark.parametrize("noun", world.NOUNS)
def test_coverage_matches_the_picture(noun):
    thing = world.Thing(noun, "green", "plain", "", 60.3, 66.7, 22)
    drawn = world.render(world.Scene((thing,), "black", "plain", 0))
    covered = world.coverage(thing)
    assert 150 < covered.sum() < np.pi * 24**2
    assert (drawn[covered == 1] == world.COLOURS["green"]).all()
    assert (drawn[covered == 0] == world.BACKGROUNDS["black"]).all()


def test_captions_state_what_the_scene_holds():
    rng = np.random.default_rng(0)
    for scene in islice(world.scenes("train", 5), 300):
        caption = world.describe(scene, rng)
        held = {(t.noun, t.colour, t.pattern) for t in scene.things}
        for stated in caption.things:
            assert any(stated.noun == n and stated.colour in (None, c) and stated.pattern in (None, p) for n, c, p in held), (
                caption
            )
            assert stated.noun in caption.text
            assert stated.colour is None or stated.colour in caption.text
        if caption.relation:
            first, second = (
                next(t for t in scene.things if t.noun == s.noun and s.colour in (None, t.colour)) for s in caption.things
            )
            if first.noun != second.noun:
                assert first.x < second.x if caption.relation == "left" else first.y < second.y


def test_prompts_are_different_full_and_reproducible():
    captions = world.prompts("test", 80)
    assert captions == world.prompts("test", 80)
    assert len({c.text for c in captions}) == 80
    for caption in captions:
        assert len({t.noun for t in caption.things}) == len({t.colour for t in caption.things}) == 2
        assert all(t.pattern for t in caption.things)
    assert not {c.text for c in captions} & {c.text for c in world.prompts("tune", 80)}
