"""Fix My Prompt: a problem that a person sees, and the method and numbers that are used for it.

No mathematics of its own. `RECIPES` is the one place that says which method a problem gets, and what is known of that on which models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..language.text import segments_of
from ..language.weights import HIGH, LOW, Weighted, weighted
from . import regulation, softpag, weights
from .hook.install import ModelPatcher, model_sites
from .maps import recorder
from .maps.record import Settings as Kept
from .observer import NOBODY, Observer

if TYPE_CHECKING:
    from ..language.words import Words

NODE = "Fix My Prompt"
MIXED, MISSING, UNEVEN, FLAT, LOOK = PROBLEMS = (
    "colours and details mixed up",
    "something is missing",
    "one thing too weak or strong",
    "flat or blurry structure",
    "see what it looks at",
)
OFF, GENTLE, NORMAL, STRONG = STRENGTHS = ("off", "gentle", "normal", "strong")
_FACTORS = {GENTLE: 0.5, NORMAL: 1.0, STRONG: 1.5}
NOUNS = (MISSING, LOOK)  # problems for which the prompt's nouns are looked up


@dataclass(frozen=True)
class Recipe:
    """What a problem gets.

    Attributes:
        nodes: the same with single nodes, for people; ``{…}`` are numbers.
        known: what was published or measured, by model family.
        elsewhere: what to say of all other families.
    """

    nodes: str
    known: Mapping[str, str]
    elsewhere: str


_EXPERIMENTAL = "Experimental on this kind of model: its equations are checked there, its effect on pictures is neither published nor measured."
_SOFTPAG = {
    "unet": "Published for this kind of model as perturbed-attention guidance, for quality; on the bundled model more things have their own "
    "details with it (MEASUREMENTS.md).",
    "sd3": "Published for this kind of model, for quality.",
    "flux": "Published for this kind of model, for quality.",
}
RECIPES: Mapping[str, Recipe] = {
    MIXED: Recipe("SoftPAG with scale {scale:g}, before the KSampler", _SOFTPAG, _EXPERIMENTAL),
    FLAT: Recipe("SoftPAG with scale {scale:g}, before the KSampler", _SOFTPAG, _EXPERIMENTAL),
    MISSING: Recipe(
        "Prompt Words with this text (its conditioning to the KSampler), then Attention Regulation with these words and strength {strength:g}",
        {
            "unet": "Published for this kind of model; on the bundled model all things are drawn more often with it, "
            "and their details may be mixed up more often (MEASUREMENTS.md)."
        },
        _EXPERIMENTAL,
    ),
    UNEVEN: Recipe(
        "Word Weights with “{lines}”, before the KSampler",
        {},  # a UNet's text encoder uses weights by itself
        "Its equations are checked on this kind of model; how strong a number is, is for you to see.",
    ),
    LOOK: Recipe("Capture Attention Maps, and Show Attention Maps after VAE Decode", {}, "It changes nothing."),
}


def apply(
    model: ModelPatcher, words: Words, problem: str, strength: str = NORMAL, observer: Observer = NOBODY
) -> tuple[ModelPatcher, str]:
    """A clone of ``model`` with the method for a problem on it, and what was set, for people; with `OFF`, just a clone.

    Args:
        words: of the prompt, its nouns for the problems `NOUNS`.
        observer: is shown the attention to them while it forms.

    Raises:
        ValueError: for an unknown choice, a problem that needs weights in the prompt where there are none, or what the method refuses.
    """
    for name, value, known in (("problem", problem, PROBLEMS), ("strength", strength, STRENGTHS)):
        if value not in known:
            raise ValueError(f"{NODE}: there is no {name} “{value}”; choose one of {', '.join(known)}.")
    if strength == OFF:
        observer.effect("strength is off")
        return model.clone(), "Off: the model is the plain one, and the conditioning is your prompt."
    factor = _FACTORS[strength]
    family, _ = model_sites(model)
    if problem in (MIXED, FLAT):
        scale = factor * softpag.scale_of(family, softpag.AUTOMATIC)
        return softpag.apply(model, scale, observer=observer), _said(problem, family, scale=scale)
    if problem == MISSING:
        patched = regulation.apply(model, words, regulation.Settings(strength=factor), observer=observer)
        return patched, _said(problem, family, words=words, strength=factor)
    if problem == LOOK:
        return recorder.apply(model, Kept(), None, observer)[0], _said(problem, family, words=words)
    chosen = [Weighted(one.phrase, _scaled(one.weight, factor)) for one in weighted(words, "")]
    if not chosen and all(weight == 1 for _, weight in segments_of(words.text)):
        raise ValueError(
            f"{NODE}: to make a thing weaker or stronger, write its weight into the text, as “a (red car:1.4) and a blue bench”: above 1 is "
            "stronger, below 1 weaker."
        )
    if not chosen:
        said = (
            "The weights in your text are used by the text encoder itself, so nothing more was set and strength means nothing."
        )
        observer.effect("the weights in the text are used by the text encoder, and nothing is left to set")
        return model.clone(), said
    lines = ", ".join(f"{one.phrase.text}: {one.weight:g}" for one in chosen)
    return weights.apply(model, words, chosen, observer=observer), _said(problem, family, lines=lines)


def _scaled(weight: float, factor: float) -> float:
    """A weight that is ``factor`` times as far from 1, as far as weights go."""
    return min(HIGH, max(LOW, 1 + factor * (weight - 1)))


def _said(problem: str, family: str, words: Words | None = None, **numbers: object) -> str:
    recipe = RECIPES[problem]
    of = "" if words is None else f"Words: {', '.join(phrase.text for phrase in words.phrases)}.\n"
    return f"{of}The same with single nodes: {recipe.nodes.format(**numbers)}.\n{recipe.known.get(family, recipe.elsewhere)}"
