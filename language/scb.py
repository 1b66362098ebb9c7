"""The style composition benchmark of Detail++ (arXiv 2507.17853, appendix 8): its word lists and its rule."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .writing import article

STYLES = ("Lego", "oil-painting", "cyberpunk", "sketch", "pixel-art", "watercolor", "graffiti")
SUBJECTS = ("dog", "cat", "robot", "car", "unicorn")
BACKGROUNDS = ("forest", "space", "desert", "city", "ruins")
SIZE = 300


@dataclass(frozen=True)
class StylePrompt:
    """A prompt of the benchmark, and the phrases that its two parts are judged by."""

    prompt: str
    subject: str
    background: str


def _phrase(style: str, thing: str) -> str:
    # "space" and "ruins" stand after an article too: the paper has one form for all.
    return f"{article(style)} {style} style {thing}"


def style_prompt(index: int, seed: int = 0) -> StylePrompt:
    """Prompt ``index`` of the benchmark that ``seed`` draws: “a sketch style robot in an oil-painting style forest”.

    The 1050 prompts that the rule allows (subject and background never share a style) are shuffled by the seed; the benchmark is the
    first 300, so none comes twice. The paper's own draw was not published.

    Raises:
        ValueError: when the index is not one of the 300.
    """
    if not 0 <= index < SIZE:
        raise ValueError(f"index {index} is not in the style composition benchmark: choose 0 to {SIZE - 1}")
    pairs = [(a, b) for a in STYLES for b in STYLES if a != b]
    every = [(a, thing, b, place) for a, b in pairs for thing in SUBJECTS for place in BACKGROUNDS]
    style, thing, other, place = random.Random(seed).sample(every, SIZE)[index]
    subject, background = _phrase(style, thing), _phrase(other, place)
    return StylePrompt(f"{subject} in {background}", subject, background)
