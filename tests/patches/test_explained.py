"""What Show Attention Maps tells the editor: what each place gives to each word, against softmax written out; small, whatever comes."""

import base64
import dataclasses
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from attune.language.words import Phrase
from attune.patches.maps import pictures
from attune.patches.maps.record import Settings
from attune.patches.maps.recorder import apply as capture
from attune.server.widgets import maps_told
from attune.tests import families
from attune.tests.families import heads_of, words
from attune.tests.helpers import close, some_pictures
from attune.tests.patches.test_maps import seen


def captured(name, layers, **settings):
    model = families.shared(name)
    patched, held = capture(model, Settings(precision="fp32", steps="last"), heads_of(model, layers))
    families.sample(patched, **settings)
    return held.record()


def word(text, *columns):
    return Phrase(text, columns, {"l": columns})


WORDS = dataclasses.replace(
    words((1, 2)), words=(word("red", 1), word("car", 2), word("on", 3), word("ice", 4), word("on", 3), word("!"))
)


def test_a_place_s_shares():
    settings = {"size": (8, 12), "batch": 2, "steps": 2}
    record = captured("sd15", "middle.*.* input.3.*", **settings)
    found = pictures.explained(record, WORDS, some_pictures(2, 64, 96))
    right = []
    for site in ("input.3.0", "middle.0.0"):
        weights = seen(families.shared("sd15"), (site, "cross"), **settings)[-1].double().mean(dim=1)  # [B, M, N]
        h, w = record.cross[site].grid
        right.append(F.interpolate(weights.transpose(1, 2).unflatten(2, (h, w)), size=found.maps.shape[2:], mode="bilinear"))
    mean = torch.stack(right).mean(dim=0)
    assert found.names[1:] == ("on", "ice") and found.chosen == 1 and found.total == 2
    wanted = torch.stack([mean[:, 1] + mean[:, 2], mean[:, 3], mean[:, 4]], dim=1)
    close(found.maps, wanted.float(), 1e-4)


def test_what_is_sent_is_what_was_found():
    found = pictures.explained(captured("sd15", "middle.*.*", batch=2, steps=1), WORDS, some_pictures(2, 64, 64))
    (told,) = maps_told(found)["attune_maps"]
    width, height = told["size"]
    open_ = lambda text: np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), dtype=np.float32)  # noqa: E731
    for i, sent in enumerate(told["pictures"]):
        tiles = torch.tensor(open_(sent["maps"])).reshape(len(told["names"]), height, width) / 255
        low, high = torch.tensor(sent["ranges"]).T[..., None, None]
        assert ((low + tiles * (high - low) - found.maps[i]).abs() <= (high - low) / 255 + 2e-6).all()
        assert open_(sent["picture"]).shape == found.pictures[i].shape


@pytest.mark.parametrize("count, names", [(1, 3), (4, 300), (70, 9)])
def test_it_is_small(count, names):
    record = captured("sd15", "input.*.*", size=(16, 32), batch=2, steps=1)
    place = next(iter(record.cross.values()))
    frame = torch.rand(count, 1, 128 * 256, 7)
    record = dataclasses.replace(
        record, pictures=count, cross={"input.1.0": dataclasses.replace(place, grid=(128, 256), frames={-1: frame})}
    )
    many = dataclasses.replace(WORDS, words=tuple(word(f"w{i}", 3 + i % 2) for i in range(names)))
    found = pictures.explained(record, many, some_pictures(1, 640, 1280).expand(count, -1, -1, -1))
    assert found.maps.numel() <= pictures.MOST_VALUES and max(found.maps.shape[2:]) <= pictures.SIDE
    assert len(found.names) == min(names + 1, pictures.MOST_NAMES) and len(found.maps) == min(count, pictures.MOST_PICTURES)
    assert max(found.pictures.shape[1:3]) == pictures.SMALL and found.total == count
    assert len(str(maps_told(found))) < 1_000_000
