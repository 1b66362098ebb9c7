"""What a method may ask of attention: four requests as plain data.

In their callbacks ``R`` are the request's rows of the batch, ``h`` its heads (``H``: all heads), ``M`` the image tokens that look, ``N``
the keys, ``T`` the request's columns of keys, ``d`` the width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from .blends import ChosenHeads
    from .call import AttentionCall
    from .effects import Effect
    from .texts import OtherText

COND, UNCOND, ALL = "cond", "uncond", "all"
IMAGE, TEXT = "image", "text"
PIXELS = "pixels"

Rows: TypeAlias = str | tuple[int, ...]
Columns: TypeAlias = tuple[int, ...] | str | None
Where: TypeAlias = Mapping[tuple[str, str], tuple[int, ...] | None]


@dataclass(frozen=True)
class Span:
    """A part of sampling, from ``start`` to ``end`` (fractions, both included), as ComfyUI's conditioning ranges are."""

    start: float = 0.0
    end: float = 1.0

    @classmethod
    def checked(cls, method: str, start_percent: float, end_percent: float) -> Span:
        """A node's span.

        Raises:
            ValueError: when it is the wrong way round.
        """
        if start_percent > end_percent:
            raise ValueError(f"{method}: start_percent ({start_percent}) is after end_percent ({end_percent}); swap them.")
        return cls(start_percent, end_percent)

    @property
    def whole(self) -> bool:
        """Whether it is all of sampling."""
        return self.start <= 0 and self.end >= 1

    def levels(self, model_sampling: Any) -> tuple[float, float]:
        """The lowest and the highest noise level inside; may wait for the device."""
        return model_sampling.percent_to_sigma(self.end), model_sampling.percent_to_sigma(self.start)

    def holds(self, sigma: Tensor, model_sampling: Any) -> bool:
        """Whether the step at noise level ``sigma`` is inside; in a sampling run ask the run, which waits for the device less often."""
        if self.whole:
            return True
        low, high = self.levels(model_sampling)
        return low <= float(sigma.flatten()[0]) <= high


@dataclass(frozen=True)
class Request:
    """What all requests say.

    Attributes:
        where: ``{(site, kind): heads}``; heads ``None`` is all of them.
        rows: ``cond``, ``uncond`` or ``all``; in a forward of our own also a tuple: these pictures of every chunk of it. In such a forward
            every row counts as conditional.
        span: when.
        effect: what is marked where it changes something.
    """

    where: Where
    _: KW_ONLY
    rows: Rows = ALL
    span: Span = Span()
    effect: Effect | None = None


@dataclass(frozen=True)
class ShareMap(Request):
    """Rows use another row's map, its q and k, with their own values; in a UNet's self-attention, q and k that no row uses are not computed.

    Attributes:
        source: ``source(call) -> rows``: for every row of the batch the row whose q and k it uses, or a `MapSource`.
    """

    source: Callable[[AttentionCall], Sequence[int] | Tensor | MapSource]


@dataclass(frozen=True)
class MapSource:
    """What the source of a `ShareMap` may answer in place of row numbers, where a batch comes in several forwards.

    Attributes:
        rows: for every row of the batch the row whose q and k it uses; ``batch + i`` is row ``i`` of ``kept``.
        kept: q and k ``[G, H, M or N, d]`` of an earlier forward.
        keep: rows of this batch whose q and k the listener is given, as ``kept`` of a later forward.
        listener: ``listener(q, k)``.
    """

    rows: Sequence[int]
    kept: tuple[Tensor, Tensor] | None = None
    keep: tuple[int, ...] = ()
    listener: Callable[[Tensor, Tensor], None] | None = None


@dataclass(frozen=True)
class WeightsRequest(Request):
    """What requests of attention weights have in common.

    Attributes:
        columns: key columns ``[T]``: text columns in cross and joint attention, pixels in self-attention; ``None`` is all of them,
            `PIXELS` all image tokens of joint attention.
        prompt_columns: how many columns the prompt that ``columns`` belong to has. ComfyUI repeats a short prompt that shares a batch
            with a longer one, so a column's weight may be spread over copies: with this number, the callback gets their sum, and new
            weights are spread over them again. A call whose columns are not a multiple of it is of another prompt and is left alone.
    """

    _: KW_ONLY
    columns: Columns = None
    prompt_columns: int | None = None


@dataclass(frozen=True)
class EditWeights(WeightsRequest):
    """Change the weights of a few columns, by a low-rank correction of the output.

    Attributes:
        edit: ``edit(call, weights [R, H, M, T]) -> (new weights, factor [R, H, M, 1] on all other columns or None)``, or None to leave
            them as they are.
        tokens: whose weights they are: of what looks, ``image`` or, in joint attention, ``text``. Readers are shown the image's only.
    """

    edit: Callable[[AttentionCall, Tensor], tuple[Tensor, Tensor | None] | None]
    _: KW_ONLY
    tokens: str = IMAGE

    def __post_init__(self) -> None:
        _check_tokens(self, (IMAGE, TEXT))


@dataclass(frozen=True)
class ReadWeights(WeightsRequest):
    """Look at weights, with gradients if they flow. Nothing is read in forwards of our own but what they ask for themselves.

    Attributes:
        read: ``read(call, weights [R, h, M, T])``, or ``[R, M, T]`` with ``mean_heads``.
        mean_heads: the mean over heads only, which never stores single heads.
    """

    read: Callable[[AttentionCall, Tensor], None]
    _: KW_ONLY
    mean_heads: bool = False


@dataclass(frozen=True)
class BlendOutputs(Request):
    """Mix the output of chosen heads with something else.

    Attributes:
        blend: ``blend(call, heads) -> out [R, h, M, d]``, where ``heads`` gives the kernel's output, q, k and v of the chosen rows, heads
            and tokens, and attention with some of them replaced.
        tokens: whose output it is: ``image``, ``text`` (in joint attention) or ``all``, which in joint attention is text and image.
        ignores_output: the blend does not use the kernel's output, which is spared where all of it is ignored.
        text: another text, for which the blend may ask (`ChosenHeads.with_text`).
    """

    blend: Callable[[AttentionCall, ChosenHeads], Tensor]
    _: KW_ONLY
    tokens: str = IMAGE
    ignores_output: bool = False
    text: OtherText | None = None

    def __post_init__(self) -> None:
        _check_tokens(self, (IMAGE, TEXT, ALL))


def _check_tokens(request: EditWeights | BlendOutputs, known: tuple[str, ...]) -> None:
    if request.tokens not in known:
        raise ValueError(f"tokens must be {', '.join(known[:-1])} or {known[-1]}, not {request.tokens!r}")
    if request.tokens == TEXT and (apart := [f"{site} ({kind})" for site, kind in request.where if kind != "joint"]):
        raise ValueError(f"text tokens have an output of their own in joint attention only, not at {apart[0]}")
