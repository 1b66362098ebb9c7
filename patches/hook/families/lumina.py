"""Lumina 2 and Z-Image: joint attention in every layer, text first, then the image; refiners of each come before, and are outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .base import Transformer

if TYPE_CHECKING:
    from ..forward import Forward


class Lumina2(Transformer):
    """ComfyUI's ``NextDiT``."""

    name = "lumina2"
    classes = ("NextDiT",)
    known_by = ("cap_embedder", "noise_refiner", "context_refiner")
    containers = (("layers", "joint"),)

    def attention(self, block: Any) -> tuple[int, tuple[str, ...]]:
        return block.attention.n_local_heads, ("joint",)

    def layout(self, forward: Forward, joint: int) -> tuple[slice, int]:
        multiple = getattr(self.model, "pad_tokens_multiple", None) or 1
        height, width = self.grid(forward)
        begin = joint - -height * width % multiple  # the image is the last, and padded at its end; so is the text
        prompt = begin if forward.context is None else forward.context.shape[1]
        first = begin - (prompt + -prompt % multiple)  # pictures and texts of reference come before
        return slice(first, first + prompt), begin


class ZImage(Lumina2):
    """The same class with padding and another modulation."""

    name = "z_image"

    @classmethod
    def fits(cls, diffusion_model: nn.Module) -> bool:
        return getattr(diffusion_model, "pad_tokens_multiple", None) is not None and super().fits(diffusion_model)
