"""Names of attention sites, and the grammar that selects heads."""

import pytest
import torch

from attune.patches.hook.families import family
from attune.patches.hook.install import model_sites
from attune.patches.hook.sites import check, select
from attune.tests import families

EXPECTED = {
    "sd15": ("input.1.0 input.3.0 middle.0.0 output.0.0 output.1.0 output.2.0 output.3.0", ("self", "cross"), 4),
    "sdxl": (
        "input.3.0 input.3.1 middle.0.0 middle.0.1 output.0.0 output.0.1 output.1.0 output.1.1",
        ("self", "cross"),
        4,
    ),
    "sd3": ("joint.0 joint.1 joint.2", ("joint",), 3),
    "flux": ("double.0 double.1 single.0 single.1 single.2", ("joint",), 4),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_sites_in_order_of_execution(name):
    names, kinds, heads = EXPECTED[name]
    family, sites = model_sites(families.shared(name))
    assert family == {"sd15": "unet", "sdxl": "unet"}.get(name, name)
    assert [s.name for s in sites] == names.split()
    assert [s.layer for s in sites] == list(range(len(sites)))
    assert {s.kinds for s in sites} == {kinds} and {s.heads for s in sites} == {heads}


def test_sd35_medium_attends_twice_in_its_first_blocks():
    _, sites = model_sites(families.shared("sd35"))
    assert [s.kinds for s in sites] == [("joint", "self"), ("joint", "self"), ("joint",)]


def chosen(selection, name="sd15"):
    family, sites = model_sites(families.shared(name))
    return select(selection, sites, family)


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        ("middle.0.0", "middle.0.0:0-3"),
        ("middle.0.0:0-1,3", "middle.0.0:0-1,3"),
        (
            "output.*.*:1 ; input.3.0:*\nmiddle.0.0:2",
            "input.3.0:0-3 middle.0.0:2 " + " ".join(f"output.{i}.0:1" for i in range(4)),
        ),
        ("output.1-2.0:3 output.2.0:0", "output.1.0:3 output.2.0:0,3"),
        ("L2H3 L0H0-1", "input.1.0:0-1 middle.0.0:3"),
        ("l1-2h0", "input.3.0:0 middle.0.0:0"),
        ("L2", "middle.0.0:0-3"),
    ],
)
def test_grammar(selection, text):
    heads = chosen(selection)
    assert heads.text == text
    assert chosen(heads.text) == heads


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ("", "empty"),
        (" ;\n", "empty"),
        ("middle.1.0", "input.1.0, input.3.0, middle.0.0"),
        ("joint.1:0", "middle.0.0"),
        ("middle.0.0:4", "heads 0 to 3, not 4"),
        ("middle.0.0:2-9", "heads 0 to 3"),
        ("middle.0.0:3-1", "backwards"),
        ("middle.0.0:a", "not a number"),
        ("L7H0", "no layer L7.*L0 to L6"),
        ("L0-99H0", "no layer L7"),
    ],
)
def test_mistakes_are_explained(selection, words):
    with pytest.raises(ValueError, match=words):
        chosen(selection)


def test_heads_of_another_model_are_refused():
    family, sites = model_sites(families.shared("sd15"))
    for heads in (chosen("double.0:1", "flux"), chosen("middle.0.1", "sdxl")):
        with pytest.raises(ValueError, match="another model"):
            check(heads, sites, family)
    assert check(chosen("middle.0.0:1"), sites, family) == {"middle.0.0": (1,)}


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ("middle.0.0:0-3,12", "heads 0 to 3, not 12"),
        ("middle.0.0:12", "heads 0 to 3, not 12"),
        ("L5 L30", "no layer L30"),
        ("L0H99", "heads 0 to 3, not 99"),
        ("middle.0.0:7-9", "heads 0 to 3, not 7"),
    ],
)
def test_numbers_far_too_high_are_refused_too(selection, words):
    with pytest.raises(ValueError, match=words):
        chosen(selection)


def test_models_that_look_like_flux_are_refused():
    """HunyuanVideo has double and single blocks too, but three sides to a patch; Chroma has no time embedding of FLUX's kind."""
    from comfy.ldm.chroma.model import Chroma
    from comfy.ldm.hunyuan_video.model import HunyuanVideo
    from comfy.ops import disable_weight_init

    small = {
        "in_channels": 16,
        "out_channels": 16,
        "context_in_dim": 16,
        "hidden_size": 64,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [8, 12, 12],
        "theta": 256,
        "qkv_bias": True,
        "device": "meta",
        "dtype": torch.float32,
        "operations": disable_weight_init,
    }
    absent = {"byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None}
    video = HunyuanVideo(
        image_model="hunyuan_video", patch_size=[1, 2, 2], vec_in_dim=16, guidance_embed=False, **absent, **small
    )
    chroma = Chroma(image_model="chroma", patch_size=2, in_dim=8, out_dim=64, hidden_dim=16, n_layers=1, **small)
    for model in (video, chroma):
        with pytest.raises(ValueError, match=f"does not know the model class {type(model).__name__}"):
            family(model)


def test_flux_2_is_not_taken_for_flux():
    """ComfyUI makes both of one class; only one of them has modulation that all blocks share."""
    from attune.tests.families import CONFIGS

    for second in (False, True):
        extra = {"global_modulation": True, "mlp_silu_act": True, "qkv_bias": False} if second else {}
        config = CONFIGS["flux"][0]({**CONFIGS["flux"][1], **extra})
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "", device="cpu").diffusion_model
        if second:
            with pytest.raises(ValueError, match=r"FLUX\.1, not with FLUX\.2"):
                family(model)
        else:
            assert family(model) == "flux"
