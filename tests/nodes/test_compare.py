"""Several numbers for one input, and all pictures in one grid."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from attune.nodes.compare import MOST_NUMBERS, AttuneGrid, AttuneNumbers
from attune.tests.helpers import run_prompt

TITLE = 28  # pixels


def test_numbers_and_their_labels():
    numbers, labels = AttuneNumbers.execute(" 0, 1.50;-2\n1e1，3 ", " scale ").result
    assert numbers == [0.0, 1.5, -2.0, 10.0, 3.0]
    assert labels == ["scale 0", "scale 1.5", "scale -2", "scale 10", "scale 3"]
    assert AttuneNumbers.execute("7", "").result[1] == ["7"]


@pytest.mark.parametrize("text", ["", "1, two", "nan", "1 inf", "0x10"])
def test_no_numbers(text):
    with pytest.raises(ValueError, match="is no number; write numbers with commas"):
        AttuneNumbers.execute(text, "scale")


def test_too_many():
    with pytest.raises(ValueError, match=f"{MOST_NUMBERS} are the most"):
        AttuneNumbers.execute("1 " * (MOST_NUMBERS + 1), "scale")
    with pytest.raises(ValueError, match="too many"):
        AttuneGrid.execute([torch.zeros(401, 8, 8, 3)])


def test_every_picture_is_at_its_place():
    """A row for each run, a column for each picture; runs may be of other sizes, and pictures transparent."""
    generator = torch.Generator().manual_seed(0)
    runs = [torch.rand(2, 40, 30, 3, generator=generator), torch.rand(2, 20, 50, 4, generator=generator)]
    (image,) = AttuneGrid.execute(runs, ["scale 0", "scale 1"]).result
    assert image.shape == (1, 40 + 20 + 2 * TITLE, 100, 3)
    for n in range(2):
        assert torch.equal(image[0, TITLE : TITLE + 40, 30 * n : 30 * n + 30], runs[0][n])
        assert torch.equal(image[0, 40 + 2 * TITLE :, 50 * n : 50 * n + 50], runs[1][n, ..., :3])
    assert (image[0, :TITLE] > 0.5).any()  # words


def test_labels_belong_to_runs():
    with pytest.raises(ValueError, match="there are 1 labels and 2 runs"):
        AttuneGrid.execute([torch.zeros(1, 8, 8, 3)] * 2, ["one"])


def test_strengths_by_seeds_in_comfyui(server):
    """The real server runs everything after the list once for each number, and the grid once; the row of 0 is the plain run."""
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}  # noqa: E731
    draw = {"seed": 3, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    draw |= {"positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]}
    prompt = {
        "1": node("AttuneDemoModel", variant="shapes"),
        "2": node("AttuneNumbers", numbers="0, 3", name="scale"),
        "3": node("CLIPTextEncode", clip=["1", 1], text="a red circle"),
        "4": node("CLIPTextEncode", clip=["1", 1], text=""),
        "5": node("EmptyLatentImage", width=128, height=128, batch_size=2),
        "6": node(
            "AttuneSoftPAG", model=["1", 0], scale=["2", 0], perturbation=1.0, start_percent=0.0, end_percent=1.0, rescale=0.0
        ),
        "7": node("KSampler", model=["6", 0], **draw),
        "8": node("VAEDecode", samples=["7", 0], vae=["1", 2]),
        "9": node("AttuneGrid", images=["8", 0], labels=["2", 1]),
        "10": node("SaveImage", images=["9", 0], filename_prefix="attune/grid"),
        "11": node("KSampler", model=["1", 0], **draw),
        "12": node("VAEDecode", samples=["11", 0], vae=["1", 2]),
        "13": node("SaveImage", images=["12", 0], filename_prefix="attune/plain"),
    }
    pictures, _ = run_prompt(server, prompt)
    (whole,), plain = pictures["10"], pictures["13"]
    read = lambda png: np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))  # noqa: E731
    whole = read(whole)
    assert whole.shape == (2 * (128 + TITLE), 256, 3)
    for n, one in enumerate(plain):
        own = slice(128 * n, 128 * n + 128)
        assert np.array_equal(whole[TITLE : TITLE + 128, own], read(one))
        assert not np.array_equal(whole[128 + 2 * TITLE :, own], read(one))
