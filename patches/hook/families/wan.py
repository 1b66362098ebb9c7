"""Wan 2.1 and 2.2, from text (and 2.2 from a picture): self-attention over all frames, then attention to the text, in every block."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Separate


class Wan(Separate):
    """ComfyUI's ``WanModel``; one frame is a picture."""

    name = "wan"
    classes = ("WanModel",)
    containers = (("blocks", "block"),)

    @classmethod
    def fits(cls, diffusion_model: nn.Module) -> bool:
        # With these, pictures are attended to beside the text, or stand before the first frame.
        other = any(getattr(diffusion_model, name, None) is not None for name in ("img_emb", "ref_conv"))
        return not other and super().fits(diffusion_model)

    @property
    def patch(self) -> int:
        return int(self.model.patch_size[-1])

    def attention(self, block: Any) -> tuple[int, tuple[str, ...]]:
        return block.num_heads, ("self", "cross")

    def attention_module(self, site: Any, kind: str) -> Any:
        block = self.block(site.block)
        return block.self_attn if kind == "self" else block.cross_attn
