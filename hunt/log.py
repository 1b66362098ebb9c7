"""The log of a search: scores of head sets, one SQLite file per search name, in ComfyUI's user folder.

A batch is written in one transaction, so a killed search loses what it was computing and nothing else. A file may hold the scores of
several settings; which of them a search may use is decided by comparing everything that scores depend on: names, numbers and texts
exactly, weights and text encodings (which differ in the last bits from one machine to another) by a few sums, with a tolerance.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 4e-3  # of a tensor's norm: half precision against single stays below, another word or weight does not
SAMPLES = 64  # numbers of a weight that are looked at
DEPTH = 8  # of what hangs on a model

TABLES = """
create table if not exists searches (id integer primary key, exact text not null, close blob not null);
create table if not exists evaluations (search integer not null, heads text not null, image integer not null, score real not null,
    picture blob, primary key (search, heads, image));
"""


def file_name(name: str) -> str:
    """``name`` as the name of a file.

    Raises:
        ValueError: for a name that is empty or a path.
    """
    name = name.strip()
    if not name or name.startswith(".") or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name) or len(name) > 100:
        raise ValueError(f"“{name}” cannot be a file's name; use letters, digits, spaces, - and _.")
    return name


class Log:
    """A file with evaluations.

    Raises:
        ValueError: when the file is not one.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.base = sqlite3.connect(path, timeout=60)
        try:
            self.base.executescript(TABLES)
        except sqlite3.DatabaseError as error:
            self.base.close()
            raise ValueError(
                f"{path} is not a log of HeadHunter ({error}); move it away, or search under another name."
            ) from None

    def search(self, exact: Mapping[str, Any], close: np.ndarray) -> Search:
        """The evaluations of one identity (see `identity`), new or known."""
        text = json.dumps(exact, sort_keys=True)
        with self.base:
            self.base.execute("begin immediate")  # two searches that start at once agree on a number
            for number, blob in self.base.execute("select id, close from searches where exact = ? order by id", (text,)):
                if same(np.frombuffer(blob, np.float32), close):
                    return Search(self.base, number)
            made = self.base.execute(
                "insert into searches (exact, close) values (?, ?)", (text, close.astype(np.float32).tobytes())
            )
            return Search(self.base, int(made.lastrowid or 0))

    def close(self) -> None:
        self.base.close()


@dataclass
class Search:
    """The evaluations that one search may use."""

    base: sqlite3.Connection
    number: int

    def has(self, heads: str, images: Sequence[int]) -> bool:
        """Whether all of these pictures of a set are scored."""
        found = self.base.execute(
            "select image from evaluations where search = ? and heads = ? and image between ? and ?",
            (self.number, heads, min(images), max(images)),
        )
        return set(images) <= {image for (image,) in found}

    def add(self, rows: Iterable[tuple[str, int, float, bytes | None]]) -> None:
        """Write a finished batch, all or nothing; what is there already stays.

        Raises:
            ValueError: for a score that is not a number.
        """
        rows = list(rows)
        if not all(math.isfinite(score) for _, _, score, _ in rows):
            raise ValueError("HeadHunter: the scorer gave something that is not a number; choose another scorer or objective.")
        with self.base:
            self.base.executemany(
                "insert or ignore into evaluations values (?, ?, ?, ?, ?)", [(self.number, *row) for row in rows]
            )

    def scores(self, heads: str, count: int) -> list[float]:
        """Scores of a set on the first ``count`` pictures, in order."""
        found = self.base.execute(
            "select score from evaluations where search = ? and heads = ? and image < ? order by image",
            (self.number, heads, count),
        )
        return [score for (score,) in found]

    def mean(self, heads: str, count: int) -> float:
        """Mean score of a set on the first ``count`` pictures."""
        scores = self.scores(heads, count)
        if len(scores) != count:
            raise RuntimeError(f"only {len(scores)} of {count} pictures of “{heads}” are in the log")
        return math.fsum(scores) / count

    def pictures(self, heads: str) -> list[bytes]:
        """The small pictures that are kept of a set."""
        found = self.base.execute(
            "select picture from evaluations where search = ? and heads = ? and picture is not null order by image",
            (self.number, heads),
        )
        return [picture for (picture,) in found]

    def keep_pictures(self, names: Sequence[str]) -> None:
        """Forget the small pictures of all other sets."""
        held = self.base.execute(
            "select distinct heads from evaluations where search = ? and picture is not null", (self.number,)
        )
        others = [(self.number, heads) for (heads,) in held.fetchall() if heads not in names]
        with self.base:
            self.base.executemany("update evaluations set picture = null where search = ? and heads = ?", others)


# --- identity ---------------------------------------------------------------------------------------------------------


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


def identity(what: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
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
