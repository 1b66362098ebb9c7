"""Head sets as small JSON files: in ComfyUI's user folder, and presets that come with the pack."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import folder_paths

from ..patches.hook.sites import Heads, Site, check, select
from .files import file_error, file_name, printable, write_whole

PACK = Path(__file__).resolve().parent.parent
PRESETS = PACK / "hunt" / "presets"
FORMAT = 1
LARGEST, DEEPEST = 4 * 1024 * 1024, 16  # bytes and levels of a file that is read
FIELDS = ("attune heads", "family", "layers", "heads")  # all others tell where a set comes from


@dataclass(frozen=True)
class HeadFile(Heads):
    """Heads with a story: where they come from, as HeadHunter and files know it."""

    about: Mapping[str, Any] = field(default_factory=dict, compare=False)


@cache
def pack_version() -> str:
    """The pack's version, as its pyproject.toml says."""
    found = re.search(r'^version = "([^"]+)"', (PACK / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "unknown"


def folder() -> Path:
    """Where the user's own head sets are."""
    return Path(folder_paths.get_user_directory()) / "attune" / "heads"


def names() -> list[str]:
    """All head sets that can be loaded; the user's hide presets of the same name."""
    found = {p.stem for place in (PRESETS, folder()) if place.is_dir() for p in place.glob("*.json")}
    return sorted(name for name in found if printable(name) == name)  # an editor cannot be told of others


def find(name: str) -> Path:
    """The file of a head set.

    Raises:
        ValueError: when there is none of that name, or it is no name.
    """
    wanted = f"{file_name(name)}.json"
    for place in (folder(), PRESETS):
        if (place / wanted).is_file():
            return place / wanted
    known = ", ".join(names()) or "none yet"
    raise ValueError(f"Load Heads: there is no head set “{name}” in {folder()}. There are: {known}.")


def save(heads: Heads, sites: tuple[Site, ...], family: str, name: str, place: Path | None = None) -> Path:
    """Write a head set; one of the same name is replaced.

    Raises:
        ValueError: when the heads are not this model's, the name cannot be a file's, or the file cannot be written.
    """
    check(heads, sites, family)
    path = (place or folder()) / f"{file_name(name)}.json"
    about = dict(heads.about) if isinstance(heads, HeadFile) else {}
    data = {
        "attune heads": FORMAT,
        "pack": pack_version(),
        "family": family,
        "layers": {site.name: site.heads for site in sites},
        "heads": heads.text,
        **about,
    }
    write_whole("Save Heads", path, printable(json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def load(name: str, sites: tuple[Site, ...], family: str) -> HeadFile:
    """Read a head set for a model.

    Raises:
        ValueError: when there is none of that name, it is no head set, or it is of another kind of model.
    """
    path = find(name)
    data = _read(path)
    if data.get("attune heads") != FORMAT:
        raise ValueError(f"Load Heads: {path} was written by another version of Attune ({data.get('pack')}); update the pack.")
    layers = {site.name: site.heads for site in sites}
    if data.get("family") != family or data["layers"] != layers:
        raise ValueError(
            f"Load Heads: “{name}” is for another model: {data.get('family')} with {_shape(data['layers'])}; the connected one is "
            f"{family} with {_shape(layers)}. Heads mean nothing on a model that they were not found on."
        )
    own = FIELDS if _fits(data.get("heatmap"), layers) else (*FIELDS, "heatmap")
    about = {k: v for k, v in data.items() if k not in own}
    return HeadFile(family, select(data["heads"], sites, family).chosen, about)


def _read(path: Path) -> dict[str, Any]:
    """What is in a head file: JSON as the standard has it, and no deeper or larger than such a file is.

    Raises:
        ValueError: for anything else.
    """
    broken = ValueError(f"Load Heads: {path} is not a head set of Attune; choose another, or save it again.")
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise broken
        data = json.loads(raw.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # no half characters
    except OSError as error:
        raise file_error("Load Heads", path, error) from None
    except (ValueError, RecursionError):
        raise broken from None
    if not isinstance(data, dict) or not isinstance(data.get("layers"), dict) or not isinstance(data.get("heads"), str):
        raise broken
    if any(depth > DEEPEST for depth in _depths(data)):
        raise broken
    return data


def _finite(text: str) -> float:
    """A number of a file; NaN, Infinity and 1e999 are none that the editor could be told."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a number")
    return number


def _depths(data: Any) -> Iterator[int]:
    """How deep everything in nested lists and objects lies."""
    waiting = [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        yield depth
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if depth <= DEEPEST:
            waiting += [(v, depth + 1) for v in held]


def _fits(heatmap: Any, layers: Mapping[str, int]) -> bool:
    """Whether this is a score, or None, for every head of some of the layers."""
    return isinstance(heatmap, dict) and all(
        isinstance(row, list) and len(row) == layers.get(site) and all(v is None or _is_score(v) for v in row)
        for site, row in heatmap.items()
    )


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _shape(layers: Mapping[str, Any]) -> str:
    return f"{len(layers)} layers and {sum(v for v in layers.values() if isinstance(v, int) and abs(v) < 1e9)} heads"
