"""Structure-aware refinement of ComfyUI latents: the checks, the attention of their own run, and where it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..methods import maps as pictures
from ..methods import structure as maths
from .maps.reading import token_maps
from .maps.record import Record

METHOD = "Structure-aware Latent Refine"


@dataclass(frozen=True)
class Settings:
    """What a node may choose (its inputs say what each does)."""

    strength: float = 0.5
    edge_low: float = 0.3
    edge_high: float = 0.8
    iterations: int = 5
    spatial_sigma: float = 2.0
    feature_sigma: float = 0.1


DEFAULTS = Settings()


def attention(record: Record, size: tuple[int, int]) -> Tensor:
    """How much each place looks at words, and not at the start token: ``[pictures, 1, *size]``, over its own range."""
    words = token_maps(record, against_start=True)[:, 1:]
    return pictures.minmax(pictures.resize(words, size))


@torch.inference_mode()
def refine(
    samples: dict[str, Any],
    record: Record | None = None,
    strength: float = DEFAULTS.strength,
    edge_low: float = DEFAULTS.edge_low,
    edge_high: float = DEFAULTS.edge_high,
    iterations: int = DEFAULTS.iterations,
    spatial_sigma: float = DEFAULTS.spatial_sigma,
    feature_sigma: float = DEFAULTS.feature_sigma,
) -> dict[str, Any]:
    """A LATENT refined; with strength or iterations 0 it is ``samples`` itself.

    Args:
        record: the attention maps of the run that made the latent.

    Raises:
        ValueError: for settings out of range, a latent that is not of pictures, or maps of another batch.
    """
    if edge_low > edge_high:
        raise ValueError(f"{METHOD}: edge_low ({edge_low:g}) is above edge_high ({edge_high:g}); swap them.")
    for value, name in ((strength, "strength"), (iterations, "iterations")):
        if value < 0:
            raise ValueError(f"{METHOD}: {name} must not be below 0.")
    for value, name in ((edge_low, "edge_low"), (spatial_sigma, "spatial_sigma"), (feature_sigma, "feature_sigma")):
        if value <= 0:
            raise ValueError(f"{METHOD}: {name} must be above 0.")
    latent = samples["samples"]
    if getattr(latent, "is_nested", False) or latent.ndim != 4:
        raise ValueError(f"{METHOD} works on latents of pictures, and this one is of a video, of sound or of something else.")
    if record is not None and record.pictures != len(latent):
        raise ValueError(
            f"{METHOD}: the attention maps are of {record.pictures} pictures and the latent has {len(latent)}; connect the latent as it "
            "comes from the sampler."
        )
    if strength == 0 or iterations == 0:
        return samples
    x = latent.to(comfy.model_management.get_torch_device(), torch.float32)
    shape = maths.structure(x)
    guidance = maths.edges(shape, edge_low, edge_high)
    if record is not None:
        guidance = guidance * attention(record, (x.shape[-2], x.shape[-1])).to(x)
    refined = maths.refine(x, torch.cat([shape, guidance], dim=1), strength, iterations, spatial_sigma, feature_sigma)
    return {**samples, "samples": refined.to(latent)}
