"""What the hook has to know of a kind of model: its blocks in order, where they attend, and which call of attention is which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..sites import Site
from ..views import Around

if TYPE_CHECKING:
    from ..forward import Forward

Block = tuple[str, int]  # an attribute of the diffusion model, and the number of the block in it


@dataclass(frozen=True)
class Tokens:
    """What the tokens of a call are.

    Attributes:
        height, width: the image tokens' grid.
        image: which tokens (queries, and keys in self- and joint attention) are image.
        text: which keys are text.
        regrouped: another pack merges pixels or cuts the picture into tiles (Token Merging, HyperTile), so that the grid is not known.
    """

    height: int
    width: int
    image: slice
    text: slice
    regrouped: bool = False


class Family:
    """A kind of model; an instance describes one diffusion model, and lives for one forward where it is to locate its calls.

    Attributes:
        name: as it is in head sets and files; it never changes.
        known_by: attributes that a diffusion model of this kind has.
        containers: attributes that hold its blocks, in order of execution, and what the blocks' sites are called.
        skips: whether later blocks take the outputs of all blocks before them, not only of the last.
    """

    name: ClassVar[str]
    known_by: ClassVar[tuple[str, ...]]
    containers: ClassVar[tuple[tuple[str, str], ...]]
    skips: ClassVar[bool] = False

    def __init__(self, diffusion_model: Any):
        self.model = diffusion_model

    @classmethod
    def fits(cls, diffusion_model: nn.Module) -> bool:
        """Whether a diffusion model is of this kind."""
        return all(hasattr(diffusion_model, a) for a in (*cls.known_by, *dict(cls.containers)))

    @property
    def attributes(self) -> Iterable[str]:
        """The containers' names."""
        return (attribute for attribute, _ in self.containers)

    def blocks(self) -> list[Block]:
        """The model's blocks in order of execution."""
        return [(attribute, i) for attribute in self.attributes for i in range(len(getattr(self.model, attribute)))]

    def block(self, block: Block) -> Any:
        """The module of a block."""
        return getattr(self.model, block[0])[block[1]]

    def sites(self) -> list[Site]:
        """Every site, in order of execution."""
        raise NotImplementedError

    def locate(self, forward: Forward) -> dict[Block, Callable[..., Any]]:
        """Make a forward know where it is at every call of attention that somebody asks about.

        In the options of this forward, or by what is returned: what to do around blocks, as in `Around`.
        """
        raise NotImplementedError

    def attention_module(self, site: Site, kind: str) -> Any:
        """The module that attends at a place, or one that holds it."""
        return self.block(site.block)

    def recorder(self, block: Block, keep: Callable[[tuple[Tensor, ...]], None]) -> nn.Module:
        """A block that hands its outputs to ``keep``, and is otherwise itself."""
        raise NotImplementedError

    def replay(self, block: Block, recorded: tuple[Tensor, ...] | None) -> nn.Module:
        """What stands for a block that is not run: it gives what was recorded, or hands on what it is given."""
        raise NotImplementedError

    def tokens(self, forward: Forward, queries: int, keys: int) -> Tokens:
        """What the tokens of the call that is going on are."""
        raise NotImplementedError


class Replayed(nn.Module):
    """Stands in for a transformer's block: returns what was recorded, or what the block before it gave."""

    def __init__(self, recorded: tuple[Tensor, ...] | None):
        super().__init__()
        self.recorded = recorded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.recorded is not None:
            device = next(t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            # A copy: ComfyUI adds ControlNet's residuals in place.
            copies = tuple(t.to(device, copy=True) for t in self.recorded)
            return copies if len(copies) > 1 else copies[0]
        if "img" in kwargs:
            return kwargs["img"], kwargs["txt"]
        return args[:2] if len(args) > 1 else args[0]


HANDS_ON = Replayed(None)  # the same for all, as it holds nothing


class Transformer(Family):
    """A stack of blocks that attend to text and image, each once or several times; subclasses are descriptions."""

    def attention(self, block: Any) -> tuple[int, tuple[str, ...]]:
        """Of a block: its heads, and the kinds of its calls of attention in order."""
        raise NotImplementedError

    def sites(self) -> list[Site]:
        found: list[Site] = []
        for attribute, number in self.blocks():
            heads, kinds = self.attention(self.block((attribute, number)))
            name = f"{dict(self.containers)[attribute]}.{number}"
            found.append(Site(name, heads, kinds, len(found), (attribute, number), self.model.patch_size))
        return found

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A block's keywords while calls in it are counted."""
        return kwargs

    def locate(self, forward: Forward) -> dict[Block, Callable[..., Any]]:
        def entering(site: Site) -> Callable[..., Any]:
            def act(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
                with forward.inside(site.name, kwargs.get("transformer_options")):
                    return block(*args, **self.arguments(kwargs))

            return act

        return {site.block: entering(site) for site in forward.asked_sites()}

    def recorder(self, block: Block, keep: Callable[[tuple[Tensor, ...]], None]) -> nn.Module:
        def act(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            out = module(*args, **kwargs)
            keep(out if isinstance(out, tuple) else (out,))
            return out

        return Around(self.block(block), act)

    def replay(self, block: Block, recorded: tuple[Tensor, ...] | None) -> nn.Module:
        return HANDS_ON if recorded is None else Replayed(recorded)

    def text_before(self, forward: Forward, joint: int) -> tuple[int, int]:
        """Tokens before the image, and how many of them, at their end, are the prompt's; ``joint`` tokens are not of the image."""
        return joint, joint

    def tokens(self, forward: Forward, queries: int, keys: int) -> Tokens:
        patch = self.model.patch_size
        height, width = ((n + patch - 1) // patch for n in forward.x.shape[-2:])
        count = height * width
        before, prompt = self.text_before(forward, keys - count if forward.kind == "joint" else 0)
        return Tokens(height, width, slice(before, before + count), slice(before - prompt, before))
