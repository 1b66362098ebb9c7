"""SoftPAG on ComfyUI models: a perturbed pass beside the conditional one, and guidance away from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
from torch import Tensor

from ..methods import softpag as maths
from .hook import prefix_cache
from .hook.attention import AttentionCall, ExtraForward, ModelPatcher, Request, Span, install, model_sites, with_extra_forward
from .hook.sites import Heads, Site, check, select


@dataclass(frozen=True)
class Perturbation:
    """Heads to perturb, per site, and how far: ``u`` in [0, 1]."""

    heads: Mapping[str, tuple[int, ...]]
    u: float


def default_heads(family: str, sites: tuple[Site, ...]) -> Heads:
    """Where PAG is usually applied: a UNet's middle block; the layer after the middle of SD3's or of FLUX's double blocks."""
    if family == "unet":
        names = [s.name for s in sites if s.name.startswith("middle.")]
        if not names:  # SSD-1B and the like have no attention in the middle
            names = [s.name for s in sites if s.name.startswith("input.")][-1:]
        return select(" ".join(names), sites, family)
    first = [s for s in sites if s.name.startswith(("joint.", "double."))] or list(sites)
    return select(first[min(len(first) // 2 + 1, len(first) - 1)].name, sites, family)


def _request(perturbation: Perturbation, sites: Mapping[str, Site], chunk: int) -> Request:
    def act(call: AttentionCall, out: Tensor, value: Tensor) -> Tensor:
        return maths.soften(out, value, perturbation.u)

    return Request(
        "blend",
        {(name, sites[name].kind): heads for name, heads in perturbation.heads.items()},
        act,
        rows=chunk,
        ignores_output=perturbation.u == 1,
    )


def perturbed_predictions(
    args: Mapping[str, Any], perturbations: Sequence[Perturbation], sites: tuple[Site, ...]
) -> list[Tensor]:
    """The conditional prediction under each of several perturbations, in as few forwards as memory allows.

    Args:
        args: what ComfyUI hands to a post-CFG function (``model``, ``cond``, ``input``, ``sigma``, ``model_options``).
        perturbations: one prediction each; they run as rows of one batch, every row with its own heads.
        sites: the model's sites.

    Returns:
        denoised predictions, each of the shape of ``args["input"]``.
    """
    by_name = {site.name: site for site in sites}
    first = min((by_name[name] for p in perturbations for name in p.heads), key=lambda s: s.layer)
    requests = tuple(_request(p, by_name, i) for i, p in enumerate(perturbations))
    options = with_extra_forward(args["model_options"], ExtraForward(requests, first.block))
    conds = [args["cond"]] * len(perturbations)
    return comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], options)


def apply(
    model: ModelPatcher,
    scale: float,
    perturbation: float,
    start_percent: float,
    end_percent: float,
    rescale: float,
    heads: Heads | None = None,
) -> ModelPatcher:
    """A clone of ``model`` with SoftPAG on it; with scale or perturbation 0, just a clone.

    Raises:
        ValueError: when the heads belong to another model, the span is empty, or the model family is unknown.
    """
    span = Span.checked("SoftPAG", start_percent, end_percent)
    family, sites = model_sites(model)
    chosen = check(heads or default_heads(family, sites), sites, family)
    patched = model.clone()
    if scale == 0 or perturbation == 0:
        return patched
    install(patched)
    one = Perturbation(chosen, perturbation)
    first = next(s for s in sites if s.name in chosen)
    options = patched.model_options.setdefault("transformer_options", {})
    options[prefix_cache.PREFIXES] = (*options.get(prefix_cache.PREFIXES, ()), (span, first.block))

    def guidance(args: dict[str, Any]) -> Tensor:
        if not span.holds(args["sigma"], args["model"].model_sampling):
            return args["denoised"]
        (perturbed,) = perturbed_predictions(args, (one,), sites)
        return maths.guide(args["denoised"], args["cond_denoised"], perturbed, scale, rescale)

    patched.set_model_sampler_post_cfg_function(guidance)
    return patched
