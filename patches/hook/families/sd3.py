"""SD3 and SD3.5: joint attention in every block, text first; the first blocks of SD3.5-medium attend once more among the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..sites import Site
from .base import Transformer


class SD3(Transformer):
    """ComfyUI's ``MMDiT``."""

    name = "sd3"
    known_by = ("x_embedder",)
    containers = (("joint_blocks", "joint"),)

    def attention(self, block: Any) -> tuple[int, tuple[str, ...]]:
        twice = getattr(block.x_block, "x_block_self_attn", False)
        return block.x_block.attn.num_heads, ("joint", "self") if twice else ("joint",)

    def attention_module(self, site: Site, kind: str) -> Any:
        block = self.block(site.block).x_block
        return block.attn2 if kind == "self" else block.attn

    @staticmethod
    def handed_on(*args: Tensor, **kwargs: Any) -> Any:
        return args[:2]

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        # These blocks checkpoint themselves under gradients; run again, they would count our calls twice.
        return {**kwargs, "use_checkpoint": False}
