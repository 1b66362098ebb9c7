"""FLUX.1, FLUX.2 and Chroma: joint attention in double and single blocks, text first, then the image, then reference pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .base import TextFirst, Tokens

if TYPE_CHECKING:
    from ..forward import Forward


class Flux(TextFirst):
    """ComfyUI's ``Flux`` with FLUX.1's blocks."""

    name = "flux"
    known_by = ("img_in", "time_in")
    containers = (("double_blocks", "double"), ("single_blocks", "single"))

    @classmethod
    def fits(cls, diffusion_model: nn.Module) -> bool:
        flat = isinstance(getattr(diffusion_model, "patch_size", None), int)  # HunyuanVideo's has three sides
        # The same class with other blocks is FLUX.2; without the pooled text it is a model that this pack has not met (Ovis, LongCat).
        own = not _second(diffusion_model) and getattr(diffusion_model, "vector_in", None) is not None
        return flat and own and super().fits(diffusion_model)

    def attention(self, block: Any) -> tuple[int, tuple[str, ...]]:
        return block.num_heads, ("joint",)

    @staticmethod
    def handed_on(*args: Tensor, **kwargs: Any) -> Any:
        return args[0] if args else (kwargs["img"], kwargs["txt"])


class Flux2(Flux):
    """The same class with FLUX.2's blocks (dev, Klein), which share their modulation."""

    name = "flux2"
    classes = ("Flux",)

    @classmethod
    def fits(cls, diffusion_model: nn.Module) -> bool:
        return _second(diffusion_model) and super(Flux, cls).fits(diffusion_model)

    def prompt(self, forward: Forward, given: int) -> int:
        # ComfyUI puts zeros before a short text. What is asked of words is asked of the run's own prompt.
        cond = None if forward.run is None else forward.run.prompt
        text = None if cond is None else cond.get("cross_attn")
        return min(text.shape[1], given) if isinstance(text, Tensor) else given

    def text_part(self, tokens: Tokens) -> slice:
        return slice(0, tokens.image.start)


class Chroma(Flux):
    """ComfyUI's ``Chroma``, not Chroma Radiance."""

    name = "chroma"
    classes = ("Chroma",)
    known_by = ("img_in", "distilled_guidance_layer")

    @classmethod
    def fits(cls, diffusion_model: nn.Module) -> bool:
        return super(Flux, cls).fits(diffusion_model)


def _second(diffusion_model: nn.Module) -> bool:
    return bool(getattr(getattr(diffusion_model, "params", None), "global_modulation", False))
