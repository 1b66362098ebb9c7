"""Qwen-Image 1 and Edit: joint attention in every block, text first, then the image, then reference pictures."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import TextFirst


class QwenImage(TextFirst):
    """ComfyUI's ``QwenImageTransformer2DModel``."""

    name = "qwen_image"
    classes = ("QwenImageTransformer2DModel",)
    containers = (("transformer_blocks", "joint"),)

    def attention(self, block: Any) -> tuple[int, tuple[str, ...]]:
        return block.attn.heads, ("joint",)

    @staticmethod
    def handed_on(*args: Tensor, **kwargs: Any) -> Any:
        return kwargs["encoder_hidden_states"], kwargs["hidden_states"]
