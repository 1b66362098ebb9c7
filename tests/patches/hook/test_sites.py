"""Names of attention sites, and the grammar that selects heads."""

from inspect import signature

import pytest
import torch
from comfy.ldm.hunyuan_video.model import HunyuanVideoParams

from attune.patches.hook.families import FAMILIES, family
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
    **dict.fromkeys(("flux", "flux2", "chroma"), ("double.0 double.1 single.0 single.1 single.2", ("joint",), 4)),
    **dict.fromkeys(("qwen_image", "qwen_image21", "lumina2", "z_image", "krea2"), ("joint.0 joint.1 joint.2", ("joint",), 4)),
    **dict.fromkeys(("wan", "cosmos_predict2", "anima"), ("block.0 block.1 block.2", ("self", "cross"), 4)),
}


@pytest.mark.parametrize("name", [name for name in EXPECTED if name in families.EVERY])
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
    """HunyuanVideo has double and single blocks too, but three sides to a patch; Chroma Radiance draws pixels, Ovis has no pooled text."""
    from comfy.ldm.chroma_radiance.model import ChromaRadiance
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
    absent |= {name: False for name in ("meanflow_sum",) if name in signature(HunyuanVideoParams).parameters}
    video = HunyuanVideo(
        image_model="hunyuan_video", patch_size=[1, 2, 2], vec_in_dim=16, guidance_embed=False, **absent, **small
    )
    pixels = type("ChromaRadiance", (type(families.shared("chroma").model.diffusion_model),), {})
    assert ChromaRadiance.__name__ == pixels.__name__
    like_chroma = object.__new__(pixels)
    like_chroma.__dict__ = families.shared("chroma").model.diffusion_model.__dict__
    ovis = families.build("flux", vec_in_dim=None).model.diffusion_model
    for model in (video, like_chroma, ovis):
        with pytest.raises(ValueError, match=f"does not know the model class {type(model).__name__}"):
            family(model)


@pytest.mark.parametrize("name", families.EVERY)
def test_every_model_is_of_one_family_only(name):
    model = families.shared(name).model.diffusion_model
    fitting = [kind.name for kind in FAMILIES if kind.fits(model)]
    if name == "z_image":  # ComfyUI makes both of one class; the first that fits is taken
        assert fitting == ["z_image", "lumina2"]
    else:
        assert fitting == [{"sd15": "unet", "sdxl": "unet", "sd35": "sd3"}.get(name, name)]
