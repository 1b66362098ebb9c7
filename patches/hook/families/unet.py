"""UNets (SD1.5, SD2, SDXL): transformers in blocks of three sizes and more, each with self-attention and cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from comfy.ldm.modules.attention import SpatialTransformer
from torch import Tensor, nn

from ..sites import Site
from .base import Block, Family, Tokens

if TYPE_CHECKING:
    from ..forward import Forward


class _Recorder(nn.Module):
    """A last layer of a block."""

    def __init__(self, keep: Callable[[tuple[Tensor, ...]], None]):
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        self.keep((x,))
        return x


class _Replayed(nn.Module):
    """The only layer of a block that gives what was recorded."""

    def __init__(self, recorded: tuple[Tensor, ...] | None):
        super().__init__()
        self.recorded = recorded

    def forward(self, x: Tensor) -> Tensor:
        # A copy: ComfyUI adds ControlNet's residuals in place.
        return x if self.recorded is None else self.recorded[0].to(x.device, copy=True)


class _SkippedTransformer(SpatialTransformer):
    """Does nothing for the picture, and leaves in the options what the transformer that it stands for leaves there.

    ComfyUI itself counts layers of this class in ``transformer_index``.
    """

    def __init__(self, skipped: SpatialTransformer):
        nn.Module.__init__(self)
        self.channels, self.depth = skipped.in_channels, len(skipped.transformer_blocks)

    def forward(self, x: Tensor, context: Any = None, transformer_options: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if transformer_options is not None:
            transformer_options["activations_shape"] = [x.shape[0], self.channels, *x.shape[2:]]
            transformer_options["block_index"] = self.depth - 1
        return x


class UNet(Family):
    """ComfyUI's ``UNetModel``. It says itself where it is, in the options; a block is a list of layers, which ComfyUI walks."""

    name = "unet"
    known_by = ()
    containers = (("input_blocks", "input"), ("middle_block", "middle"), ("output_blocks", "output"))
    skips = True
    projects_text = True

    def blocks(self) -> list[Block]:
        found: list[Block] = []
        for attribute in self.attributes:
            held = getattr(self.model, attribute)
            count = 0 if held is None else 1 if attribute == "middle_block" else len(held)
            found += [(attribute, number) for number in range(count)]
        return found

    def block(self, block: Block) -> Any:
        return self.model.middle_block if block[0] == "middle_block" else super().block(block)

    def sites(self) -> list[Site]:
        found: list[Site] = []
        stride = 1
        for block in self.blocks():
            for layer in self.block(block):
                stride = int(stride * _resampling(layer))
                for i, transformer in enumerate(getattr(layer, "transformer_blocks", ())):
                    kinds = ("self",) if transformer.attn2 is None else ("self", "cross")
                    name = f"{dict(self.containers)[block[0]]}.{block[1]}.{i}"
                    found.append(Site(name, transformer.n_heads, kinds, len(found), block, stride))
        return found

    def locate(self, forward: Forward) -> dict[Block, Callable[..., Any]]:
        """Blocks say where they are in ``attn*_patch``; blocks that a ``patches_replace`` owns are met around the owner."""
        options = forward.options
        patches = dict(options.get("patches", {}))
        replaced = {name: dict(owners) for name, owners in options.get("patches_replace", {}).items()}
        for kind, name in (("self", "attn1"), ("cross", "attn2")):
            patches[f"{name}_patch"] = [*patches.get(f"{name}_patch", ()), self._mark(forward, kind)]
            for block, owner in replaced.get(name, {}).items():
                replaced[name][block] = self._around(forward, kind, owner)
        options["patches"], options["patches_replace"] = patches, replaced
        options["optimized_attention_override"] = forward.override
        return {}

    def attention_module(self, site: Site, kind: str) -> Any:
        number = int(site.name.rpartition(".")[2])
        layers = (getattr(layer, "transformer_blocks", ()) for layer in self.block(site.block))
        transformer = [t for held in layers for t in held][number]
        return transformer.attn1 if kind == "self" else transformer.attn2

    def recorder(self, block: Block, keep: Callable[[tuple[Tensor, ...]], None]) -> nn.Module:
        layers = self.block(block)
        return type(layers)(*layers, _Recorder(keep))

    def replay(self, block: Block, recorded: tuple[Tensor, ...] | None) -> nn.Module:
        layers = self.block(block)
        skipped = [_SkippedTransformer(layer) for layer in layers if isinstance(layer, SpatialTransformer)]
        return type(layers)(*skipped, _Replayed(recorded))

    def _mark(self, forward: Forward, kind: str) -> Callable[..., Any]:
        def patch(n: Tensor, context: Any, value: Any, extra: dict[str, Any]) -> Any:
            _locate(forward, kind, extra)
            if kind == "self":
                block = extra.get("block") or ("", 0)
                owners = forward.options["patches_replace"].get("attn1", {})
                if block not in owners and (*block, extra.get("block_index", 0)) not in owners:  # an owner expects every row
                    n, context = forward.needed(n, context)
            return n, context, value

        return patch

    def _around(self, forward: Forward, kind: str, owner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def replacement(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            _locate(forward, kind, extra)

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return owner(q, k, v, extra, *args, **kwargs)

            return forward.around_owner(q, k, v, extra["n_heads"], attend)

        return replacement

    def text_keys(self, site: Site, context: Tensor) -> tuple[Tensor, Tensor]:
        module = self.attention_module(site, "cross")
        return module.to_k(context), module.to_v(context)

    def tokens(self, forward: Forward, queries: int, keys: int) -> Tokens:
        height, width = forward.shape[-2:] if forward.shape else (1, queries)
        regrouped = height * width != queries
        if regrouped:
            height, width = 1, queries
        return Tokens(height, width, slice(0, queries), slice(0, keys), regrouped)


def _locate(forward: Forward, kind: str, extra: dict[str, Any]) -> None:
    block = extra.get("block") or ("", 0)
    forward.at(f"{block[0]}.{block[1]}.{extra.get('block_index', 0)}", kind)
    forward.shape = extra.get("activations_shape", [])


def _resampling(layer: Any) -> float:
    """How a layer changes the latent pixels per token: 2, 1 or 0.5."""
    part = layer.h_upd if getattr(layer, "updown", False) else layer
    return {"Downsample": 2.0, "Upsample": 0.5}.get(type(part).__name__, 1.0)
