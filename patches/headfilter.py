"""Head filter on ComfyUI models: one blend that writes over the heads that were not chosen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..methods import headfilter as maths
from .hook.blends import ChosenHeads
from .hook.call import AttentionCall
from .hook.install import ModelPatcher, model_sites, request
from .hook.requests import BlendOutputs
from .hook.sites import Heads, check, joint
from .observer import NOBODY, Observer

METHOD = "Head Filter"
SELF, CROSS, BOTH = KINDS = ("self", "cross", "both")
OTHERS = maths.OTHERS


@dataclass(frozen=True)
class Settings:
    """What a node may choose: which attention of the layers, and what the silenced heads say."""

    kind: str = CROSS
    others: str = maths.ZERO


DEFAULTS = Settings()


def apply(
    model: ModelPatcher, heads: Heads, kind: str = DEFAULTS.kind, others: str = DEFAULTS.others, observer: Observer = NOBODY
) -> ModelPatcher:
    """A clone of ``model`` in which, of the layers in ``heads``, only those heads speak, for every row of the batch.

    Where all heads of a layer are chosen, and in layers that are not named, nothing changes. In joint attention it is the image tokens'
    rows that are filtered, and uniform attention is over the image tokens.

    Raises:
        ValueError: for an unknown choice, a selection of another model, a layer without attention to text where kind is “cross”, or
            a kind other than “both” where a model's attention is joint.
    """
    for value, known, name in ((kind, KINDS, "kind"), (others, OTHERS, "others")):
        if value not in known:
            raise ValueError(f"{METHOD}: {name} must be one of {', '.join(known)}, not “{value}”.")
    family, sites = model_sites(model)
    if joint(sites) and kind != BOTH:
        raise ValueError(
            f"{METHOD}: in this model one attention looks at words and picture at once, so “{kind}” cannot be filtered on its own; "
            "set kind to “both”."
        )
    chosen = check(heads, sites, family)
    where: dict[tuple[str, str], tuple[int, ...] | None] = {}
    for site in (s for s in sites if s.name in chosen):
        kinds = site.kinds if kind == BOTH else tuple(k for k in site.kinds if k == kind)
        if not kinds:
            raise ValueError(f"{METHOD}: {site.name} has no attention to text; choose other layers, or kind “self”.")
        silent = tuple(h for h in range(site.heads) if h not in chosen[site.name])
        where |= {(site.name, k): silent for k in kinds if silent}
    patched = model.clone()

    def blend(call: AttentionCall, heads: ChosenHeads) -> Tensor:
        return maths.silence(heads.out, heads.v, others)

    if where:
        request(patched, BlendOutputs(where, blend), tell=observer.effect)
    else:
        observer.effect("all heads of the layers are chosen, so that none is silenced")
    return patched
