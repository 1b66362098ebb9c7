"""Structure-aware refinement: the CRF in loops in float64, the minimum of its energy, its edges, its memory, and the node."""

import pytest
import torch

from attune.demo import model as demo_model
from attune.nodes.structure import AttuneStructureRefine
from attune.patches import structure
from attune.patches.maps import record as maps
from attune.patches.maps import recorder
from attune.tests.methods.test_structure import random_latent
from attune.tools.benchmarks.shared.pictures import generate


def test_regions_are_evened_out_and_their_contour_stays():
    clean = torch.zeros(1, 4, 24, 24)
    clean[:, :, :, 12:] = 2
    noisy = clean + 0.15 * random_latent(1, 4, 24, 24).float()
    out = structure.refine({"samples": noisy}, strength=4.0, iterations=20)["samples"]
    left, right = slice(0, 11), slice(13, 24)
    for side in (left, right):
        assert out[..., side].std() < 0.7 * noisy[..., side].std()
    assert (out[..., 12] - out[..., 11]).mean() > 0.95 * (noisy[..., 12] - noisy[..., 11]).mean()
    assert (out - clean).abs().mean() < 0.7 * (noisy - clean).abs().mean()


def test_off_is_the_latent_itself():
    given = {"samples": torch.randn(1, 4, 8, 8), "noise_mask": torch.ones(1, 64, 64)}
    assert structure.refine(given, strength=0) is given
    assert structure.refine(given, iterations=0) is given
    before = given["samples"].clone()
    out = structure.refine(given)
    assert out["noise_mask"] is given["noise_mask"] and not torch.equal(out["samples"], before)
    assert torch.equal(given["samples"], before)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 16, 9, 5), torch.float16), ((1, 4, 1, 1), torch.float32), ((2, 4, 2, 7), torch.bfloat16)]
)
def test_other_latents(shape, dtype):
    latent = torch.randn(*shape).to(dtype)
    out = structure.refine({"samples": latent})["samples"]
    assert out.dtype == dtype and out.shape == shape and out.isfinite().all()
    for i in range(len(latent)):  # a picture does not depend on its batch
        one = structure.refine({"samples": latent[i : i + 1]})["samples"]
        torch.testing.assert_close(one.float(), out[i : i + 1].float(), rtol=1e-2, atol=1e-3)


def test_bad_input_is_told():
    latent = {"samples": torch.randn(1, 4, 8, 8)}
    with pytest.raises(ValueError, match=r"edge_low \(1\) is above edge_high"):
        structure.refine(latent, edge_low=1.0, edge_high=0.5)
    with pytest.raises(ValueError, match="strength must not be below 0"):
        structure.refine(latent, strength=-1)
    with pytest.raises(ValueError, match="spatial_sigma must be above 0"):
        structure.refine(latent, spatial_sigma=0)
    with pytest.raises(ValueError, match="latents of pictures"):
        structure.refine({"samples": torch.randn(1, 16, 3, 8, 8)})
    with pytest.raises(ValueError, match="maps are of 2 pictures and the latent has 1"):
        structure.refine(latent, maps.Record((8, 8), 2))


def test_the_node_on_the_bundled_model():
    model, clip, vae = demo_model.load()
    schema = AttuneStructureRefine.define_schema()
    names = ["samples", "maps", "strength", "edge_low", "edge_high", "iterations", "spatial_sigma", "feature_sigma"]
    assert [i.id for i in schema.inputs] == names
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))
    defaults = {i.id: i.default for i in schema.inputs[2:]}
    patched, held = recorder.apply(model)
    text = ["a red star and a blue circle", "a green ring"]
    picture = generate(patched, clip, vae, text, 5.0, 1, 8)
    given = {"samples": vae.encode(picture)}
    (plain,) = AttuneStructureRefine.execute(given, **defaults).args
    (guided,) = AttuneStructureRefine.execute(given, **defaults, maps=held).args
    for out in (plain["samples"], guided["samples"]):
        assert out.isfinite().all() and out.shape == given["samples"].shape
        assert 0 < (out - given["samples"]).abs().mean() < 0.5 * given["samples"].std()
    assert not torch.equal(plain["samples"], guided["samples"])
    look = structure.attention(held.record(), (16, 16))
    assert look.shape == (2, 1, 16, 16) and look.amin() == 0 and look.amax() <= 1
    with pytest.raises(ValueError, match="of 2 pictures"):
        AttuneStructureRefine.execute({"samples": given["samples"][:1]}, **defaults, maps=held)
