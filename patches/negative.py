"""Negative prompts by normalised attention guidance on ComfyUI models, with or without CFG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..methods.negative import away
from .hook.blends import ChosenHeads
from .hook.call import AttentionCall
from .hook.install import ModelPatcher, model_sites, request
from .hook.requests import COND, BlendOutputs, Span
from .hook.texts import OtherText
from .observer import NOBODY, Observer
from .softpag import AUTOMATIC

METHOD = "Negative Prompt at cfg 1"
# Scale, tau and alpha of the authors' code for ComfyUI and its workflows of models that need no CFG, where they have one: FLUX, SD3.5-Turbo and
# Chroma, and Wan in 4 steps. For UNets its usual scale with its workflows' alpha (DMD2 there has scale 3, SD1.5 with CFG has 5).
_STRENGTHS = {"unet": (5.0, 2.5, 0.5), "wan": (11.0, 3.5, 0.5)}
_USUAL = (5.0, 2.5, 0.25)
_OF_ITS_OWN = {
    "area": "an area",
    "mask": "a mask",
    "control": "a ControlNet",
    "hooks": "hooks",
    "gligen": "GLIGEN boxes",
    "timestep_start": "a part of sampling",
    "start_percent": "a part of sampling",
}


@dataclass(frozen=True)
class Settings:
    """The node's numbers (see `away`)."""

    scale: float = AUTOMATIC
    tau: float = AUTOMATIC
    alpha: float = AUTOMATIC
    start_percent: float = 0.0
    end_percent: float = 1.0


def strengths(family: str, scale: float, tau: float, alpha: float) -> tuple[float, float, float]:
    """Scale, tau and alpha themselves, or the family's own for negative ones."""
    usual = _STRENGTHS.get(family, _USUAL)
    own = [u if given < 0 else given for given, u in zip((scale, tau, alpha), usual, strict=True)]
    return own[0], own[1], own[2]


def apply(
    model: ModelPatcher,
    negative: list[Any],
    scale: float = Settings.scale,
    tau: float = Settings.tau,
    alpha: float = Settings.alpha,
    start_percent: float = Settings.start_percent,
    end_percent: float = Settings.end_percent,
    observer: Observer = NOBODY,
) -> ModelPatcher:
    """A clone of ``model`` whose conditional prediction keeps away from a negative text; with scale 1 or alpha 0, just a clone.

    Acts wherever the picture attends to text: in cross-attention, or on the image tokens of joint attention.

    Args:
        observer: is told of runs without an effect.

    Raises:
        ValueError: for a negative of several prompts or with an area or the like of its own, a tau below 1, an empty span, or an unknown model.
    """
    span = Span.checked(METHOD, start_percent, end_percent)
    family, sites = model_sites(model)
    scale, tau, alpha = strengths(family, scale, tau, alpha)
    if tau < 1:
        raise ValueError(f"{METHOD}: tau is {tau:g}; set it to 1 or more, or to -1 for the model's own.")
    text = OtherText(METHOD, _checked(negative))
    where = {(s.name, kind): None for s in sites for kind in s.kinds if kind in ("cross", "joint")}
    patched = model.clone()
    if scale == 1 or alpha == 0:
        observer.effect("scale is 1, which is off" if scale == 1 else "alpha is 0, which is off")
        return patched
    if not where:
        raise ValueError(
            f"{METHOD}: nothing in this model attends to text, so a negative prompt has no effect; take the node out."
        )

    def blend(call: AttentionCall, heads: ChosenHeads) -> Tensor:
        other = heads.with_text(text)
        if not heads.replaced:
            return away(heads.out, other, scale, tau, alpha)
        own = heads.attend()  # what an IP-Adapter adds stays as it is
        return heads.out + away(own, other, scale, tau, alpha) - own

    request(patched, BlendOutputs(where, blend, rows=COND, span=span, text=text), tell=observer.effect)
    return patched


def _checked(negative: list[Any]) -> list[Any]:
    if len(negative) != 1:
        raise ValueError(
            f"{METHOD}: the negative holds {len(negative)} prompts (Conditioning Combine); connect one CLIP Text Encode, or join the texts."
        )
    more = [said for name, said in _OF_ITS_OWN.items() if negative[0][1].get(name) is not None]
    if more:
        raise ValueError(
            f"{METHOD}: the negative has {more[0]} of its own, which has no effect here; connect the text alone, and use start_percent and "
            "end_percent for a part of sampling."
        )
    return negative
