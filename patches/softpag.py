"""SoftPAG on ComfyUI models: a perturbed pass beside the conditional one, and guidance away from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..methods.softpag import ALL, PATHS, TARGETS, TEXT, TOKENS, Tokens, guide, perturb, rows_of
from .hook import prefix_cache
from .hook.blends import ChosenHeads
from .hook.call import AttentionCall
from .hook.effects import Effect, watch
from .hook.install import ModelPatcher, install, model_family, model_sites
from .hook.requests import ALL as EVERY_ROW
from .hook.requests import BlendOutputs, Request, Span
from .hook.run import RUN, ExtraForward, SamplingRun, with_extra_forward
from .hook.sites import Heads, Site, check, joint, select
from .hook.tensors import index_or_slice
from .observer import NOBODY, Observer

AUTOMATIC = -1.0  # of a scale or a perturbation: what is usual for the model's family
_SCALES = {"flux": 8.0}  # section D.1 of the paper, FLUX.1's
_SCALE = 3.0  # SD3's there, and a UNet's by PAG; the paper has no other families
_PERTURBATIONS = {"unet": 1.0}  # PAG's
_PERTURBATION = 0.5  # figure 11, SD3's
_DEPTH = (9 + 0.5) / 24  # layer 9 of SD3 medium's 24, one of its four best and the one of figures 9 and 14


@dataclass(frozen=True)
class Settings:
    """SoftPAG's numbers and choices, as its node has them (see `perturb`)."""

    scale: float = AUTOMATIC
    perturbation: float = AUTOMATIC
    start_percent: float = 0.0
    end_percent: float = 1.0
    rescale: float = 0.0
    tokens: str = ALL
    target: str = "identity"
    temperature: float = 0.5
    path: str = "linear"
    scale_2: float = AUTOMATIC


@dataclass(frozen=True)
class Perturbation:
    """Heads to perturb, per site, and how: ``u`` in (0, 1] along a path to a target, for rows of some tokens."""

    heads: Mapping[str, tuple[int, ...]]
    u: float
    tokens: str = Settings.tokens
    target: str = Settings.target
    path: str = Settings.path
    temperature: float = Settings.temperature


def scale_of(family: str, scale: float) -> float:
    """The scale itself, or the family's own for a negative one."""
    return _SCALES.get(family, _SCALE) if scale < 0 else scale


def perturbation_of(family: str, perturbation: float) -> float:
    """The perturbation itself, or the family's own for a negative one."""
    return _PERTURBATIONS.get(family, _PERTURBATION) if perturbation < 0 else perturbation


def default_heads(family: str, sites: tuple[Site, ...]) -> Heads:
    """Where to perturb: a UNet's middle block, as PAG does; a transformer's layer at the depth of SD3 medium's layer 9.

    For FLUX the paper has no comparison of layers: its heads of quality are in early and middle layers, as SD3's (figure 22), so the same
    depth is an analogy; for families that the paper does not have, it is no more than that.
    """
    if family == "unet":
        names = [s.name for s in sites if s.name.startswith("middle.")]
        if not names:  # SSD-1B and the like have no attention in the middle
            names = [s.name for s in sites if s.name.startswith("input.")][-1:]
        return select(" ".join(names), sites, family)
    return select(sites[int(len(sites) * _DEPTH)].name, sites, family)


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
    given: Tensor | None = None,
) -> Tensor:
    """The conditional prediction of rows that are perturbed each in its own way, in as few forwards as there are first blocks.

    Args:
        cond: conditionings as samplers have them, for a whole number of repetitions.
        x: inputs ``[perturbations · pictures, c, H, W]``, perturbation by perturbation, with their noise levels ``sigma``.
        recorded: the row of the conditional pass that each row begins as (see `recording`).
        given: the sampler's input, if the conditional pass was of that.

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
        options = with_extra_forward(model_options, ExtraForward(requests, block, same, given))
        which = index_or_slice(where, x.device)
        (denoised,) = comfy.samplers.calc_cond_batch(model, [cond], x[which], sigma[which], options)
        out[which] = denoised
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
        given=x,
    )
    return list(found.split(len(x)))


def _first(perturbation: Perturbation, sites: tuple[Site, ...]) -> Site:
    """The first perturbed site."""
    return next(site for site in sites if site.name in perturbation.heads)


def _requests(perturbations: Sequence[Perturbation], pictures: int, sites: Mapping[str, Site]) -> tuple[Request, ...]:
    """Every perturbation's heads for its own rows; those that do the same to the same heads of a site share a request."""
    rows: dict[tuple[Any, ...], list[int]] = {}
    for number, p in enumerate(perturbations):
        own = range(number * pictures, (number + 1) * pictures)
        for name, heads in p.heads.items():
            rows.setdefault((name, heads, p.u, p.tokens, p.target, p.path, p.temperature), []).extend(own)
    total = len(perturbations) * pictures
    return tuple(
        _request(sites[name], heads, tuple(of) if len(of) < total else EVERY_ROW, *how)
        for (name, heads, *how), of in rows.items()
    )


