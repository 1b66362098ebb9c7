"""Packs that merge the pixels of a self-attention call, or cut the picture into tiles that are rows of their own."""

import pytest
import torch
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_tomesd import TomePatchModel

from attune.patches import softpag
from attune.patches.hook.install import install, model_sites, request
from attune.patches.hook.requests import ReadWeights
from attune.patches.softpag import Perturbation, perturbed_predictions
from attune.tests import families

FIRST = "input.1.0"


def tiled(model):
    return HyperTile.EXECUTE_NORMALIZED(model, tile_size=32, swap_size=1, max_depth=1, scale_depth=False).args[0]


def test_perturbed_pictures_are_told_apart_where_each_is_several_tiles():
    model = tiled(families.shared("sd15")).clone()
    install(model)
    _, sites = model_sites(model)
    different = (Perturbation({FIRST: (0,)}, 1.0), Perturbation({FIRST: (1, 2)}, 1.0))
    found = []

    def compare(args):
        together = perturbed_predictions(args, different, sites)
        alone = [perturbed_predictions(args, (p,), sites)[0] for p in different]
        found.append((together, alone))
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(compare)
    families.sample(model, batch=2, steps=1)
    ((together, alone),) = found
    assert not torch.allclose(*alone, atol=1e-3)
    for mine, own in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, own, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("patch", [tiled, lambda model: TomePatchModel.EXECUTE_NORMALIZED(model, 0.3).args[0]])
def test_maps_that_are_not_the_pictures_are_not_read(patch):
    model = patch(families.shared("sd15")).clone()
    seen = []
    where = {(FIRST, "self"): None, ("middle.0.0", "self"): None}
    request(model, ReadWeights(where, lambda call, weights: seen.append((call.site.name, weights.shape[-1]))))
    families.sample(model, steps=1)
    assert {name for name, _ in seen} == {"middle.0.0"}
    assert all(size == 16 for _, size in seen)


def test_softpag_says_where_pixels_are_merged():
    model = TomePatchModel.EXECUTE_NORMALIZED(families.shared("sd15"), 0.3).args[0]
    with pytest.raises(ValueError, match=rf"{FIRST} another node merges pixels .* Choose heads of other layers"):
        families.sample(softpag.apply(model, heads=families.heads_of(model, f"{FIRST}:0")))
