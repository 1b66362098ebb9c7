"""Detail++ on models that other nodes have patched: it works, and its gradients are right."""

from __future__ import annotations

import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras.nodes_freelunch import FreeU, FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance

from attune.methods import detail as maths
from attune.patches.detail import blending
from attune.patches.hook.install import model_sites
from attune.tests import families
from attune.tests.helpers import close, differs
from attune.tests.patches.detail.test_detail import branches, run
from attune.tests.patches.test_softpag import Residuals

RESIDUALS = {"output": [(1, 32, 8, 8), (1, 32, 8, 8), (1, 32, 4, 4), (1, 64, 4, 4)]}


def patched(name, model):
    if name == "FreeU":
        return FreeU().patch(model, 1.3, 1.4, 0.9, 0.2)[0]
    if name == "FreeU_V2":
        return FreeU_V2().patch(model, 1.3, 1.4, 0.9, 0.2)[0]
    if name == "HyperTile":
        return HyperTile.execute(model, 32, 2, 1, False)[0]
    if name == "SelfAttentionGuidance":
        return SelfAttentionGuidance.execute(model, 0.5, 2.0).args[0]
    if name == "PatchModelAddDownscale":
        return PatchModelAddDownscale.execute(model, 1, 2.0, 0.0, 0.6, True, "bicubic", "bicubic").args[0]
    return model


@pytest.mark.parametrize(
    "name", ["FreeU", "FreeU_V2", "HyperTile", "SelfAttentionGuidance", "PatchModelAddDownscale", "ControlNet"]
)
@pytest.mark.parametrize("count", [3, 4])
def test_other_nodes(name, count):
    """In one batch as in parts, with the optimisation; and they do what they do."""
    model = families.build("sd15")
    options = {"control": Residuals(RESIDUALS)} if name == "ControlNet" else {}
    settings = {"size": (8, 8), "steps": 3, "share_until": 0.7, "optimize": "entropy + centroid", "step_size": 0.1}
    positive = branches((7,) * count, **options)
    for optimize in ("off", "entropy + centroid"):
        settings["optimize"] = optimize
        ours, masks = run(patched(name, model), positive, **settings)
        assert ours.isfinite().all()
        differs(ours, run(model, branches((7,) * count), **settings)[0])
        close(run(patched(name, model), positive, branches_at_once=2, **settings)[0], ours, 1e-3)
        assert torch.equal(run(patched(name, model), positive, branches_at_once=2, **settings)[1], masks)
    assert torch.equal(run(model, branches(), steps=2)[0], run(families.build("sd15"), branches(), steps=2)[0])


@torch.no_grad()
def test_another_packs_pass_does_not_change_exclusive_masks():
    """Core's own perturbed pass runs the same prompt again in every step."""
    model = families.build("sd15")
    settings = {"size": (6, 8), "steps": 3, "share_until": 1.0, "masks": "exclusive", "mask_threshold": 0.3}
    right = run(model, branches(), **settings)
    again = PerturbedAttentionGuidance.execute(model, 1e-7).args[0]
    for parts in (0, 2):
        ours = run(again, branches(), branches_at_once=parts, **settings)
        assert torch.equal(ours[1], right[1])
        close(ours[0], right[0], 1e-3)


def slow_losses(model, x, sigma, context, control):
    """As other nodes see the model: softmax written out, without gradients."""
    sites = {s.name: s for s in model_sites(model)[1]}
    maps = []

    def override(func, q, k, v, heads, *rest, **kwargs):
        extra = kwargs["transformer_options"]
        site = sites["{}.{}.{}".format(*extra["block"], extra["block_index"])]
        if k.shape[1] == context.shape[1] and site.stride == 1:
            q_, k_ = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k))
            weights = (q_ @ k_.transpose(-1, -2) / q_.shape[-1] ** 0.5).softmax(-1).mean(1)
            maps.append(weights[..., 1:6].unflatten(1, tuple(extra["activations_shape"][-2:])))
        return optimized_attention(q, k, v, heads)

    options = {**model.model_options.get("transformer_options", {}), "optimized_attention_override": override}
    residuals = None if control is None else control.get_control(x)
    model.model.apply_model(x, sigma, c_crossattn=context, control=residuals, transformer_options=options)
    return maths.objective(maths.subject_maps(torch.stack(maps).mean(0), [(1, 2), (3,)]))


@pytest.mark.parametrize("name", ["FreeU", "FreeU_V2", "ControlNet"])
def test_gradients_through_nodes_that_write_in_place(name, monkeypatch):
    """The slope of the loss along the gradient, by differences on the model as these nodes leave it."""
    model = patched(name, families.build("sd15"))
    control = Residuals(RESIDUALS) if name == "ControlNet" else None
    positive = branches((7, 7, 7, 7), **({} if control is None else {"control": control}))
    found = []
    whole = blending.gradient
    monkeypatch.setattr(blending, "gradient", lambda *a: (found.append((a[3][:1].clone(), a[4][:1], g := whole(*a))), g)[1])
    with torch.inference_mode():
        run(model, positive, size=(8, 8), steps=2, optimize="entropy + centroid", optimize_steps=1, step_size=0.1)
    x, sigma, (loss, slope) = found[0]
    context = positive[0][0]
    with torch.no_grad():
        close(loss, slow_losses(model, x, sigma, context, control), 1e-4)
        direction, e = slope / slope.norm(), 1e-2
        up, down = (slow_losses(model, x + s * e * direction, sigma, context, control).sum() for s in (1, -1))
    assert ((up - down) / (2 * e)).item() == pytest.approx(slope.norm().item(), rel=0.2)
