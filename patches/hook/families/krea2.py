"""Krea 2: joint attention in every block, text first, then the image, then reference pictures; the text's own blocks are outside."""

from __future__ import annotations

from typing import Any

from .base import TextFirst


class Krea2(TextFirst):
    """ComfyUI's ``SingleStreamDiT``."""

    name = "krea2"
    classes = ("SingleStreamDiT",)
    known_by = ("txtfusion",)
    containers = (("blocks", "joint"),)

    @property
    def patch(self) -> int:
        return int(self.model.patch)

    def attention(self, block: Any) -> tuple[int, tuple[str, ...]]:
        return block.attn.heads, ("joint",)
