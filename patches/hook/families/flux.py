"""FLUX.1: joint attention in double and single blocks, text first, then the image, then reference pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .base import Block, Transformer

if TYPE_CHECKING:
    from ..forward import Forward


class Flux(Transformer):
    """ComfyUI's ``Flux``."""

    name = "flux"
    known_by = ("img_in", "time_in")  # Chroma has no time_in
    containers = (("double_blocks", "double"), ("single_blocks", "single"))

    def __init__(self, diffusion_model: Any):
        super().__init__(diffusion_model)
        self.before = 0  # tokens before the image; other packs may put tokens of their own before the prompt's

    @classmethod
    def fits(cls, diffusion_model: nn.Module) -> bool:
        flat = isinstance(getattr(diffusion_model, "patch_size", None), int)  # HunyuanVideo's has three sides
        params = getattr(diffusion_model, "params", None)
        second = getattr(params, "global_modulation", False)  # FLUX.2: the same class, other blocks
        return flat and not second and super().fits(diffusion_model)

    def attention(self, block: Any) -> tuple[int, tuple[str, ...]]:
        return block.num_heads, ("joint",)

    def locate(self, forward: Forward) -> dict[Block, Callable[..., Any]]:
        def count(args: dict[str, Any]) -> dict[str, Any]:
            self.before = args["txt"].shape[1]
            return args

        patches = dict(forward.options.get("patches", {}))
        forward.options["patches"] = {**patches, "post_input": [*patches.get("post_input", ()), count]}
        return super().locate(forward)

    def text_before(self, forward: Forward, joint: int) -> tuple[int, int]:
        if forward.context is None:
            return joint, joint
        prompt = forward.context.shape[1]
        return self.before or prompt, prompt
