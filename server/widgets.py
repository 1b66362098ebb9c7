"""What nodes tell their widgets in the browser: the ``ui`` of an execution."""

from __future__ import annotations

from typing import Any

from ..language.branches import Branches
from ..language.words import Words
from ..methods.maps import minmax
from ..patches.maps.pictures import Explained
from .encode import jpeg, png


def words_told(found: Words) -> dict[str, Any]:
    """The ``ui`` of Prompt Words: every word with its columns in every text encoder, and the chosen phrases."""
    every = [{"text": w.text, "encoders": {name: list(columns) for name, columns in w.encoders.items()}} for w in found.words]
    chosen = [p.text for p in found.phrases]
    return {"attune_words": [{"text": found.text, "words": every, "phrases": chosen, "encoders": list(found.counts)}]}


def branches_told(found: Branches, order: str) -> dict[str, Any]:
    """The ``ui`` of Decompose Prompt: the branches, and whether the base, too, is one that manual takes (it is not p0 itself)."""
    lines = [(branch.line, branch.added) for branch in found.branches]
    every = [{"subject": subject, "text": text, "added": list(added)} for (subject, text), added in lines]
    return {"attune_branches": [{"prompt": found.prompt, "branches": every, "base_in_manual": order == "simple first"}]}


def maps_told(found: Explained) -> dict[str, Any]:
    """The ``ui`` of Show Attention Maps: names; and of each picture itself, its maps below each other over their ranges, and these."""
    low, high = found.maps.amin(dim=(2, 3)), found.maps.amax(dim=(2, 3))
    pictures = [
        {
            "picture": jpeg(picture),
            "maps": png(minmax(maps) * 255),
            "ranges": [[round(a, 6), round(b, 6)] for a, b in zip(lows.tolist(), highs.tolist(), strict=True)],
        }
        for picture, maps, lows, highs in zip(found.pictures, found.maps, low, high, strict=True)
    ]
    height, width = found.maps.shape[2:]
    data = {
        "names": list(found.names),
        "chosen": found.chosen,
        "size": [width, height],
        "total": found.total,
        "pictures": pictures,
    }
    return {"attune_maps": [data]}
