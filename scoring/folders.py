"""Model folders in transformers' layout under ComfyUI's models: which there are, what is read of them, and what stands for it.

Nothing is downloaded and nothing is run: of weights only safetensors are read, by name, and no file from outside the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
import torch
from safetensors.torch import load_file
from torch import nn

SCORERS, DETECTORS = "attune_scorers", "attune_detectors"  # folders under ComfyUI's models
HEAD = "head.safetensors"  # beside a dual encoder: an MLP on its vectors
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
PREPROCESSOR = ("preprocessor_config.json", "processor_config.json")
READ = (".safetensors", ".json", ".txt", ".model")  # the endings of all files that a model is made of

for _name in (SCORERS, DETECTORS):
    folder_paths.add_model_folder_path(_name, os.path.join(folder_paths.models_dir, _name))


def model_folders(kind: str) -> dict[str, Path]:
    """The model folders of `SCORERS` or `DETECTORS` by name: those with a config.json."""
    found: dict[str, Path] = {}
    for parent in folder_paths.get_folder_paths(kind):
        if os.path.isdir(parent):
            for entry in sorted(os.scandir(parent), key=lambda e: e.name):
                if not entry.name.startswith(".") and os.path.isfile(os.path.join(entry.path, "config.json")):
                    found.setdefault(entry.name, Path(entry.path))
    return found


def model_folder(kind: str, name: str) -> Path:
    """The model folder of that name, after a look at what is in it.

    Raises:
        ValueError: when there is none, it has no safetensors, or a file that is read leads out of it.
    """
    known, home = model_folders(kind), folder_paths.get_folder_paths(kind)[0]
    if name not in known:
        there = f"There are: {', '.join(known)}." if known else "There is none yet."
        raise ValueError(
            f"There is no model folder “{name}” in {home}. {there} Put a model in transformers' layout there (config.json, safetensors, "
            "tokenizer and preprocessor files), in a folder of its own; nothing is downloaded by itself."
        )
    path = known[name]
    for file in files_of(path):
        if not file.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"“{file.name}” in the model folder “{name}” is a link to a file outside of it, which is not read: put the file itself there."
            )
    weight_files(path)
    return path


def files_of(path: Path) -> list[Path]:
    """All files that a model in the folder may be made of, subfolders aside."""
    return sorted(f for f in path.iterdir() if f.suffix in READ and f.is_file())


def weight_files(path: Path) -> list[Path]:
    """The safetensors that the model's weights are in: one, or those that an index names.

    Raises:
        ValueError: when there are none, or the index names anything but safetensors in its own folder.
    """
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        raise ValueError(
            f"The model folder “{path.name}” has no {WEIGHTS}. Weights in .bin, .pt or .ckpt files can hold programs and are not read: "
            "get the model's safetensors version."
        )
    try:
        names = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(f"{INDEX} in the model folder “{path.name}” cannot be read ({error}): get the model again.") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{INDEX} in the model folder “{path.name}” names “{name}”. Only safetensors files in the folder itself are read: others can "
                "hold programs, or belong to something else. Get the model's safetensors version."
            )
        if not (path / name).is_file():
            raise ValueError(f"“{name}” is missing in the model folder “{path.name}”: get the whole model.")
    return [path / name for name in names]


def fingerprint(kind: str, name: str) -> str:
    """Changes when a file of the folder does: for ComfyUI's cache."""
    path = model_folders(kind).get(name)
    files = [] if path is None else sorted(f for f in path.iterdir() if f.is_file())
    return json.dumps([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed: int) -> str:
    out = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            out.update(block)
    return out.hexdigest()


def digest(paths: Sequence[Path], *settings: object) -> str:
    """Sixteen hexadecimal digits that stand for what is in these files, and for settings."""
    parts = [(p.name, _digest(p, p.stat().st_size, p.stat().st_mtime_ns)) for p in sorted(paths)]
    return hashlib.sha256(json.dumps([parts, [str(s) for s in settings]]).encode()).hexdigest()[:16]


def part_of_folder(who: str, auto: Any, path: Path, what: str, files: Sequence[str] = ()) -> Any:
    """A config, tokenizer or preprocessor from a folder.

    Args:
        auto: a class of transformers with ``from_pretrained``.
        files: one of these must be there; without any, transformers makes up a tokenizer that knows no word.

    Raises:
        ValueError: when the files are missing or broken.
    """
    try:
        if files and not any((path / f).is_file() for f in files):
            raise ValueError(f"there is none of {', '.join(files)}")
        return auto.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers raise for files that are missing or broken
        raise ValueError(
            f"{who}: the folder “{path.name}” has no usable {what} ({_reason(error)}). "
            "Put all files of the model there, not only its weights."
        ) from None


def network_of_folder(who: str, auto: Any, path: Path, config: Any, what: str) -> nn.Module:
    """A transformers model from a folder, complete. transformers gets the weights themselves, so that it opens no file.

    Args:
        auto: a class of transformers with ``from_config``.
        what: the models that would do, for the error.

    Raises:
        ValueError: when it cannot be read, or weights are missing.
    """
    try:
        weights: dict[str, torch.Tensor] = {}
        for file in weight_files(path):
            weights |= load_file(file)
        with torch.device("meta"):
            kind = type(auto.from_config(config, trust_remote_code=False))
        network, report = kind.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    except Exception as error:  # transformers, safetensors and torch each have their own
        raise ValueError(f"{who}: the folder “{path.name}” cannot be read as {what}: {_reason(error)}") from None
    missing = sorted(k for k in report["missing_keys"] if not k.endswith("position_ids"))
    if missing:
        raise ValueError(
            f"{who}: the weights in “{path.name}” are not complete for {what}; {missing[0]} is one of {len(missing)} that are missing. "
            "Get the whole model."
        )
    return network


def _reason(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
