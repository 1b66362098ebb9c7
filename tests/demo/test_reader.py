"""The reader of pictures: accuracy of the shipped weights, regions, and what `judge` makes of a reading."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from attune.demo import world
from attune.demo.reader import SURE, Found, Reader, Reading, Verdict, judge, load_reader, read, regions
from attune.tools.training import reader as training

RED_CIRCLE = Found("circle", "red", "plain", 30.0, 40.0, 20.0, 0.99)
BLUE_SQUARE = Found("square", "blue", "striped", 90.0, 80.0, 20.0, 0.98)
SAID_CIRCLE = world.Stated("circle", "red", "plain")
SAID_SQUARE = world.Stated("square", "blue", "striped")


def reading(*things: Found, ground: tuple[str, str] = ("grey", "plain")) -> Reading:
    return Reading(things, *ground)


def caption(*things: world.Stated, **more: object) -> world.Caption:
    return world.Caption("", things, **more)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_reader()


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return list(itertools.islice(world.scenes("test", 321), 240))


def pictures(scenes: list[world.Scene]) -> torch.Tensor:
    """``float [B, S, S, 3]`` in [0, 1]."""
    return torch.from_numpy(np.stack([world.render(s) for s in scenes])).float() / 255


# --- the shipped weights --------------------------------------------------------------------------------------------


def test_held_out_scenes_are_read_right(reader: Reader, scenes: list[world.Scene]) -> None:
    metrics = training.measure(reader, scenes)
    assert {name: share for name in training.SHARES if (share := metrics[name]) < 0.98} == {}
    assert metrics["region IoU"] > 0.8
    assert metrics["centre error"] < 2


def test_worn_pictures_are_still_read(reader: Reader, scenes: list[world.Scene]) -> None:
    metrics = training.measure(reader, scenes[:100], worse=True)
    assert {name: share for name in training.SHARES if (share := metrics[name]) < 0.95} == {}


def test_spoiled_shapes_are_seldom_taken_for_a_shape(reader: Reader) -> None:
    assert training.spoiled_named(reader, 30) < 0.3


def test_regions_follow_the_order_of_the_reading(reader: Reader, scenes: list[world.Scene]) -> None:
    images = pictures(scenes[:40])
    overlaps = []
    for scene, seen, masks in zip(scenes, read(reader, images), regions(reader, images), strict=False):
        assert masks.dtype == torch.bool
        assert masks.shape == (len(seen.things), world.SIZE, world.SIZE)
        assert masks.sum(dim=0).max() <= 1  # no pixel belongs to two things
        for found, mask in zip(seen.things, masks, strict=True):
            true = min(scene.things, key=lambda t: np.hypot(t.x - found.x, t.y - found.y))
            covered = training._pixels(true)
            overlaps.append(((mask & covered).sum() / (mask | covered).sum()).item())
    assert np.mean(overlaps) >= 0.8


def test_pictures_of_both_layouts_and_any_size(reader: Reader, scenes: list[world.Scene]) -> None:
    ground = {"background": "grey", "background_pattern": "plain"}
    left, right = (replace(s, **ground) for s in scenes[:2])
    wide = torch.cat(list(pictures([left, right])), dim=1)[None]  # [1, S, 2 S, 3]
    (seen,) = read(reader, wide)
    shifted = [replace(t, x=t.x + world.SIZE) for t in right.things]
    expected = sorted((t.noun, t.colour, t.pattern) for t in (*left.things, *shifted))
    assert sorted((t.noun, t.colour, t.pattern) for t in seen.things if t.confidence >= SURE) == expected
    assert (seen.background, seen.background_pattern) == ("grey", "plain")
    assert read(reader, wide.permute(0, 3, 1, 2)) == [seen]
    assert regions(reader, wide)[0].shape == (len(seen.things), world.SIZE, 2 * world.SIZE)
    with pytest.raises(ValueError, match="divisible by 8"):
        read(reader, wide[:, :-3])


def test_a_picture_of_nothing(reader: Reader, scenes: list[world.Scene]) -> None:
    empty = pictures([replace(scenes[0], things=())])
    assert all(t.confidence < SURE for t in read(reader, empty)[0].things)
    blank = regions(reader, torch.full((1, 3, 64, 128), 0.5))[0]
    assert blank.shape[1:] == (64, 128)


def test_weights_of_another_world_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "DATA_VERSION", "another")
    with pytest.raises(ValueError, match="version"):
        load_reader()


# --- judge ----------------------------------------------------------------------------------------------------------


def test_everything_right() -> None:
    verdict = judge(
        reading(BLUE_SQUARE, RED_CIRCLE), caption(SAID_CIRCLE, SAID_SQUARE, relation="left", background=("grey", "plain"))
    )
    assert verdict == Verdict((True,) * 2, (True,) * 2, (True,) * 2, (True,) * 2, True, True)
    assert verdict.all_present
    assert verdict.all_bound


def test_swapped_colours_are_present_but_not_bound() -> None:
    swapped = reading(replace(RED_CIRCLE, colour="blue"), replace(BLUE_SQUARE, colour="red"))
    verdict = judge(swapped, caption(SAID_CIRCLE, SAID_SQUARE))
    assert verdict.all_present
    assert verdict.colour == (False, False)
    assert verdict.pattern == (True, True)
    assert verdict.bound == (False, False)


def test_a_missing_and_an_unsure_thing_are_not_present() -> None:
    said = caption(SAID_CIRCLE, SAID_SQUARE, relation="left")
    for found in (reading(RED_CIRCLE), reading(RED_CIRCLE, replace(BLUE_SQUARE, confidence=0.4))):
        verdict = judge(found, said)
        assert verdict.present == verdict.bound == (True, False)
        assert not verdict.all_present
        assert verdict.relation is False
    assert judge(reading(), said).present == (False, False)


def test_repeated_nouns_need_their_own_things() -> None:
    said = caption(world.Stated("circle", "blue", None), SAID_CIRCLE)
    one = judge(reading(RED_CIRCLE), said)
    assert one.present == (False, True)  # the circle goes to the stated thing it fits
    both = judge(reading(RED_CIRCLE, replace(RED_CIRCLE, colour="blue", x=90.0)), said)
    assert both.all_bound
    twice = caption(SAID_CIRCLE, SAID_CIRCLE, relation="left")
    assert judge(reading(replace(RED_CIRCLE, x=90.0), RED_CIRCLE), twice).relation is True


@pytest.mark.parametrize("relation", ["left", "above"])
def test_relations(relation: str) -> None:
    found = reading(RED_CIRCLE, BLUE_SQUARE)
    assert judge(found, caption(SAID_CIRCLE, SAID_SQUARE, relation=relation)).relation is True
    assert judge(found, caption(SAID_SQUARE, SAID_CIRCLE, relation=relation)).relation is False
    assert judge(found, caption(SAID_CIRCLE, SAID_SQUARE)).relation is None


def test_what_is_unsaid_counts_as_right() -> None:
    verdict = judge(reading(BLUE_SQUARE), caption(world.Stated("square", None, None)))
    assert verdict.all_bound
    assert verdict.background is None
    assert judge(reading(), caption(world.Stated("square", None, None))).bound == (False,)


@pytest.mark.parametrize(
    ("said", "right"),
    [(("grey", None), True), ((None, "dotted"), True), (("grey", "plain"), False), (("pink", "dotted"), False)],
)
def test_background(said: tuple[str | None, str | None], right: bool) -> None:
    verdict = judge(reading(RED_CIRCLE, ground=("grey", "dotted")), caption(SAID_CIRCLE, background=said))
    assert verdict.background is right