def _request(
    site: Site,
    heads: tuple[int, ...],
    rows: tuple[int, ...] | str,
    u: float,
    tokens: str,
    target: str,
    path: str,
    temperature: float,
) -> Request:
    """What one perturbation asks of one site."""

    def blend(call: AttentionCall, chosen: ChosenHeads) -> Tensor:
        queries, values = chosen.q.shape[-2], chosen.v.shape[-2]
        if call.tokens.regrouped and queries != values:
            raise ValueError(
                f"SoftPAG: in {site.name} another node merges pixels (Token Merging), so that heads have no value of their own for each. Choose "
                "heads of other layers in Select Heads, or take that node out."
            )
        known = Tokens(queries, call.image, call.text)  # keys may be more: another pack's, at the end
        return perturb(chosen, known, tokens, u, target, path, temperature)

    whole = site.kind == "self" or rows_of(tokens, target) == ALL
    return BlendOutputs({(site.name, site.kind): heads}, blend, rows=rows, tokens=EVERY_ROW, ignores_output=u == 1 and whole)


def apply(
    model: ModelPatcher,
    scale: float = Settings.scale,
    perturbation: float = Settings.perturbation,
    start_percent: float = Settings.start_percent,
    end_percent: float = Settings.end_percent,
    rescale: float = Settings.rescale,
    heads: Heads | None = None,
    *,
    tokens: str = Settings.tokens,
    target: str = Settings.target,
    temperature: float = Settings.temperature,
    path: str = Settings.path,
    heads_2: Heads | None = None,
    scale_2: float = Settings.scale_2,
    observer: Observer = NOBODY,
) -> ModelPatcher:
    """A clone of ``model`` with SoftPAG on it; with scale or perturbation 0, just a clone.

    Args:
        scale, perturbation, scale_2: `AUTOMATIC` (or anything negative) is the model family's own.
        heads: None is `default_heads`; ``heads_2``, with ``scale_2``, are perturbed in a pass of their own, in the same way.
        observer: is told of runs without an effect.

    Raises:
        ValueError: when the heads belong to another model, the span is empty, the model family is unknown, or a choice is, or means
            nothing on this model.
    """
    span = Span.checked("SoftPAG", start_percent, end_percent)
    family, sites = model_sites(model)
    _check(sites, model_family(model).text_looks, tokens, target, path)
    u = perturbation_of(family, perturbation)
    sets = [(heads or default_heads(family, sites), scale_of(family, scale))]
    if heads_2 is not None:
        sets.append((heads_2, scale_of(family, scale_2)))
    passes = [(Perturbation(check(h, sites, family), u, tokens, target, path, temperature), s) for h, s in sets]
    passes = [(p, s) for p, s in passes if s != 0 and u != 0]
    patched = model.clone()
    if not passes:
        observer.effect(f"{'perturbation' if u == 0 else 'scale'} is 0, which is off")
        return patched
    install(patched)
    effect = Effect(span, observer.effect)
    watch(patched, effect)
    perturbations = tuple(p for p, _ in passes)
    patched.model_options = recording(patched.model_options, span, perturbations, sites)

    def guidance(args: dict[str, Any]) -> Tensor:
        denoised: Tensor = args["denoised"]
        run: SamplingRun | None = args["model_options"].get("transformer_options", {}).get(RUN)
        sigma, sampling = args["sigma"], args["model"].model_sampling
        if not (span.holds(sigma, sampling) if run is None else run.inside(span, sigma, sampling)):
            return denoised
        if run is not None:
            run.acted.add(effect)
        for weaker, (_, s) in zip(perturbed_predictions(args, perturbations, sites), passes, strict=True):
            denoised = guide(denoised, args["cond_denoised"], weaker, s, rescale)
        return denoised

    patched.set_model_sampler_post_cfg_function(guidance)
    return patched


def _check(sites: tuple[Site, ...], text_looks: bool, tokens: str, target: str, path: str) -> None:
    """Raises ValueError for choices that are unknown, or mean nothing on a model of this family."""
    for name, value, known in (("tokens", tokens, TOKENS), ("target", target, TARGETS), ("path", path, PATHS)):
        if value not in known:
            raise ValueError(f"SoftPAG: there is no {name} “{value}”; choose one of {', '.join(known)}.")
    if not joint(sites) and (tokens == TEXT or target == "mean text query" or "-" in target):
        raise ValueError(
            f"SoftPAG: tokens “{tokens}” with target “{target}” needs image and text tokens in one attention, as SD3, FLUX and "
            f"most later models have; on this "
            f"model set tokens to {ALL} and target to one without “text” and “-”."
        )
    if not text_looks and (tokens == TEXT or TARGETS[target] == TEXT):
        raise ValueError(
            f"SoftPAG: tokens “{tokens}” with target “{target}” is about what text looks at, and this model computes its text apart from the "
            f"image; set tokens to {ALL} and target to one that does not begin with “text” or “mean text”."
        )
    if rows_of(tokens, target) is None:
        raise ValueError(
            f"SoftPAG: the target “{target}” is about {TARGETS[target]} tokens, and tokens is set to {tokens}; set tokens to {ALL}."
        )
