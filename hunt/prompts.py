"""The prompts of a search in words: what pictures are compared with, and products of styles and contents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TEXT_INPUTS = ("text", "prompt", "t5xxl", "clip_l", "value", "string")
THROUGH = ("positive", "conditioning", "conditioning_1", "conditioning_to", "text", "prompt", "value", "string")


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def products(styles: Sequence[str], contents: Sequence[str]) -> list[str]:
    """Every content in every style, ``style, content`` (section 4.1.2 of the paper); without styles the contents themselves."""
    return [f"{style}, {content}" for style in styles for content in contents] if styles else list(contents)


def texts_of(objective: str, prompts: Sequence[str], conditionings: int) -> list[str]:
    """What pictures are compared with: the lines of the objective, or the prompts where it is empty.

    Raises:
        ValueError: when there is neither, or not one for each conditioning.
    """
    lines = lines_of(objective)
    found = lines or list(prompts)
    if not found:
        raise ValueError(
            "HeadHunter: the prompts cannot be read from the graph; write the objective (a line for all, or one for each "
            "conditioning), or connect the prompts."
        )
    if len(found) not in (1, conditionings):
        raise ValueError(
            f"HeadHunter: there are {conditionings} conditionings and {len(found)} {'lines of the objective' if lines else 'prompts'}; "
            "give one, or one for each."
        )
    return found


def prompt_in_graph(graph: Mapping[str, Any] | None, node: str | None) -> str | None:
    """The prompt behind HeadHunter's positive input, as far as it is written in a node and not made by one."""
    found: Any = (graph or {}).get(str(node), {}).get("inputs", {}).get("positive")
    for _ in range(100):
        if not isinstance(found, list) or not found or str(found[0]) not in (graph or {}):
            return None
        inputs = (graph or {})[str(found[0])].get("inputs", {})
        for name in TEXT_INPUTS:
            if isinstance(inputs.get(name), str):
                return inputs[name]
        found = next((inputs[name] for name in THROUGH if isinstance(inputs.get(name), list)), None)
    return None
