"""What the hook has to know of a kind of model: its blocks in order, where they attend, and which call of attention is which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, cat, nn

from ..sites import Site
from ..views import Around

if TYPE_CHECKING:
    from ..forward import Forward

Block = tuple[str, int]  # an attribute of the diffusion model, and the number of the block in it


@dataclass(frozen=True)
class Tokens:
    """What the tokens of a call are.

    Attributes:
        height, width: the image tokens' grid, of each frame of a film.
        image: which tokens (queries, and keys in self- and joint attention) are image.
        text: which keys are text.
        frames: how many grids the image tokens are, one after the other.
        regrouped: another pack merges pixels or cuts the picture into tiles (Token Merging, HyperTile), so that the grid is not known.
    """

    height: int
    width: int
    image: slice
    text: slice
    regrouped: bool = False
    frames: int = 1


class Family:
    """A kind of model; an instance describes one diffusion model, and lives for one forward where it is to locate its calls.

    Attributes:
        name: as it is in head sets and files; it never changes.
        classes: ComfyUI's names of the diffusion model's class, where they tell; another class, also one made from it, is another kind.
        known_by: attributes that a diffusion model of this kind has.
        containers: attributes that hold its blocks, in order of execution, and what the blocks' sites are called.
        skips: whether later blocks take the outputs of all blocks before them, not only of the last.
        projects_text: whether cross-attention takes its keys and values straight from the text that the model is given.
        runs_text: whether the text is computed on in the blocks, not only looked at.
        of_picture: keywords of the model that are the picture's, whatever the text.
        text_looks: whether the text's own queries are part of joint attention; else it is computed apart from the image.
        replays: whether a block may be replaced by what it gave before (see `prefix_cache`).
        for_own_forwards: options of ComfyUI's for forwards of our own.
    """

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]] = ()
    known_by: ClassVar[tuple[str, ...]] = ()
    containers: ClassVar[tuple[tuple[str, str], ...]]
    skips: ClassVar[bool] = False
    projects_text: ClassVar[bool] = False
    runs_text: ClassVar[bool] = False
    of_picture: ClassVar[tuple[str, ...]] = ("guidance",)
    text_looks: ClassVar[bool] = True
    replays: ClassVar[bool] = True
    for_own_forwards: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, diffusion_model: Any):
        self.model = diffusion_model

    @classmethod
    def fits(cls, diffusion_model: nn.Module) -> bool:
        """Whether a diffusion model is of this kind."""
        named = not cls.classes or type(diffusion_model).__name__ in cls.classes
        return named and all(hasattr(diffusion_model, a) for a in (*cls.known_by, *dict(cls.containers)))

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
        """What the tokens of the call that is going on are; of the forward, ``x``, ``context``, ``kind`` and ``run`` may be asked."""
        raise NotImplementedError

    def is_site(self, keys: int) -> bool:
        """Whether a call of attention with so many keys, in a block that is being run, is one of its site's."""
        return True

    def in_order(self, forward: Forward, keys: Tensor) -> Tensor:
        """A call's keys or values ``[..., tokens, d]``, as the block gave them, in the order of `tokens`."""
        return keys

    # --- another text than the prompt, see `texts` ---

    def text_keys(self, site: Site, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, N, heads · d]`` of a text in cross-attention; asked of a family that projects it."""
        raise NotImplementedError

    def strip(self, x: Tensor) -> Tensor:
        """A part of the model's inputs, as small as can be and as long as their longer side."""
        raise NotImplementedError

    def counting(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a forward that let this object count what `tokens` needs."""
        return options

    def given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], before: tuple[Any, ...] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments, with what the block ``before`` it gave, if there was one."""
        raise NotImplementedError

    def text_part(self, tokens: Tokens) -> slice:
        """All tokens that come and go with the text in joint attention, its padding too."""
        raise NotImplementedError

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A block's keywords while its calls of attention matter."""
        return kwargs

    def with_options(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with other options, while its calls of attention matter."""
        return args, self.arguments({**kwargs, "transformer_options": options})


class Replayed(nn.Module):
    """Stands in for a transformer's block: returns what was recorded, or what the block before it gave."""

    def __init__(self, recorded: tuple[Tensor, ...] | None, handed_on: Callable[..., Any]):
        super().__init__()
        self.recorded, self.handed_on = recorded, handed_on

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.recorded is None:
            return self.handed_on(*args, **kwargs)
        device = next(t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        # A copy: ComfyUI adds ControlNet's residuals in place.
        copies = tuple(t.to(device, copy=True) for t in self.recorded)
        return copies if len(copies) > 1 else copies[0]


@cache
def _hands_on(handed_on: Callable[..., Any]) -> Replayed:
    """The same for all blocks of a kind, as it holds nothing."""
    return Replayed(None, handed_on)


class Transformer(Family):
    """A stack of blocks that attend to text and image, each once or several times; subclasses are descriptions."""

    runs_text = True

    def attention(self, block: Any) -> tuple[int, tuple[str, ...]]:
        """Of a block: its heads, and the kinds of its calls of attention in order."""
        raise NotImplementedError

    @staticmethod
    def handed_on(*args: Tensor, **kwargs: Any) -> Any:
        """What a block of these arguments would give if it did nothing."""
        return args[0]

    @property
    def patch(self) -> int:
        """Latent pixels per image token, along each side."""
        return int(self.model.patch_size)

    def grid(self, forward: Forward) -> tuple[int, int]:
        """Height and width of the image tokens' grid, of each frame of a film."""
        height, width = forward.x.shape[-2:]
        return -(-height // self.patch), -(-width // self.patch)

    def sites(self) -> list[Site]:
        found: list[Site] = []
        for attribute, number in self.blocks():
            heads, kinds = self.attention(self.block((attribute, number)))
            name = f"{dict(self.containers)[attribute]}.{number}"
            found.append(Site(name, heads, kinds, len(found), (attribute, number), self.patch))
        return found

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
        return _hands_on(self.handed_on) if recorded is None else Replayed(recorded, self.handed_on)

    def layout(self, forward: Forward, joint: int) -> tuple[slice, int]:
        """The prompt's tokens, and where the image begins; of a joint call, ``joint`` tokens are not of the image's grid."""
        return slice(0, joint), joint

    def strip(self, x: Tensor) -> Tensor:
        x = x[:, :, :1] if x.ndim == 5 else x
        return x[..., : self.patch] if x.shape[-2] >= x.shape[-1] else x[..., : self.patch, :]

    def given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], before: tuple[Any, ...] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if before is None:
            return args, kwargs
        states = self.handed_on(*args, **kwargs)
        states = states if isinstance(states, tuple) else (states,)
        if len(states) < len(before):  # double blocks are over: the text, then the image
            before = (cat(before[::-1], dim=1),)
        new = {id(old): state for old, state in zip(states, before, strict=True)}
        return tuple(new.get(id(a), a) for a in args), {name: new.get(id(a), a) for name, a in kwargs.items()}

    def text_part(self, tokens: Tokens) -> slice:
        return slice(tokens.text.start, tokens.image.start)

    def tokens(self, forward: Forward, queries: int, keys: int) -> Tokens:
        height, width = self.grid(forward)
        count = height * width
        text, begin = self.layout(forward, keys - count if forward.kind == "joint" else 0)
        return Tokens(height, width, slice(begin, begin + count), text)


class TextFirst(Transformer):
    """A transformer whose joint attention has the text first, then the image, then the tokens of reference pictures."""

    def __init__(self, diffusion_model: Any):
        super().__init__(diffusion_model)
        self.before = 0  # tokens before the image; other packs may put tokens of their own before the prompt's

    def counting(self, options: dict[str, Any]) -> dict[str, Any]:
        def count(args: dict[str, Any]) -> dict[str, Any]:
            self.before = args["txt"].shape[1]
            return args

        patches = dict(options.get("patches", {}))
        return {**options, "patches": {**patches, "post_input": [*patches.get("post_input", ()), count]}}

    def locate(self, forward: Forward) -> dict[Block, Callable[..., Any]]:
        forward.options.update(self.counting(forward.options))
        return super().locate(forward)

    def layout(self, forward: Forward, joint: int) -> tuple[slice, int]:
        if forward.context is None:
            return slice(0, joint), joint
        given = forward.context.shape[1]
        before = self.before or given
        return slice(before - self.prompt(forward, given), before), before

    def prompt(self, forward: Forward, given: int) -> int:
        """How many of the ``given`` tokens of text, at their end, are the prompt's."""
        return given


class Separate(Transformer):
    """A transformer whose blocks attend among the image first, which may be a film, then to the text."""

    runs_text = False

    def tokens(self, forward: Forward, queries: int, keys: int) -> Tokens:
        height, width = self.grid(forward)
        frames = forward.x.shape[2] if forward.x.ndim == 5 else 1
        image = slice(0, frames * height * width)
        return Tokens(height, width, image, slice(0, keys), frames=frames)
