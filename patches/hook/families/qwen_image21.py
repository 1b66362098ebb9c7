"""Qwen-Image 2.1: causal text with reference pictures in it, computed apart from the image, which attends to all of it and itself.

A block attends once for every piece of text, masked, and once for every picture; the last of these calls, the drawn image's, is its site's.
The text's keys and values are the same in every step, so ComfyUI may keep them after the first one: then a block runs twice in the first step,
for the text and for the image, and from then on for the image alone. Nothing that this pack does touches the text's part, so they are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, cat, nn

from .base import Block, Tokens, Transformer

if TYPE_CHECKING:
    from ..forward import Forward


class QwenImage21(Transformer):
    """ComfyUI's ``QwenImage21Transformer2DModel``; methods are shown the image's keys first, then the text's."""

    name = "qwen_image21"
    classes = ("QwenImage21Transformer2DModel",)
    containers = (("transformer_blocks", "joint"),)
    text_looks = False
    replays = False  # whether a block is given the text's part too is ComfyUI's to say, in every forward anew
    # Texts are kept by the batch that they are in. One for a batch of ours would take memory, and ComfyUI 0.38 fails on kept texts that are
    # not asked for in turn, as when a span ends.
    for_own_forwards: ClassVar[Mapping[str, Any]] = {"qwen_image21_cache": {"device": "off"}}

    def __init__(self, diffusion_model: Any):
        super().__init__(diffusion_model)
        self.given_tokens = 0  # of the block that is being run; its last call has as many keys, earlier ones fewer

    @property
    def patch(self) -> int:
        return 1

    def attention(self, block: Any) -> tuple[int, tuple[str, ...]]:
        return block.attn.heads, ("joint",)

    def locate(self, forward: Forward) -> dict[Block, Callable[..., Any]]:
        def entering(name: str) -> Callable[..., Any]:
            def act(block: nn.Module, *args: Any) -> Any:
                x, *_, before, options = args
                if before == x.shape[1]:  # the text alone
                    return block(*args)
                self.given_tokens = x.shape[1]
                with forward.inside(name, options):
                    return block(*args)

            return act

        return {site.block: entering(site.name) for site in forward.asked_sites()}

    def is_site(self, keys: int) -> bool:
        return keys >= self.given_tokens

    def in_order(self, forward: Forward, keys: Tensor) -> Tensor:
        height, width = self.grid(forward)
        return cat([keys[..., -height * width :, :], keys[..., : -height * width, :]], dim=-2)

    def tokens(self, forward: Forward, queries: int, keys: int) -> Tokens:
        height, width = self.grid(forward)
        given = keys - height * width if forward.context is None else forward.context.shape[1]
        # Reference pictures are within the text, before the prompt's own words: of the text, what is before them is not found.
        return Tokens(height, width, slice(0, height * width), slice(keys - given, keys))

    # --- another text than the prompt ---

    def strip(self, x: Tensor) -> Tensor:
        def few(side: int) -> int:
            return 2 - side % 2  # places of reference pictures are counted from the middle, so odd stays odd

        return x[..., : few(x.shape[-1])] if x.shape[-2] >= x.shape[-1] else x[..., : few(x.shape[-2]), :]

    def counting(self, options: dict[str, Any]) -> dict[str, Any]:
        # A patch of the input makes ComfyUI leave what it keeps of texts alone: this one is run through blocks that do nothing.
        patches = dict(options.get("patches", {}))
        return {**options, "patches": {**patches, "post_input": [*patches.get("post_input", ()), dict]}}

    def given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], before: tuple[Any, ...] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().given(args, kwargs, before)
        return (args[0].clone(), *args[1:]), kwargs  # blocks write over what they are given

    def with_options(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args[-1].update(options)  # a block's attention has these options by itself
        self.given_tokens = args[0].shape[1]
        return args, kwargs

    def text_part(self, tokens: Tokens) -> slice:
        return slice(tokens.image.stop, tokens.text.stop)
