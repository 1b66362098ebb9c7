"""Inputs that several nodes have, each written once."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..patches.hook.install import model_sites
from ..patches.hook.sites import Heads, select
from ..patches.softpag import AUTOMATIC

AUTO = "auto"  # of a selection of heads: the node's own


def steered_model() -> io.Model.Input:
    """The MODEL of a node that acts on attention."""
    return io.Model.Input(
        "model", tooltip="The model to steer. LoRAs, ControlNets and guidance on it stay; connect the output to the sampler."
    )


def automatic(name: str, default: float, tooltip: str, optional: bool = False) -> io.Float.Input:
    """A strength, or -1: what is usual for the model's family."""
    return io.Float.Input(
        name, default=default, min=AUTOMATIC, max=100.0, step=0.1, round=0.01, tooltip=tooltip, optional=optional
    )


def percents(settings: Any, begin: str, stop: str) -> list[io.Float.Input]:
    """``start_percent`` and ``end_percent``: the part of sampling in which a node works.

    Args:
        settings: whose ``start_percent`` and ``end_percent`` are the defaults.
        begin, stop: the tooltips.
    """
    return [
        io.Float.Input(name, default=getattr(settings, name), min=0.0, max=1.0, step=0.01, tooltip=tooltip)
        for name, tooltip in (("start_percent", begin), ("end_percent", stop))
    ]


def advanced(entry: Any) -> Any:
    """An input that newer editors hide until it is asked for."""
    entry.extra_dict["advanced"] = True  # not an argument yet in the oldest ComfyUI that we support
    return entry


def advanced_choice(name: str, options: tuple[str, ...], default: str, tooltip: str) -> io.Combo.Input:
    """A choice that old workflows do not have, and that newer editors hide until it is asked for."""
    return advanced(io.Combo.Input(name, options=list(options), default=default, optional=True, tooltip=tooltip))


def selected(model: Any, layers: str) -> Heads | None:
    """The heads of a ``layers`` text; None for ``auto``."""
    if layers.strip() in ("", AUTO):
        return None
    family, sites = model_sites(model)
    return select(layers, sites, family)
