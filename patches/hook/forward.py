"""One forward of the diffusion model with requests on it: knows which attention call is which, and serves it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...methods.attention import attend
from .blends import blend, ignored
from .call import AttentionCall
from .edits import edit_and_read
from .families.base import Family
from .requests import BlendOutputs, EditWeights, ReadWeights, Request, ShareMap
from .run import EXTRA, RUN, ExtraForward, SamplingRun, step_at
from .sharing import SharedMaps
from .sites import Site
from .tensors import CallTensors, Kernel, index_or_slice
from .texts import OtherText, TextAttention

OVERRIDE = "optimized_attention_override"  # ComfyUI's name of it
PLAIN = {"attention_pytorch"}  # ComfyUI's functions whose kernel can be asked for the sums of its rows too
PLACES = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")  # of ComfyUI's attention functions, after the heads


@dataclass
class Requests:
    """What is asked of one place, each kind in the order of the nodes."""

    shares: list[ShareMap] = field(default_factory=list)
    edits: list[EditWeights] = field(default_factory=list)
    reads: list[ReadWeights] = field(default_factory=list)
    blends: list[BlendOutputs] = field(default_factory=list)

    def add(self, request: Request) -> None:
        if isinstance(request, ShareMap):
            self.shares.append(request)
        elif isinstance(request, EditWeights):
            self.edits.append(request)
        elif isinstance(request, ReadWeights):
            self.reads.append(request)
        elif isinstance(request, BlendOutputs):
            self.blends.append(request)


class Forward:
    """One forward of the diffusion model with requests on it.

    Attributes:
        x, context: the model's input and text.
        options: of this forward alone.
        texts: what the conditional rows attend to with other texts than the prompt.
        name: the site of the calls that come next; no name where they are none of ours.
        kind: of the call that is going on.
        to_come: kinds of the calls that come next, in order.
        previous: another pack's override, which ours calls.
        shape: of the activations there, in a UNet.
    """

    def __init__(
        self,
        family: Family,
        asked: Sequence[Request],
        x: Tensor,
        context: Tensor | None,
        options: dict[str, Any],
        first_times: tuple[bool, ...] = (),
        texts: Mapping[OtherText, TextAttention] | None = None,
    ):
        self.texts = texts or {}
        self.x, self.context, self.options, self.first_times = x, context, options, first_times
        self.family = family
        self.run: SamplingRun | None = options.get(RUN)
        known = {} if self.run is None else self.run.sites
        if id(family.model) not in known:
            known[id(family.model)] = {site.name: site for site in family.sites()}
        self.by_name = known[id(family.model)]
        self.by_place: dict[tuple[str, str], Requests] = {}
        for request in asked:
            for place in request.where:
                self.by_place.setdefault(place, Requests()).add(request)
        self.previous = options.get(OVERRIDE)
        self.state: dict[Any, Any] = {}
        self.functions: dict[tuple[str, str], Callable[..., Tensor] | None] = {}
        self.name = self.kind = ""
        self.to_come: list[str] = []
        self.shape: Sequence[int] = ()
        self.busy = False
        self.shared: SharedMaps | None = None  # of the call that comes next, where its q and k are already fewer

    # --- which call is this? ---

    def at(self, name: str, kind: str) -> None:
        """The call that comes next is at this place."""
        self.name, self.to_come, self.shared = name, [kind], None

    @contextlib.contextmanager
    def inside(self, name: str, options: dict[str, Any] | None) -> Iterator[None]:
        """While the block of a site runs: its calls of attention, in the site's own order of kinds, come to us.

        Outside of the blocks that somebody asks about there is no override of ours, so that ComfyUI attends there as if we were not.
        """
        options = {} if options is None else options
        before = self.previous = options.get(OVERRIDE)
        self.name, self.to_come = name, list(self.by_name[name].kinds)
        options[OVERRIDE] = self.override
        try:
            yield
        finally:
            self.name, self.to_come = "", []
            if before is None:
                options.pop(OVERRIDE, None)
            else:
                options[OVERRIDE] = before

    def asked_sites(self) -> list[Site]:
        """The sites that somebody asks about."""
        return [site for site in self.by_name.values() if any((site.name, kind) in self.by_place for kind in site.kinds)]

    def needed(self, n: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of self-attention's input whose q and k are used: where rows share a map, only those it comes from."""
        asked = self.by_place.get((self.name, "self"))
        if asked is None or not asked.shares or n.shape[0] != context.shape[0]:
            return n, context
        self.kind = "self"
        shared = SharedMaps.of(self._call(n.shape[0], n.shape[1], context.shape[1]), asked.shares)
        if shared is None or len(shared.needed) == n.shape[0]:
            return n, context
        own = shared.needed or [0]  # attention of no rows is a case that kernels do not know
        self.shared = replace(shared, own=own)
        which = index_or_slice(own, n.device)
        return n[which], context[which]

    def around_owner(self, q: Tensor, k: Tensor, v: Tensor, heads: int, owner: Callable[..., Tensor]) -> Tensor:
        """A call that another pack owns, which computes the output instead of the block."""
        if (self.name, self.to_come[0]) not in self.by_place:
            return owner(q, k, v)
        self.kind = self.to_come.pop(0)

        def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return owner(q, k, v).clone()  # blends write to it, and the owner may hold on to it

        return self._serve(CallTensors(q, k, v, heads, {}), Kernel(whole, optimized_attention, {}, block_replaced=True))

    def override(
        self, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """ComfyUI's ``optimized_attention_override``."""

        def chained(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
            if self.previous is not None:
                return self.previous(function, q, k, v, heads, *args, **kwargs).clone()  # it may hold on to it
            return function(q, k, v, heads, *args, **kwargs)

        if self.busy or self.name not in self.by_name or not self.to_come or not self.family.is_site(k.shape[-2]):
            return chained(q, k, v, heads, *args, **kwargs)
        self.kind = self.to_come.pop(0)
        function = self._own_function() or function
        if (self.name, self.kind) not in self.by_place:
            return chained(q, k, v, heads, *args, **kwargs)
        settings = {**dict(zip(PLACES, args, strict=False)), **kwargs}

        def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return chained(q, k, v, heads, *args, **kwargs)

        plain = self.previous is None and getattr(function, "__name__", "") in PLAIN and settings.get("mask") is None
        tensors = CallTensors(q, k, v, heads, settings, partial(self.family.in_order, self))
        return self._serve(tensors, Kernel(whole, chained, settings, plain))

    def _own_function(self) -> Callable[..., Tensor] | None:
        """The kernel that a checkpoint asks for at this place, if any.

        ComfyUI forgets about it as soon as there is an override, whatever that does; with another pack's override it would have been
        forgotten without us.
        """
        if self.previous is not None:
            return None
        place = (self.name, self.kind)
        if place not in self.functions:
            module = self.family.attention_module(self.by_name[self.name], self.kind)
            choices = (getattr(m, "comfy_attention", None) for m in module.modules())
            self.functions[place] = getattr(next((c for c in choices if c is not None), None), "function", None)
        return self.functions[place]

    def _call(self, batch: int, queries: int, keys: int) -> AttentionCall:
        """Grid, tokens, rows and step of the attention call that is going on."""
        options, schedule = self.options, self.options.get("sample_sigmas")
        chunks = tuple(options.get("cond_or_uncond") or (0,))
        own: ExtraForward | None = options.get(EXTRA)
        return AttentionCall(
            site=self.by_name[self.name],
            kind=self.kind,
            tokens=self.family.tokens(self, queries, keys),
            batch=batch,
            chunks=chunks if batch % len(chunks) == 0 else (0,),
            perturbed=own is not None,
            uuids=tuple(options.get("uuids") or ()),
            latent=(self.x.shape[-2] * (self.x.shape[2] if self.x.ndim == 5 else 1), self.x.shape[-1]),
            sigma=options.get("sigmas"),
            steps=None if schedule is None else len(schedule) - 1,
            which_step=lambda: self.step,
            run=self.run,
            forward=self.state,
            first_times=self.first_times,
            texts=self.texts,
            tiles=max(1, batch // len(self.x)),
            source=own.rows if own else None,
        )

    @cached_property
    def step(self) -> int | None:
        """Number of the sampling step; worked out once a forward."""
        sigmas, schedule = self.options.get("sigmas"), self.options.get("sample_sigmas")
        if sigmas is None or schedule is None:
            return None
        return step_at(sigmas, schedule) if self.run is None else self.run.step(sigmas, schedule)

    # --- serving a call ---

    def _serve(self, tensors: CallTensors, kernel: Kernel) -> Tensor:
        asked = self.by_place[self.name, self.kind]
        call = self._call(tensors.given[2].shape[0], tensors.q.shape[2], tensors.k.shape[2])
        shared, self.shared = self.shared, None
        self.busy = True
        try:
            return serve(call, asked, tensors, kernel, shared)
        finally:
            self.busy = False


def serve(
    call: AttentionCall, asked: Requests, tensors: CallTensors, kernel: Kernel, shared: SharedMaps | None = None
) -> Tensor:
    """The output of one call, in the layout that its caller expects, after everything that is asked of it.

    Args:
        shared: whose map each row uses, where that is known already.
    """
    shared = SharedMaps.of(call, asked.shares) if shared is None else shared
    spared = ignored(call, asked.blends, tensors.heads)
    q, k, mask_rows, total = tensors.q, tensors.k, None, None
    if shared is not None:
        all_q, all_k, places = shared.gather(tensors)
        if asked.edits or asked.reads or spared:
            which = index_or_slice(places, q.device)
            q, k = all_q[which], all_k[which]
        mask_rows = shared.mask_rows
    if spared:
        out = torch.empty_like(q)
    elif shared is not None:
        out = shared.attend(tensors, all_q, all_k, places, kernel)
    else:
        edited = kernel.plain and any(call.rows(request.rows) != [] for request in asked.edits)
        told = attend(q, k, tensors.v, tensors.scale) if edited else None
        out, total = (tensors.open(kernel.whole(*tensors.given)), None) if told is None else told
    requests = (asked.edits, asked.reads)
    qk = (q, k, total)
    out = edit_and_read(call, requests, tensors, qk, out, mask_rows=mask_rows, block_replaced=kernel.block_replaced)
    for request in asked.blends:
        out = blend(call, request, tensors, out, kernel)
    return tensors.join(out)
