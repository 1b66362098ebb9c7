"""Cosmos Predict 2 and Anima: self-attention over all frames, then attention to the text, in every block."""

from __future__ import annotations

from typing import Any

from .base import Separate


class Cosmos(Separate):
    """ComfyUI's ``MiniTrainDIT``; one frame is a picture."""

    name = "cosmos_predict2"
    classes = ("MiniTrainDIT",)
    known_by = ("t_embedding_norm",)
    containers = (("blocks", "block"),)

    @property
    def patch(self) -> int:
        return int(self.model.patch_spatial)

    def attention(self, block: Any) -> tuple[int, tuple[str, ...]]:
        return block.self_attn.n_heads, ("self", "cross")

    def attention_module(self, site: Any, kind: str) -> Any:
        block = self.block(site.block)
        return block.self_attn if kind == "self" else block.cross_attn


class Anima(Cosmos):
    """The same with an adapter for its text, whose own attention is outside."""

    name = "anima"
    classes = ("Anima",)
