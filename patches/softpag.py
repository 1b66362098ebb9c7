"""SoftPAG on ComfyUI models: a perturbed pass beside the conditional one, and guidance away from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..methods.softpag import guide, soften
from .hook import prefix_cache
from .hook.blends import ChosenHeads
from .hook.call import AttentionCall
from .hook.install import ModelPatcher, install, model_sites
from .hook.requests import ALL, BlendOutputs, Request, Span
from .hook.run import ExtraForward, with_extra_forward
from .hook.sites import Heads, Site, check, select

AUTOMATIC = -1.0  # of a scale or a perturbation: what is usual for the model's family
_SCALES = {"unet": 3.0, "sd3": 3.0, "flux": 8.0}  # section D.1 of the paper; a UNet's is PAG's
_PERTURBATIONS = {"unet": 1.0, "sd3": 0.5, "flux": 0.5}  # figure 11; a UNet's is PAG's


def scale_of(family: str, scale: float) -> float:
    """The scale itself, or the family's own for a negative one."""
    return _SCALES[family] if scale < 0 else scale


def perturbation_of(family: str, perturbation: float) -> float:
    """The perturbation itself, or the family's own for a negative one."""
    return _PERTURBATIONS[family] if perturbation < 0 else perturbation


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


def recording(
    model_options: Mapping[str, Any], span: Span, perturbations: Sequence[Perturbation], sites: tuple[Site, ...]
) -> dict[str, Any]:
    """A copy of a sampler's model options under which the conditional pass remembers what `perturbed_rows` need not compute again."""
    transformer = dict(model_options.get("transformer_options", {}))
    blocks = dict.fromkeys(_first(p, sites).block for p in perturbations)
    known = transformer.get(prefix_cache.PREFIXES, ())
    transformer[prefix_cache.PREFIXES] = (*known, *((span, block) for block in blocks))
    return {**model_options, "transformer_options": transformer}


def perturbed_rows(
    model: Any,
    cond: list[dict[str, Any]],
    x: Tensor,
    sigma: Tensor,
    model_options: dict[str, Any],
    perturbations: Sequence[Perturbation],
    sites: tuple[Site, ...],
    recorded: tuple[int, ...],
) -> Tensor:
    """The conditional prediction of rows that are perturbed each in its own way, in as few forwards as there are first blocks.

    Args:
        cond: conditionings as samplers have them, for a whole number of repetitions.
        x: inputs ``[perturbations · pictures, c, H, W]``, perturbation by perturbation, with their noise levels ``sigma``.
        recorded: the row of the conditional pass that each row begins as (see `recording`).

    Returns:
        denoised predictions, of the shape of ``x``.
    """
    pictures = len(x) // len(perturbations)
    together: dict[tuple[str, int], list[int]] = {}
    for number, perturbation in enumerate(perturbations):
        together.setdefault(_first(perturbation, sites).block, []).append(number)
    out = torch.empty_like(x)
    for block, members in together.items():
        where = [number * pictures + j for number in members for j in range(pictures)]
        requests = _requests([perturbations[number] for number in members], pictures, {site.name: site for site in sites})
        source = tuple(recorded[row] for row in where)
        same = None if source == tuple(range(len(x))) else source  # spares a wait for the device
        options = with_extra_forward(model_options, ExtraForward(requests, block, same))
        (denoised,) = comfy.samplers.calc_cond_batch(model, [cond], x[where], sigma[where], options)
        out[where] = denoised
    return out


def perturbed_predictions(
    args: Mapping[str, Any], perturbations: Sequence[Perturbation], sites: tuple[Site, ...]
) -> list[Tensor]:
    """The conditional prediction of the same pictures under each of several perturbations.

    Args:
        args: what ComfyUI hands to a post-CFG function (``model``, ``cond``, ``input``, ``sigma``, ``model_options``).
        perturbations: one prediction each; those with the same first block run as rows of one batch.
        sites: the model's sites.

    Returns:
        denoised predictions, each of the shape of ``args["input"]``.
    """
    x, count = args["input"], len(perturbations)
    found = perturbed_rows(
        model=args["model"],
        cond=args["cond"],
        x=x.repeat(count, *[1] * (x.ndim - 1)),
        sigma=args["sigma"].repeat(count),
        model_options=args["model_options"],
        perturbations=perturbations,
        sites=sites,
        recorded=tuple(range(len(x))) * count,
    )
    return list(found.split(len(x)))


def _first(perturbation: Perturbation, sites: tuple[Site, ...]) -> Site:
    """The first perturbed site."""
    return next(site for site in sites if site.name in perturbation.heads)


def _requests(perturbations: Sequence[Perturbation], pictures: int, sites: Mapping[str, Site]) -> tuple[Request, ...]:
    """Every perturbation's heads for its own rows; those that do the same to the same heads of a site share a request."""
    rows: dict[tuple[str, tuple[int, ...], Any], list[int]] = {}
    for number, perturbation in enumerate(perturbations):
        own = range(number * pictures, (number + 1) * pictures)
        for name, heads in perturbation.heads.items():
            rows.setdefault((name, heads, perturbation.u), []).extend(own)

    def request(name: str, heads: tuple[int, ...], u: float, rows: tuple[int, ...] | str) -> Request:
        def blend(call: AttentionCall, heads: ChosenHeads) -> Tensor:
            return heads.v if u == 1 else soften(heads.out, heads.v, u)

        return BlendOutputs({(name, sites[name].kind): heads}, blend, rows=rows, ignores_output=u == 1)

    total = len(perturbations) * pictures
    return tuple(request(*what, tuple(of) if len(of) < total else ALL) for what, of in rows.items())


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
    patched.model_options = recording(patched.model_options, span, (one,), sites)

    def guidance(args: dict[str, Any]) -> Tensor:
        if not span.holds(args["sigma"], args["model"].model_sampling):
            return args["denoised"]
        (perturbed,) = perturbed_predictions(args, (one,), sites)
        return guide(args["denoised"], args["cond_denoised"], perturbed, scale, rescale)

    patched.set_model_sampler_post_cfg_function(guidance)
    return patched
