"""Putting requests on a model, and carrying them out while it samples."""

from __future__ import annotations

import contextlib
from typing import Any, TypeAlias

import comfy.patcher_extension
from torch import Tensor

from . import prefix_cache
from .families import family, sites
from .forward import Forward
from .requests import ReadWeights, Request
from .run import EXTRA, RUN, ExtraForward, SamplingRun
from .sites import Site

KEY = "attune"  # of our wrappers
REQUESTS = "attune"  # in transformer_options
MINIMUM = "ComfyUI 0.3.60"

ModelPatcher: TypeAlias = Any  # comfy.model_patcher.ModelPatcher


def request(model: ModelPatcher, *requests: Request) -> None:
    """Add requests to a model that is already this node's own clone.

    Raises:
        RuntimeError: when this ComfyUI is too old to carry the hook.
    """
    install(model)
    options = model.model_options.setdefault("transformer_options", {})
    options[REQUESTS] = (*options.get(REQUESTS, ()), *requests)


def install(model: ModelPatcher) -> None:
    """Make a cloned model carry the hook (once, however many nodes ask).

    Raises:
        RuntimeError: when this ComfyUI is too old to carry the hook.
    """
    wrappers = comfy.patcher_extension.WrappersMP
    if not hasattr(wrappers, "APPLY_MODEL") or not hasattr(model, "add_wrapper_with_key"):
        raise RuntimeError(f"Attune needs {MINIMUM} or newer: please update ComfyUI.")
    for kind, wrapper in ((wrappers.OUTER_SAMPLE, _outer_sample), (wrappers.APPLY_MODEL, _apply_model)):
        if not model.wrappers.get(kind, {}).get(KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)


def model_sites(model: ModelPatcher) -> tuple[str, tuple[Site, ...]]:
    """Family and sites of a MODEL.

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
    executor.class_obj.model_options.setdefault("transformer_options", {})[RUN] = run
    out = executor(*args, **kwargs)
    for publish in run.finished:
        publish()
    return out


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
    asked = [r for r in given if r.span.holds(t, base.model_sampling)]
    asked += own.requests if own else ()
    run: SamplingRun | None = options.get(RUN)
    prefixes = () if own else prefix_cache.wanted(options, t, base.model_sampling)
    if not asked and own is None and not prefixes:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    options = options.copy()
    with contextlib.ExitStack() as stack:
        if asked:
            stack.enter_context(Forward(base.diffusion_model, asked, x, c_crossattn, options).installed())
        if run is not None and prefixes:
            stack.enter_context(run.prefixes.record(base.diffusion_model, prefixes, x, options))
        if run is not None and own is not None and own.replay_before is not None:
            stack.enter_context(run.prefixes.replay(base.diffusion_model, own.replay_before, x, options, own.rows))
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
