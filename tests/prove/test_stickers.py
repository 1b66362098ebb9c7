"""The second bundled model's world as a suite and a scorer of a comparison."""

import numpy as np
import pytest
import torch
from PIL import Image

from attune.demo.stickers import reader, world
from attune.hunt.command import bundled, side
from attune.language import scb
from attune.prove.judge import ALL
from attune.prove.judges import judges
from attune.prove.suites import items
from attune.tests.helpers import DATA

SAMPLES = sorted((DATA / "stickers").glob("*.jpg"))


def test_prompts_and_what_they_ask_for():
    found = items({"name": "stickers", "prompts": 12, "things": 3, "having": "style"})
    assert len(found) == 12 and {item.group for item in found} == {"style"}
    for item in found:
        caption = world.parse(item.text)
        assert [t.phrase for t in item.things] == [world.phrase(t) for t in caption.things]
        assert all(thing.details and all(d in item.text for d in thing.details) for thing in item.things)
    assert not {i.text for i in found} & {
        i.text for i in items({"name": "stickers", "prompts": 12, "split": "tune", "things": 3})
    }
    with pytest.raises(ValueError, match="having is colour, accessory or style"):
        items({"name": "stickers", "having": "hat"})


def test_every_prompt_of_detail_plus_plus_is_of_this_world():
    for i in range(scb.SIZE):
        found = scb.style_prompt(i)
        caption = world.parse(found.prompt)
        assert caption.things[0].style and caption.style and caption.place in world.SCENES


def test_which_model_a_config_means():
    assert [bundled(m) for m in ("demo", "demo: stickers", "demo:stickers", "model.safetensors", {"unet": "a"})] == [
        "shapes",
        "stickers",
        "stickers",
        "",
        "",
    ]
    assert [side(m) for m in ("demo", "demo: stickers", "model.safetensors")] == [128, 256, 1024]


@pytest.mark.skipif(not reader.WEIGHTS.is_file(), reason="the reader of stickers is still being trained")
def test_the_reader_judges_a_picture_part_by_part():
    (judge,), missing = judges(["demo: stickers bound"])
    assert not missing and judge.share
    rng, values = np.random.default_rng(0), []
    scenes = world.scenes("test", 5)
    for path, scene in zip(SAMPLES, scenes, strict=False):
        picture = torch.from_numpy(np.asarray(Image.open(path))).float()[None] / 255
        text = world.describe(scene, rng, full=True).text
        found = judge.values(picture, items({"name": "texts", "texts": [text]})[0])
        assert found[ALL] == min(found[f"thing {i} bound"] for i in range(1, len(scene.things) + 1))
        assert ("both styles" in found) == (len(scene.things) == 1 and bool(scene.style))
        values.append(found)
    assert np.mean([v["present"] for v in values]) >= 0.9 and np.mean([v["leaked"] for v in values]) <= 0.1
