"""Detail++ on ComfyUI models: all branches of a prompt in one batch, sharing a layout, each painting inside its subject's region."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ..hook.install import ModelPatcher, install, model_sites
from ..observer import NOBODY, Observer
from ..prompts import refuse
from ..samplers import SAMPLERS, needs
from .blending import with_branches
from .branches import BRANCH, BRANCHES, ReadPlan, merged, sets_of_branches, tiled, tiled_conditioning
from .guider import Guider
from .session import OPTIMIZE, Session, Settings, mask_sites, share_sites

SUPPORTED = tuple(name for name, sampler in SAMPLERS.items() if sampler.linear and name in comfy.samplers.KSampler.SAMPLERS)
PIXELS = 8  # per latent pixel
FAMILIES = ("unet", "wan", "cosmos_predict2")  # the image attends to itself apart from the text
FUSED = "comfy_kitchen"  # newer ComfyUI's kernels, which transformers rotate by and which have no gradient


def check(sampler_name: str, settings: Settings, family: str = "unet", frames: int = 1) -> None:
    """Refuse what cannot be done.

    Raises:
        ValueError: with what can.
    """
    if family == "anima":
        raise ValueError(
            "Detail++ Sampler does not work with Anima, whose text is adapted inside the model, one prompt at a time. It works with SD1.5, SD2, "
            "SDXL, Wan and Cosmos Predict 2."
        )
    if family not in FAMILIES:
        raise ValueError(
            "Detail++ Sampler works with SD1.5, SD2, SDXL, Wan and Cosmos Predict 2. SD3, FLUX and the like have no self-attention apart from "
            "the text's, whose map the branches could share; use one of those models."
        )
    if frames > 1:
        raise ValueError(f"Detail++ Sampler makes pictures, and this latent has {frames} frames; make one of them.")
    if family != "unet" and settings.optimize != OPTIMIZE[0] and importlib.util.find_spec(FUSED) is not None:
        raise ValueError(
            "Detail++ Sampler: with this version of ComfyUI there is no gradient through this model, which the optimisation follows; set "
            "optimize to off."
        )
    because = "keeps a history of its own from step to step, which branches cannot share"
    needs(sampler_name, "Detail++ Sampler", among=SUPPORTED, because=because)
    settings.check()


def sample(
    model: ModelPatcher,
    positive: Sequence[Any],
    negative: Sequence[Any],
    latent: Mapping[str, Any],
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float = 1.0,
    settings: Settings | None = None,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
    disable_pbar: bool = False,
    observer: Observer = NOBODY,
) -> tuple[Tensor, Tensor]:
    """Sample all branches (algorithm 1). They have the same noise, so that the ``n + 1`` rows of a picture differ by their prompts only.

    Args:
        positive: a conditioning with branches; others beside them are for all branches.
        callback: as KSampler's; it is shown the last branch.
        observer: is shown the masks while they form.

    Returns:
        All branches' latents ``[(n + 1)·B, c, H, W]``, branch by branch, the last being the result; and the subjects' final masks
        ``[subjects' branches · B, 8H, 8W]`` (all ones where nothing was shared).

    Raises:
        ValueError: for a model, sampler or conditioning that does not fit.
    """
    settings = settings or Settings()
    family, sites = model_sites(model)
    frames = latent["samples"].shape[2] if latent["samples"].ndim == 5 else 1
    check(sampler_name, settings, family, frames)
    read_at = mask_sites(sites, family)
    sets = sets_of_branches(positive)
    count = len(sets[0])
    image = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    pictures, size = image.shape[0], (image.shape[-2], image.shape[-1])
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    mask = latent.get("noise_mask")
    shown = None if callback is None else lambda i, x0, x, n: callback(i, x0[-pictures:], x[-pictures:], n)
    if count == 1:
        observer.effect("the prompt has no details that were taken apart, so that it is sampled as it is")
        out = comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler_name,
            scheduler,
            list(positive),
            negative,
            image,
            denoise=denoise,
            noise_mask=mask,
            callback=shown,
            disable_pbar=disable_pbar,
            seed=seed,
        )
        return out, _pictures(torch.ones(pictures, 1, *size))

    refuse(model, "Detail++ Sampler")
    plan = comfy.samplers.KSampler(model, steps, model.load_device, sampler_name, scheduler, denoise, model.model_options)
    sigmas = plan.sigmas
    made = [merged(branches, pictures) for branches in sets]
    others = tiled_conditioning([e for e in positive if BRANCH not in e[1]], pictures, count)
    session = Session(
        settings,
        count,
        pictures,
        latent=size,
        shared=int(settings.share_until * (len(sigmas) - 1) + 0.5),
        read_at=read_at,
        share_at=share_sites(sites, size, settings.share_max_tokens, auto=read_at[0].stride),
        names={b.index: b.name or f"branch {b.index}" for b, _ in made[0][1][BRANCHES] if b.subjects},
        observer=observer,
    )
    patched = model.clone()
    install(patched)
    guider = Guider(patched, session)
    guider.set_conds([*made, *others], tiled_conditioning(negative, pictures, count))
    guider.set_cfg(cfg)
    session.prompts = guider.prompts([ReadPlan.of(m, settings.where) for m in made])
    session.negative = frozenset(cond["uuid"] for cond in guider.original_conds["negative"])
    if mask is not None:
        mask = tiled(mask.reshape(-1, 1, *mask.shape[-2:]), pictures, count)
    sampler = with_branches(comfy.samplers.sampler_object(sampler_name), sampler_name, session, guider)
    out = guider.sample(
        *(t.repeat(count, *[1] * (t.ndim - 1)) for t in (noise, image)), sampler, sigmas, mask, shown, disable_pbar, seed
    )
    masks = torch.ones(count - 1, pictures, 1, *size, dtype=torch.bool) if session.masks is None else session.masks
    subjects = [i for i in range(1, count) if any(p.subjects[i] for p in session.prompts.values())]
    chosen = masks[[i - 1 for i in subjects]] if subjects else torch.ones(1, pictures, 1, *size)
    none = f"share_until {settings.share_until:g} of {len(sigmas) - 1} steps is no step; raise it"
    observer.effect(None if session.shared else none)
    return out.to(comfy.model_management.intermediate_device()), _pictures(chosen.flatten(0, 1).float().cpu())


def _pictures(masks: Tensor) -> Tensor:
    """Masks ``[N, 1, H, W]`` of latent pixels as ComfyUI's MASK."""
    return masks[:, 0].repeat_interleave(PIXELS, dim=1).repeat_interleave(PIXELS, dim=2)
