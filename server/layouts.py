"""Layers and heads of a model before it is loaded: from the names and shapes in its file, or from a published architecture.

Models are built on torch's meta device, which gives every module and no weights, and asked for their sites as a real one is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.supported_models
import folder_paths
import torch

from ..patches.head_presets import PRESETS as HEAD_PRESETS
from ..patches.head_presets import fits, preset_heads
from ..patches.hook.families import family, sites
from ..patches.hook.sites import Heads, Site
from ..patches.softpag import default_heads
from .published import ARCHITECTURES, PRESETS

FOLDERS = ("checkpoints", "diffusion_models")


class UntoldError(ValueError):
    """A file that is there and does not tell its layers."""


def layout(model_sites: Iterable[Site], model_family: str, title: str = "") -> dict[str, Any]:
    """What the head picker draws, as plain data: every layer's name and number of heads in order, SoftPAG's default, and presets."""
    every = tuple(model_sites)
    mine = [name for name, preset in HEAD_PRESETS.items() if fits(preset, every, model_family)]
    return {
        "title": title,
        "family": model_family,
        "layers": [[site.name, site.heads] for site in every],
        "default": default_heads(model_family, every).text,
        "presets": {name: preset_heads(name, every, model_family).text for name in mine},
    }


def of_config(base: type, numbers: Mapping[str, Any], title: str) -> dict[str, Any]:
    """The layout of a model class of ComfyUI's with these numbers."""
    config = base(dict(numbers))
    config.set_inference_dtype(torch.float16, None)
    return _layout(config.get_model({}, "", device=torch.device("meta")), title)


def _layout(model: Any, title: str) -> dict[str, Any]:
    return layout(sites(model.diffusion_model), family(model.diffusion_model), title)


@cache
def preset(name: str) -> dict[str, Any]:
    """The layout of a published architecture.

    Raises:
        ValueError: for an unknown one.
    """
    if name in ARCHITECTURES and name not in PRESETS:
        raise ValueError(f"this ComfyUI does not know {ARCHITECTURES[name][0]}: update it to see its heads.")
    if name not in PRESETS:
        raise ValueError(f"there is no preset “{name}”: choose one of {', '.join(PRESETS)}.")
    title, base, numbers = PRESETS[name]
    return of_config(base, numbers, title)


def of_file(folder: str, name: str) -> dict[str, Any]:
    """The layout of a checkpoint or diffusion model by its file's header; no weight is read.

    Args:
        folder: one of `FOLDERS`, ``name``: as the loader's widget lists it.

    Raises:
        UntoldError: for a file that is no safetensors file, or a model that Attune does not know.
        ValueError: for another folder, or a file that is not in it or is broken.
    """
    if folder not in FOLDERS:
        raise ValueError(f"there is no model folder “{folder}”: choose one of {', '.join(FOLDERS)}.")
    if Path(name).suffix.lower() not in (".safetensors", ".sft"):  # GGUF loaders have folders of their own
        raise UntoldError(f"the layers of “{name}” can only be seen when it is loaded: run the workflow once.")
    if name not in folder_paths.get_filename_list(folder):
        raise ValueError(f"there is no “{name}” in ComfyUI's {folder}.")
    path = Path(folder_paths.get_full_path_or_raise(folder, name))
    return _of_header(path, path.stat().st_mtime_ns)


@cache
def _of_header(path: Path, changed: int) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    except (SafetensorError, OSError):
        raise ValueError(f"“{path.name}” cannot be read as a safetensors file; download it again.") from None
    prefix = comfy.model_detection.unet_prefix_from_state_dict(shapes)
    try:
        config = comfy.model_detection.model_config_from_unet(shapes, prefix, metadata=metadata)
        if config is None:
            raise TypeError
        config.set_inference_dtype(torch.float16, None)
        return _layout(config.get_model(shapes, prefix, device=torch.device("meta")), path.stem)
    except ValueError as error:
        raise UntoldError(str(error)) from None
    except Exception:  # a detector that wants to see weights, or a file of another kind
        raise UntoldError(f"the layers of “{path.name}” can only be seen when it is loaded: run the workflow once.") from None


def scores(values: Mapping[str, Iterable[float | None]], title: str) -> dict[str, Any]:
    """A node's ``ui`` that colours the head pickers of the same model: a score per head of every site, higher is warmer,
    None is not known.

    Args:
        title: what the scores are of, for people.
    """
    numbers = {site: [None if v is None else float(v) for v in row] for site, row in values.items()}
    return {"attune_scores": [{"title": title, "sites": numbers}]}


def shown(model_sites: Iterable[Site], model_family: str, chosen: Heads) -> dict[str, Any]:
    """The ``ui`` of Select Heads: the connected model's layout, and the heads that were chosen."""
    return {"attune_layout": [{**layout(model_sites, model_family), "chosen": chosen.text}]}
