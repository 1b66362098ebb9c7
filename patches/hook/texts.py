"""What the picture's attention gives with another text than the prompt, such as a negative one.

The other text is a CONDITIONING that a request carries. When sampling starts it joins the guider's conditionings, so that ComfyUI prepares
it as it prepares the prompt. In a UNet's cross-attention only its keys and values are computed. In a transformer a text runs through the
blocks, and where attention is joint it also sees the picture; so each block runs once more on the other text's tokens alone, at the moment
when the picture attends in it, and the picture's own queries, keys and values serve both texts. The picture's tokens are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import comfy.sampler_helpers
import torch
from torch import Tensor

from .families.base import Block, Family
from .parts import chunks_of
from .run import EXTRA, SamplingRun
from .tensors import CallTensors, index_or_slice, persistent
from .views import Around, view, with_blocks

if TYPE_CHECKING:
    from .blends import ChosenHeads
    from .call import AttentionCall

NOT_FOUND = (
    "Attune cannot find the model's attention layers, since another node has put a function of its own in place of the model's; take that "
    "node out."
)
_KEPT = ("cond_or_uncond", "sample_sigmas", "sigmas", "uuids")  # options of a forward that only embeds a text


@dataclass(frozen=True, eq=False)
class OtherText:
    """Another text; one node's is one object.

    Attributes:
        method: whose it is, for what the user is told.
        conditioning: ComfyUI's, with one entry.
    """

    method: str
    conditioning: list[Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> OtherText:
        return self


def join(conds: Any, texts: Iterable[OtherText]) -> dict[OtherText, str]:
    """Put texts into a guider's conditionings, which it then prepares; returns the role of each."""
    roles = {text: f"attune text {number}" for number, text in enumerate(dict.fromkeys(texts))}
    conds.update({role: comfy.sampler_helpers.convert_cond(text.conditioning) for text, role in roles.items()})
    return roles


@dataclass(frozen=True)
class Inputs:
    """What an APPLY_MODEL wrapper is given: ``original`` is ComfyUI's method below the wrappers, ``more`` its other keywords."""

    original: Any
    base: Any
    x: Tensor
    t: Tensor
    c_concat: Tensor | None
    options: dict[str, Any]
    more: dict[str, Any]


def attending(
    family: Family, texts: Iterable[OtherText], run: SamplingRun | None, given: Inputs
) -> dict[OtherText, TextAttention]:
    """For every text what the conditional rows of a forward attend to with it.

    Raises:
        RuntimeError: outside a sampling run of ComfyUI's, where nobody has prepared the texts.
    """
    out: dict[OtherText, TextAttention] = {}
    for text in texts:
        prepared = None if run is None else run.conds.get(run.texts.get(text, ""))
        if not prepared or "model_conds" not in prepared[0]:
            raise RuntimeError(
                f"{text.method} works with KSampler and other samplers that use ComfyUI's guiders; connect the model to one."
            )
        roles = (0,) if EXTRA in given.options else given.options.get("cond_or_uncond") or (0,)
        chunks = chunks_of(len(given.x), roles, (), wanted=0)
        if not chunks:
            continue
        pictures = len(given.x) // len(roles)
        conds = {
            name: (one := cond.process_cond(batch_size=pictures, area=None)).concat([one] * (len(chunks) - 1))
            for name, cond in prepared[0]["model_conds"].items()
        }
        rows = index_or_slice([row for c in chunks for row in range(c.rows.start, c.rows.stop)], given.x.device)
        out[text] = KeysOfText(family, conds) if family.projects_text else TextOfBlocks(family, text, conds, rows, given)
    return out


class TextAttention(Protocol):
    """What attends to another text."""

    def attend(self, call: AttentionCall, heads: ChosenHeads) -> Tensor:
        """What the chosen rows' queries find with the text, ``[R, H, M, d]``."""
        ...


class KeysOfText:
    """A text in cross-attention that takes keys and values straight from it."""

    def __init__(self, family: Family, conds: Mapping[str, Any]):
        self.family, self.context = family, conds["c_crossattn"]

    def attend(self, call: AttentionCall, heads: ChosenHeads) -> Tensor:
        """What the chosen rows' queries find in the text, ``[R, H, M, d]``."""
        projected = self.family.text_keys(call.site, self.context.to(heads.v))
        k, v = (t.unflatten(-1, (call.site.heads, -1)).transpose(1, 2) for t in projected)
        tiles = len(heads.q) // len(k)
        return heads.attend(k=k.repeat_interleave(tiles, 0), v=v.repeat_interleave(tiles, 0))


