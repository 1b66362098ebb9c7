"""Whether what a node has put on a model acts at all in a run, and if not, why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .requests import Span

if TYPE_CHECKING:
    from .run import SamplingRun

EFFECTS = "attune_effects"  # in transformer_options
UNUSED = (
    "no layer that it changes was used in this run: the prompt that is sampled is not the one with its words, or another node does the work of "
    "these layers"
)


@dataclass(frozen=True, eq=False)
class Effect:
    """One node's, watched over runs. A request that names it (`Request.effect`) marks it where it changes something.

    Attributes:
        span: when the node acts.
        tell: is told after every run why there was none, or None where there was one.
        pictures: the method's name, where it knows pictures and not films: a run of a film is then refused before it starts.
    """

    span: Span
    tell: Callable[[str | None], None]
    pictures: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Effect:
        """Cloning a model copies what is on it: the node stays one."""
        return self


def watch(model: Any, effect: Effect) -> None:
    """Have the runs of a model, a node's own clone that carries the hook, tell about an effect."""
    options = model.model_options.setdefault("transformer_options", {})
    options[EFFECTS] = (*options.get(EFFECTS, ()), effect)


def check(options: Mapping[str, Any], latent: Any) -> None:
    """Before a run of ``latent [B, c, (frames,) H, W]`` starts.

    Raises:
        ValueError: for a film, where something on the model knows only pictures.
    """
    frames = latent.shape[2] if getattr(latent, "ndim", 4) == 5 else 1
    for effect in options.get(EFFECTS, ()):
        if effect.pictures and frames > 1:
            raise ValueError(
                f"{effect.pictures} works on pictures, and this latent has {frames} frames; make one of them, or take the node out."
            )


def tell(run: SamplingRun, options: Mapping[str, Any]) -> None:
    """A run has come to its end: tell of all effects that are watched in it."""
    for effect in options.get(EFFECTS, ()):
        effect.tell(None if effect in run.acted else _why(run, effect))


def _why(run: SamplingRun, effect: Effect) -> str:
    span = effect.span
    if not span.whole and span not in run.held:
        between = f"start_percent {span.start:g} and end_percent {span.end:g}"
        return f"no step of this run lies between {between}; widen them, or sample more steps"
    return run.why.get(effect, UNUSED)
