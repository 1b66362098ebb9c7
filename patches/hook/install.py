"""Putting requests on a model, and carrying them out while it samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import comfy.patcher_extension
from torch import Tensor, nn

from . import effects, prefix_cache, texts
from .families import family, family_of, sites
from .families.base import Block, Family
from .forward import Forward
from .requests import BlendOutputs, ReadWeights, Request, Span
from .run import EXTRA, GIVEN, RUN, ExtraForward, SamplingRun
from .sites import Site
from .views import Around, through, view, with_blocks

KEY = "attune"  # of our wrappers
REQUESTS = "attune"  # in transformer_options
MINIMUM = "ComfyUI 0.3.75"

ModelPatcher: TypeAlias = Any  # comfy.model_patcher.ModelPatcher


def request(model: ModelPatcher, *requests: Request, tell: Callable[[str | None], None] | None = None) -> None:
    """Add requests to a model that is already this node's own clone.

    Args:
        tell: is told after each run why they had no effect, or None where one of them had (`Effect`); they have the same span.

    Raises:
        RuntimeError: when this ComfyUI is too old to carry the hook.
        ValueError: for a site, a kind of attention or a head that this model does not have.
    """
    _, known = model_sites(model)
    _check({site.name: site for site in known}, requests)
    install(model)
    options = model.model_options.setdefault("transformer_options", {})
    if tell is not None:
        effect = effects.Effect(requests[0].span, tell)
        effects.watch(model, effect)
        requests = tuple(replace(r, effect=effect) for r in requests)
    options[REQUESTS] = (*options.get(REQUESTS, ()), *requests)


def install(model: ModelPatcher) -> None:
    """Make a cloned model carry the hook (once, however many nodes ask).

    Raises:
        RuntimeError: when this ComfyUI is too old to carry the hook.
    """
    wrappers = comfy.patcher_extension.WrappersMP
    if not hasattr(wrappers, "PREDICT_NOISE") or not hasattr(model, "add_wrapper_with_key"):
        raise RuntimeError(f"Attune needs {MINIMUM} or newer: please update ComfyUI.")
    ours = (
        (wrappers.OUTER_SAMPLE, _outer_sample),
        (wrappers.PREDICT_NOISE, _predict_noise),
        (wrappers.CALC_COND_BATCH, _calc_cond_batch),
        (wrappers.APPLY_MODEL, _apply_model),
    )
    for kind, wrapper in ours:
        if not model.wrappers.get(kind, {}).get(KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)


def _check(sites: Mapping[str, Site], requests: Sequence[Request]) -> None:
    for (name, kind), heads in ((place, heads) for r in requests for place, heads in r.where.items()):
        if name not in sites:
            raise ValueError(f"there is no attention at “{name}” in this model; it has {', '.join(sites)}.")
        site = sites[name]
        if kind not in site.kinds:
            raise ValueError(f"there is no “{kind}” attention at {name} in this model; it has {', '.join(site.kinds)} there.")
        if heads is not None and any(not 0 <= n < site.heads for n in heads):
            raise ValueError(f"{name} has heads 0 to {site.heads - 1} in this model, not {max(heads)}.")


def model_family(model: ModelPatcher) -> Family:
    """What the hook knows of a MODEL's kind.

    Raises:
        ValueError: for a model that this pack has no sites for.
    """
    return family_of(model.get_model_object("diffusion_model"))


def model_sites(model: ModelPatcher) -> tuple[str, tuple[Site, ...]]:
    """Name of the family and sites of a MODEL.

    Raises:
        ValueError: for a model that this pack has no sites for.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    return family(diffusion_model), sites(diffusion_model)