class TextOfBlocks:
    """A text that runs through a transformer's blocks beside the picture, block by block.

    A forward of the model in which no block does anything tells what each block is given with this text. It is on a strip of the picture, as
    long as its longer side, which is where some models' text begins to count places. The first block's input is the text's start; later blocks
    go on from the one before.
    """

    def __init__(self, family: Family, text: OtherText, conds: Mapping[str, Any], rows: Any, given: Inputs):
        method: Any = given.original
        if getattr(method, "__self__", None) is not given.base:
            raise RuntimeError(NOT_FOUND)
        self.family, self.method = family, text.method
        self.own = type(family)(family.model)  # counts this text's tokens
        self.options = {name: given.options[name] for name in _KEPT if name in given.options}
        self.calls: dict[Block, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.state: tuple[Any, ...] | None = None
        more = {name: value for name, value in conds.items() if name not in ("c_crossattn", "c_concat", *family.of_picture)}
        more |= {name: given.more[name][rows] for name in family.of_picture if isinstance(given.more.get(name), Tensor)}
        self.x, self.context = family.strip(given.x[rows]), conds.get("c_crossattn")
        concat = None if given.c_concat is None else family.strip(given.c_concat[rows])
        self.kind, self.run = "", None  # as a forward has them
        options = self.own.counting(dict(self.options))
        blocks = {block: self._recorder(block) for block in family.blocks()}
        base: Any = given.base
        seen = view(base, {"diffusion_model": with_blocks(family.model, family.attributes, blocks)})
        t = given.t[rows] if len(given.t) == len(given.x) else given.t
        MethodType(method.__func__, seen)(self.x, t, concat, self.context, None, options, **more)

    def _recorder(self, block: Block) -> Around:
        hand_on = self.family.replay(block, None)

        def act(module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls[block] = args, kwargs
            return hand_on(*args, **kwargs)

        return Around(self.family.block(block), act)

    def attend(self, call: AttentionCall, chosen: ChosenHeads) -> Tensor:
        """Run the block that is going on for this text; returns what the picture's queries find with it, ``[R, H, M, d]``."""
        found: list[Tensor] = []
        kinds = list(call.site.kinds)

        def override(
            function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **settings: Any
        ) -> Tensor:
            kind = kinds.pop(0) if kinds and self.own.is_site(k.shape[-2]) else ""
            if kind != call.kind:
                return function(q, k, v, heads, *args, **settings)
            self.kind = kind
            here: Any = self
            tensors = CallTensors(q, k, v, heads, settings, partial(self.own.in_order, here))
            if kind == "joint":
                return self._joint(call, chosen, tensors, found)
            found.append(chosen.kernel(chosen.q, tensors.k, tensors.v, tensors.mask(slice(None), slice(0, 1))))
            return function(q, k, v, heads, *args, **settings)

        args, kwargs = self.family.given(*self.calls[call.site.block], self.state)
        args, kwargs = self.own.with_options(args, kwargs, {**self.options, "optimized_attention_override": override})
        with persistent():
            out = self.family.block(call.site.block)(*args, **kwargs)
        self.state = out if isinstance(out, tuple) else (out,)
        return found[0]

    def _joint(self, call: AttentionCall, chosen: ChosenHeads, tensors: CallTensors, found: list[Tensor]) -> Tensor:
        """Attention of this text's tokens and the picture's, to each other; the strip's tokens get nothing."""
        if tensors.settings.get("mask") is not None or chosen.mask is not None:
            raise ValueError(
                f"{self.method} does not work where a mask hides tokens of the prompt from the picture (a style model's or an attention mask); "
                "take that node out."
            )
        forward: Any = self
        own = self.own.text_part(self.own.tokens(forward, tensors.q.shape[2], tensors.k.shape[2]))
        text, looking = self.own.text_part(call.tokens), tensors.q[:, :, own]

        def with_own(whole: Tensor, part: Tensor) -> Tensor:
            return torch.cat([whole[:, :, : text.start], part[:, :, own].to(whole.dtype), whole[:, :, text.stop :]], dim=2)

        q = torch.cat([looking.to(chosen.q.dtype), chosen.q], dim=2)
        out = chosen.kernel(q, with_own(chosen.all_keys, tensors.k), with_own(chosen.all_values, tensors.v), None)
        found.append(out[:, :, looking.shape[2] :])
        given = torch.zeros_like(tensors.q)
        given[:, :, own] = out[:, :, : looking.shape[2]]
        return tensors.join(given)
