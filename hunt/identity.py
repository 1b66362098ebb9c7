"""What a score depends on: two searches may use each other's evaluations where all of it is the same.

Names, numbers and texts are compared exactly; weights and text encodings, which differ in the last bits from one machine to another, by a
few sums, with a tolerance.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Identity: TypeAlias = tuple[dict[str, Any], np.ndarray]  # plain data, and (sum, norm) pairs

TOLERANCE = 4e-3  # of a tensor's norm: half precision against single stays below, another word or weight does not
SAMPLES = 64  # numbers of a weight that are looked at
DEPTH = 8  # of what hangs on a model


@dataclass
class Patched:
    """Stands for a ModelPatcher in what `identity` is given."""

    patcher: Any


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two lists of (sum, norm) pairs are of the same tensors, up to rounding."""
    if a.shape != b.shape:
        return False
    a, b = a.reshape(-1, 2), b.reshape(-1, 2)
    room = TOLERANCE * np.maximum(a[:, 1], b[:, 1])[:, None] + 1e-12
    return bool((np.abs(a - b) <= room).all())


def identity(what: Mapping[str, Any]) -> Identity:
    """What two searches must share to use each other's scores.

    Args:
        what: settings, tensors, conditionings and models, nested as they come.

    Returns:
        all that has to be equal, as plain data for JSON; and (sum, norm) pairs of all tensors, for `same`.
    """
    close: list[float] = []
    exact = {key: _plain(value, close, DEPTH, ()) for key, value in what.items()}
    return exact, np.asarray(close, np.float32)


@functools.cache
def _signs(count: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(count).astype(np.float32) / max(count, 1) ** 0.5


def _rows(t: Tensor, close: list[float]) -> list[int]:
    """A (sum, norm) pair for every row of a tensor's last dimension."""
    rows = t.detach().float().cpu().reshape(-1, t.shape[-1] if t.ndim else 1).numpy()
    pairs = np.stack([rows @ _signs(rows.shape[1]), np.sqrt((rows * rows).mean(1))], 1) if rows.size else rows[:, :0]
    close.extend(pairs.flatten().tolist())
    return list(t.shape)


def _weight(t: Any, close: list[float]) -> list[int]:
    """One (sum, norm) pair for a few numbers of a weight."""
    try:
        flat = t.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float().cpu()[None]
    except (RuntimeError, NotImplementedError, TypeError):  # quantised in a way of its own: its shape has to do
        return list(t.shape)
    _rows(some, close)
    return list(t.shape)


def _plain(value: Any, close: list[float], depth: int, path: tuple[int, ...]) -> Any:
    """A value as plain data; tensors leave their sums in ``close``, and of foreign objects only the class is known."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return _rows(value, close)
    if isinstance(value, Patched):
        return _model(value.patcher, close)
    if depth == 0 or id(value) in path:
        return type(value).__name__
    deeper = functools.partial(_plain, close=close, depth=depth - 1, path=(*path, id(value)))
    if isinstance(value, Mapping):
        return {str(k): deeper(v) for k, v in sorted(value.items(), key=lambda kv: str(kv[0]))}
    if isinstance(value, (list, tuple)):
        return [deeper(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(v) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(deeper(getattr(value, f.name)) for f in fields(value))]
    if isinstance(value, functools.partial):
        return ["partial", deeper(value.func), deeper(value.args), deeper(value.keywords)]
    if callable(value) and hasattr(value, "__qualname__"):  # a patch's settings are in its closure
        cells = [c.cell_contents for c in getattr(value, "__closure__", None) or () if _filled(c)]
        return [value.__qualname__, deeper(cells)]
    name = type(value).__name__
    if isinstance(value, torch.nn.Module):
        return name
    # Weights of a LoRA, hints and strengths of a ControlNet.
    known = {k: getattr(value, k, None) for k in ("weights", "strength", "timestep_percent_range", "cond_hint_original")}
    return [name, deeper({k: v for k, v in known.items() if v is not None})]


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _model(patcher: Any, close: list[float]) -> list[Any]:
    """A ModelPatcher: names and shapes of its weights, a few numbers of each, and what is patched on it."""
    shapes: dict[str, Any] = {}
    patches: dict[str, Any] = {}
    for name, found in sorted(patcher.get_key_patches().items()):
        shapes[name] = _weight(found[0][0], close)
        if found[1:]:
            patches[name] = _plain(found[1:], close, DEPTH, ())
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    options = {key: value for key, value in patcher.model_options.items() if value}
    objects = sorted(patcher.object_patches)
    wrappers = {str(kind): list(held.values()) for kind, held in patcher.wrappers.items() if held}
    return [type(patcher.model).__name__, digest, patches, _plain([options, objects, wrappers], close, DEPTH, ())]