# --- while sampling -------------------------------------------------------------------------------------------------


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE: give the run its state; the guider drops these options when the run ends, whatever ends it."""
    seed = kwargs.get("seed", args[7] if len(args) > 7 else None)
    run = SamplingRun(getattr(executor.class_obj, "conds", {}), seed=seed)
    if "middle" in run.conds:  # ComfyUI's numbers of roles mean something else there
        raise ValueError(
            "Attune's nodes do not work with DualCFGGuider, which guides by three prompts at once. Use CFGGuider or a KSampler, or connect the "
            "model from before them."
        )
    options = executor.class_obj.model_options.setdefault("transformer_options", {})
    effects.check(options, args[1] if len(args) > 1 else kwargs.get("latent_image"))
    options[RUN] = run
    if run.conds:
        run.texts = texts.join(run.conds, _texts(options.get(REQUESTS, ())))
    out = executor(*args, **kwargs)
    for publish in run.finished:
        publish()
    effects.tell(run, options)
    return out


def _texts(requests: Sequence[Request]) -> list[texts.OtherText]:
    """The texts that requests ask about."""
    return [r.text for r in requests if isinstance(r, BlendOutputs) and r.text is not None]


def _predict_noise(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """PREDICT_NOISE: count the sampler's calls of the guider, so that a run knows what belongs to one of them."""
    run: SamplingRun | None = executor.class_obj.model_options.get("transformer_options", {}).get(RUN)
    if run is not None:
        run.evaluation += 1
    return executor(*args, **kwargs)


def _calc_cond_batch(
    executor: Any, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> Any:
    """CALC_COND_BATCH: let forwards know the batch of pictures that their rows are of, where one may be replayed."""
    options = model_options.get("transformer_options", {})
    if options.get(prefix_cache.PREFIXES):
        model_options = {**model_options, "transformer_options": {**options, GIVEN: x_in}}
    return executor(model, conds, x_in, timestep, model_options)


def _apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """APPLY_MODEL: carry out what is asked of this forward, if anything is."""
    options = transformer_options or {}
    own: ExtraForward | None = options.get(EXTRA)
    base = executor.class_obj
    given = [r for r in options.get(REQUESTS, ()) if not (own and isinstance(r, ReadWeights))]
    run: SamplingRun | None = options.get(RUN)

    def holds(span: Span) -> bool:
        return span.holds(t, base.model_sampling) if run is None else run.inside(span, t, base.model_sampling)

    asked = [r for r in given if holds(r.span)]
    asked += own.requests if own else ()
    prefixes = () if own else prefix_cache.wanted(options, holds)
    if not asked and own is None and not prefixes:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    options = options.copy()
    family = family_of(getattr(base.diffusion_model, "_orig_mod", base.diffusion_model))  # not compiled
    if own:
        options.update(family.for_own_forwards)
    first_times = () if run is None or own else run.first_times(options)
    blocks: dict[Block, nn.Module] = {}
    others = texts.attending(family, _texts(asked), run, texts.Inputs(executor.original, base, x, t, c_concat, options, kwargs))
    if not family.replays or (others and family.runs_text):
        pass  # another text has to run through every block, so nothing is replayed
    elif run is not None and own is not None and own.replay_before is not None:
        blocks = run.prefixes.stand_ins(family, own.replay_before, x, options, own.rows, run.given(own.given))
    elif run is not None and prefixes:
        blocks = run.prefixes.recorders(family, prefixes, x, options, first_times, run.given(options.get(GIVEN)))
    around = family.locate(Forward(family, asked, x, c_crossattn, options, first_times, others)) if asked else {}
    for block, act in around.items():
        if own is None or block not in blocks:  # a block that is replayed attends to nothing
            blocks[block] = Around(blocks.get(block, family.block(block)), act)
    if not blocks:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    model = with_blocks(family.model, family.attributes, blocks)
    go_on = through(executor, view(base, {"diffusion_model": model}))
    if go_on is None and not around:  # only a prefix to record or to replay, which spares time and changes nothing
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    if go_on is not None:
        out = go_on(x, t, c_concat, c_crossattn, control, options, **kwargs)
        if not around or not model.attune_read.isdisjoint(family.attributes):
            return out
    raise RuntimeError(texts.NOT_FOUND)
