"""The one attention hook: every method of this pack touches attention through `request`, and nothing else does.

A method says where (sites, kinds, heads), who (which rows of the batch), when (a span of sampling) and what, in one of
four verbs:

- ``share``: rows use another row's map, its q and k, with their own values;
- ``edit``: change the weights of a few columns (a low-rank correction of the output);
- ``read``: hand a reduced map to a listener, with gradients if they flow;
- ``blend``: mix the output of chosen heads with something else.

At one call of attention they come in that order, and within a verb in the order of the nodes in the graph: readers see the
map that was really used, blends have the last word.

Requests are plain data on a cloned ModelPatcher. While a forward of the model runs, an APPLY_MODEL wrapper puts our override,
chained to the one that is already there, into that forward's own options; a call that nobody asked for, and a forward outside
every span, goes straight to ComfyUI. State lives in a `Run`, born when sampling starts and gone when it ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import comfy.patcher_extension
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...methods import attention as maths
from . import prefix_cache
from .sites import Site, family, sites

KEY = "attune"  # of our wrappers, and of the requests in transformer_options
RUN = "attune_run"
PASS = "attune_pass"
MINIMUM = "ComfyUI 0.3.60"
VERBS = ("share", "edit", "read", "blend")
COND, UNCOND, ALL = "cond", "uncond", "all"
PIXELS = "pixels"

ModelPatcher: TypeAlias = Any  # comfy.model_patcher.ModelPatcher
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


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

    def holds(self, sigma: Tensor, model_sampling: Any) -> bool:
        """Whether the step at noise level ``sigma`` is inside."""
        if self.start <= 0 and self.end >= 1:
            return True  # spares a wait for the device
        now = float(sigma.flatten()[0])
        return model_sampling.percent_to_sigma(self.end) <= now <= model_sampling.percent_to_sigma(self.start)


@dataclass(frozen=True)
class Request:
    """What one method wants of attention.

    Attributes:
        verb: ``share``, ``edit``, ``read`` or ``blend``.
        where: ``{(site, kind): heads}``; heads ``None`` is all of them.
        act: called at every such attention call, with rows ``R``, chosen heads ``h``, image queries ``M``, columns ``T``:

            - share: ``act(call) -> source [B]``, for every row of the batch the row whose q and k it uses (or a `Source`); in a UNet's
              self-attention, q and k that no row uses are then not computed;
            - edit: ``act(call, weights [R, H, M, T]) -> (new weights, factor [R, H, M, 1] on all other columns or None)``, or None to
              leave them as they are;
            - read: ``act(call, weights [R, h, M, T])``, or ``[R, M, T]`` with ``mean_heads``;
            - blend: ``act(call, out [R, h, M, d], value [R, h, N, d]) -> out``; ``N`` is ``M`` in self and joint attention.
        rows: ``cond``, ``uncond``, ``all``, or the number of one perturbation of our own perturbed pass (which may come in any
            order, and not all in one batch); a tuple is these pictures of whatever chunk of that pass. In it every row counts as
            conditional, and nothing is read.
        span: when.
        columns: key columns ``[T]`` to edit or read: text columns in cross and joint attention, pixels in self-attention;
            ``None`` is all of them, `PIXELS` all image tokens of joint attention.
        period: tokens of the prompt that ``columns`` belong to. ComfyUI repeats a short prompt that shares a batch with a longer one,
            so a column's weight may be spread over copies: with a period, ``act`` gets their sum, and new weights are spread over them
            again. A call whose columns are not a multiple of it is of another prompt and is left alone.
        mean_heads: read the mean over heads only, which never stores single heads.
        covers: the blend does not use ``out``: the kernel may be spared where every row and head is covered.
    """

    verb: str
    where: Mapping[tuple[str, str], tuple[int, ...] | None]
    act: Callable[..., Any]
    rows: str | int | tuple[int, ...] = ALL
    span: Span = Span()
    columns: tuple[int, ...] | str | None = None
    mean_heads: bool = False
    ignores_output: bool = False
    prompt_columns: int | None = None

    def __post_init__(self) -> None:
        if self.verb not in VERBS:
            raise ValueError(f"verb must be one of {', '.join(VERBS)}, not {self.verb!r}")


@dataclass(frozen=True)
class Source:
    """What a ``share`` may answer in place of row numbers, where a batch comes in several forwards.

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


@dataclass
class SamplingRun:
    """What lives while one sampling run lasts: recorded prefixes and every method's own state.

    ``conds`` are the guider's conditionings by role, ``sites`` the places of the models met so far; ``finished`` is called, in
    order, after a run that came to its end; ``seed`` is the sampler's, or None where it has none.
    """

    conds: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    sites: dict[int, dict[str, Site]] = field(default_factory=dict)
    prefixes: prefix_cache.PrefixCache = field(default_factory=prefix_cache.PrefixCache)
    state: dict[Any, Any] = field(default_factory=dict)
    finished: list[Callable[[], None]] = field(default_factory=list)
    seed: int | None = None


@dataclass(frozen=True)
class ExtraForward:
    """A forward of our own, beside the normal one: its own requests, and whether it may replay a recorded prefix.

    ``rows`` says which of the normal forward's pictures each of its own is; None: the same ones.
    """

    requests: tuple[Request, ...]
    replay_before: tuple[str, int] | None = None
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention, as methods see it.

    Attributes:
        site, kind: where.
        height, width: the image tokens' grid.
        image, text: which tokens (queries and keys) are image, which keys are text.
        batch: rows in the call; ``chunks[i]`` (0 conditional, 1 unconditional) is what chunk ``i`` of equal parts of it is.
        perturbed: this is a perturbed pass of ours, where a chunk's number is its perturbation's.
        uuids: ComfyUI's name of the conditioning that each chunk belongs to.
        latent: height and width of the latent of this forward (smaller than the picture's under a conditioning area).
        sigma: noise level, ``[pictures]``.
        steps: how many the sampler makes, or None outside one.
        step: number of the sampling step, or None outside a sampler.
        run: the run's state, or None outside a sampling run.
    """

    site: Site
    kind: str
    height: int
    width: int
    image: slice
    text: slice
    batch: int
    chunks: tuple[int, ...]
    perturbed: bool
    uuids: tuple[Any, ...]
    latent: tuple[int, int]
    sigma: Tensor | None
    steps: int | None
    step: int | None
    run: SamplingRun | None

    def rows(self, who: str | int | tuple[int, ...]) -> slice | list[int]:
        """Row numbers of a role; a slice where it is everything."""
        size = self.batch // len(self.chunks)
        if who == ALL or (who == COND and self.perturbed):
            return slice(0, self.batch)
        if isinstance(who, tuple):
            return [i * size + j for i in range(len(self.chunks)) for j in who] if self.perturbed else []
        if self.perturbed != isinstance(who, int):  # roles belong to the normal pass, numbers to a perturbed one
            return []
        wanted = who if isinstance(who, int) else 0 if who == COND else 1
        return [i * size + j for i, chunk in enumerate(self.chunks) if chunk == wanted for j in range(size)]


# --- registering ----------------------------------------------------------------------------------------------------


def request(model: ModelPatcher, *requests: Request) -> None:
    """Add requests to a model that is already this node's own clone.

    Raises:
        RuntimeError: when this ComfyUI is too old to carry the hook.
    """
    install(model)
    options = model.model_options.setdefault("transformer_options", {})
    options[KEY] = (*options.get(KEY, ()), *requests)


def install(model: ModelPatcher) -> None:
    """Make a cloned model carry the hook (once, however many nodes ask).

    Raises:
        RuntimeError: when this ComfyUI is too old to carry the hook.
    """
    wrappers = comfy.patcher_extension.WrappersMP
    if not hasattr(wrappers, "APPLY_MODEL") or not hasattr(model, "add_wrapper_with_key"):
        raise RuntimeError(f"Attune needs {MINIMUM} or newer: please update ComfyUI.")
    for kind, wrapper in ((wrappers.OUTER_SAMPLE, _outer_sample), (wrappers.APPLY_MODEL, _apply_model)):
        if not model.wrappers.get(kind, {}).get(KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)


def step_at(sigma: Tensor, schedule: Tensor) -> int:
    """Number of the sampling step that the noise level ``sigma`` is of; an evaluation between two steps is of the first."""
    return int((schedule >= sigma.flatten()[0] * (1 - 1e-6)).sum()) - 1


def with_extra_forward(model_options: dict[str, Any], own: ExtraForward) -> dict[str, Any]:
    """A copy of a sampler's model options that makes the forwards under it the given pass."""
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), PASS: own}}


def model_sites(model: ModelPatcher) -> tuple[str, tuple[Site, ...]]:
    """Family and sites of a MODEL.

    Raises:
        ValueError: for a model that this pack has no sites for.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    return family(diffusion_model), sites(diffusion_model)


# --- while sampling -------------------------------------------------------------------------------------------------


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE: give the run its state; the guider drops these options when the run ends, whatever ends it."""
    seed = kwargs.get("seed", args[7] if len(args) > 7 else None)
    run = SamplingRun(getattr(executor.class_obj, "conds", {}), seed=seed)
    if "middle" in run.conds:  # ComfyUI's numbers of roles mean something else there
        raise ValueError(
            "Attune's nodes do not work with DualCFGGuider, which guides by three prompts at once. Use CFGGuider or a KSampler, or connect the "
            "model from before them."
        )
    executor.class_obj.model_options.setdefault("transformer_options", {})[RUN] = run
    out = executor(*args, **kwargs)
    for publish in run.finished:
        publish()
    return out


def _apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """APPLY_MODEL: carry out what is asked of this forward, if anything is."""
    options = transformer_options or {}
    own: ExtraForward | None = options.get(PASS)
    base = executor.class_obj
    asked = [r for r in options.get(KEY, ()) if not (own and r.verb == "read") and r.span.holds(t, base.model_sampling)]
    asked += own.requests if own else ()
    run: SamplingRun | None = options.get(RUN)
    prefixes = () if own else prefix_cache.wanted(options, t, base.model_sampling)
    if not asked and own is None and not prefixes:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    options = options.copy()
    with contextlib.ExitStack() as stack:
        if asked:
            stack.enter_context(Forward(base.diffusion_model, asked, x, c_crossattn, options).installed())
        if run is not None and prefixes:
            stack.enter_context(run.prefixes.record(base.diffusion_model, prefixes, x, options))
        if run is not None and own is not None and own.replay_before is not None:
            stack.enter_context(run.prefixes.replay(base.diffusion_model, own.replay_before, x, options, own.rows))
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


class Forward:
    """One forward of the diffusion model with requests on it: knows which attention call is which, and serves it."""

    def __init__(
        self, diffusion_model: nn.Module, asked: list[Request], x: Tensor, context: Tensor | None, options: dict[str, Any]
    ):
        self.model, self.x, self.context, self.options = diffusion_model, x, context, options
        self.family = family(diffusion_model)
        run: SamplingRun | None = options.get(RUN)
        known = {} if run is None else run.sites
        if id(diffusion_model) not in known:
            known[id(diffusion_model)] = {site.name: site for site in sites(diffusion_model)}
        self.by_name = known[id(diffusion_model)]
        self.by_place: dict[tuple[str, str], list[Request]] = {}
        for r in sorted(asked, key=lambda r: VERBS.index(r.verb)):  # stable: graph order within a verb
            for place in r.where:
                self.by_place.setdefault(place, []).append(r)
        self.previous = options.get("optimized_attention_override")
        self.name = self.kind = ""
        self.seen = 0
        self.shape: list[int] = []
        self.words = 0  # text tokens of FLUX; other packs may put tokens of their own before the prompt's
        self.busy = False
        self.shares: Shares | None = None  # of the call that comes next, where its q and k are already fewer

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put the hook into this forward's options; take our marks off the modules afterwards."""
        handles = []
        self.options["optimized_attention_override"] = self.override
        if self.family == "unet":
            self._mark_unet()
        else:
            for site in self.by_name.values():
                block = getattr(self.model, site.block[0])[site.block[1]]
                handles.append(block.register_forward_pre_hook(self._marker(site.name), with_kwargs=True))
            patches = dict(self.options.get("patches", {}))
            self.options["patches"] = {**patches, "post_input": [*patches.get("post_input", ()), self._count_words]}
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- which call is this? ---

    def _marker(self, name: str) -> Callable[..., Any]:
        def mark(module: nn.Module, args: Any, kwargs: Any) -> Any:
            self.name, self.seen = name, 0
            # SD3's blocks checkpoint themselves under gradients; run again, they would count our calls twice.
            return (args, {**kwargs, "use_checkpoint": False}) if self.family == "sd3" else None

        return mark

    def _count_words(self, args: dict[str, Any]) -> dict[str, Any]:
        self.words = args["txt"].shape[1]
        return args

    def _mark_unet(self) -> None:
        """UNet blocks say where they are in ``attn*_patch``; blocks that a ``patches_replace`` owns are met around the owner."""

        def mark(kind: str) -> Callable[..., Any]:
            def patch(n: Tensor, context: Any, value: Any, extra: dict[str, Any]) -> Any:
                self._locate(kind, extra)
                if kind == "self":
                    n, context = self._needed(n, context, extra)
                return n, context, value

            return patch

        patches = dict(self.options.get("patches", {}))
        replaced = {k: dict(v) for k, v in self.options.get("patches_replace", {}).items()}
        for kind, name in (("self", "attn1"), ("cross", "attn2")):
            patches[f"{name}_patch"] = [*patches.get(f"{name}_patch", ()), mark(kind)]
            for key, owner in replaced.get(name, {}).items():
                replaced[name][key] = self._around(kind, owner)
        self.options["patches"], self.options["patches_replace"] = patches, replaced

    def _needed(self, n: Tensor, context: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The rows of self-attention's input whose q and k are used: where rows share a map, only those it comes from."""
        self.shares = None
        todo = self.by_place.get((self.name, "self"), [])
        block = extra.get("block") or ("", 0)
        owners = self.options["patches_replace"].get("attn1", {})
        block_replaced = block in owners or (*block, extra.get("block_index", 0)) in owners  # it expects every row
        if block_replaced or n.shape[0] != context.shape[0] or not any(r.verb == "share" for r in todo):
            return n, context
        shares = Shares.of(self._call(n.shape[0], n.shape[1], context.shape[1]), todo)
        if shares is None or len(shares.needed) == n.shape[0]:
            return n, context
        own = shares.needed or [0]  # attention of no rows is a case that kernels do not know
        self.shares = replace(shares, own=own)
        which = index_or_slice(own, n.device)
        return n[which], context[which]

    def _locate(self, kind: str, extra: dict[str, Any]) -> None:
        block = extra.get("block") or ("", 0)
        self.name, self.kind = f"{block[0]}.{block[1]}.{extra.get('block_index', 0)}", kind
        self.shape = extra.get("activations_shape", [])

    def _around(self, kind: str, owner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def replacement(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            self._locate(kind, extra)
            if (self.name, kind) not in self.by_place:
                return owner(q, k, v, extra, *args, **kwargs)

            def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return owner(q, k, v, extra, *args, **kwargs).clone()  # blends write to it, and the owner may hold on to it

            return self._attend(q, k, v, extra["n_heads"], kernel, {}, block_replaced=True)

        return replacement

    def override(
        self, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """ComfyUI's ``optimized_attention_override``."""

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.previous is not None:
                return self.previous(function, q, k, v, heads, *args, **kwargs).clone()  # it may hold on to it
            return function(q, k, v, heads, *args, **kwargs)

        if self.busy or self.name not in self.by_name:
            return kernel(q, k, v)
        kind = self.kind
        if self.family != "unet":
            kinds = self.by_name[self.name].kinds
            if self.seen >= len(kinds):
                return kernel(q, k, v)
            kind = kinds[self.seen]
            self.seen += 1
        if (self.name, kind) not in self.by_place:
            return kernel(q, k, v)
        self.kind = kind
        settings = dict(kwargs)
        if args:  # the mask may come by place
            settings["mask"] = args[0]
        return self._attend(q, k, v, heads, kernel, settings)

    def _call(self, batch: int, queries: int, keys: int) -> AttentionCall:
        """Grid, tokens, rows and step of the attention call that is going on."""
        options = self.options
        if self.family == "unet":
            height, width = (self.shape[-2], self.shape[-1]) if self.shape else (1, queries)
            if height * width != queries:  # another pack regroups the tokens (HyperTile and the like)
                height, width = 1, queries
            image, text = slice(0, queries), slice(0, keys)
        else:
            patch: int = self.model.patch_size  # type: ignore[assignment]
            height, width = ((n + patch - 1) // patch for n in self.x.shape[-2:])
            count = height * width
            words = keys - count if self.kind == "joint" else 0  # text comes first; reference pictures come after the image
            prompt = words
            if self.family == "flux" and self.context is not None:
                prompt = self.context.shape[1]
                words = self.words or prompt
            image, text = slice(words, words + count), slice(words - prompt, words)
        chunks = tuple(options.get("cond_or_uncond") or (0,))
        run: SamplingRun | None = options.get(RUN)
        return AttentionCall(
            self.by_name[self.name],
            self.kind,
            height,
            width,
            image,
            text,
            batch,
            chunks if batch % len(chunks) == 0 else (0,),
            PASS in options,
            tuple(options.get("uuids") or ()),
            (self.x.shape[-2], self.x.shape[-1]),
            options.get("sigmas"),
            None if (schedule := options.get("sample_sigmas")) is None else len(schedule) - 1,
            self.step,
            run,
        )

    @cached_property
    def step(self) -> int | None:
        """Number of the sampling step; worked out once a forward, since it may wait for the device."""
        sigmas, schedule = self.options.get("sigmas"), self.options.get("sample_sigmas")
        if sigmas is None or schedule is None:
            return None
        return step_at(sigmas, schedule)

    # --- serving a call ---

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        kernel: Kernel,
        settings: dict[str, Any],
        block_replaced: bool = False,
    ) -> Tensor:
        todo = self.by_place[self.name, self.kind]
        tensors = Tensors(q, k, v, heads, settings, block_replaced)
        call = self._call(v.shape[0], tensors.q.shape[2], tensors.k.shape[2])
        shares, self.shares = self.shares, None
        self.busy = True
        try:
            return _serve(call, todo, tensors, kernel, shares)
        finally:
            self.busy = False
            if self.family == "unet":
                self.name = ""  # served: another pack's attention call before the next site is none of ours


class Tensors:
    """q, k, v of a call as ``[B, H, tokens, d]`` views, whatever layout the caller uses, and the way back."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, settings: dict[str, Any], block_replaced: bool = False):
        self.given = (q, k, v)
        self.block_replaced = (
            block_replaced  # another pack computes the output, and may add to the text's (an IP-Adapter's picture)
        )
        self.heads, self.settings = heads, settings
        self.by_head = bool(settings.get("skip_reshape"))
        self.width = q.shape[-1] if self.by_head else q.shape[-1] // heads

    def _split(self, t: Tensor) -> Tensor:
        t = t if self.by_head else t.reshape(t.shape[0], t.shape[1], -1, self.width).transpose(1, 2)
        return t if t.shape[1] == self.heads else t.repeat_interleave(self.heads // t.shape[1], dim=1)  # grouped queries

    @cached_property
    def q(self) -> Tensor:
        return self._split(self.given[0])

    @cached_property
    def k(self) -> Tensor:
        return self._split(self.given[1])

    @cached_property
    def v(self) -> Tensor:
        return self._split(self.given[2])

    @property
    def scale(self) -> float | None:
        return self.settings.get("scale")

    def mask(self, rows: Any, queries: slice) -> Tensor | None:
        """The part of the attention mask for some rows and queries, ``[R or 1, H or 1, M or 1, N]``."""
        mask = self.settings.get("mask")
        if mask is None:
            return None
        mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
        mask = mask if mask.shape[0] == 1 else mask[rows]
        return mask if mask.shape[2] == 1 else mask[:, :, queries]

    def join(self, out: Tensor) -> Tensor:
        """``[B, H, M, d]`` to the layout that the caller expects back."""
        if self.settings.get("skip_output_reshape"):
            return out
        return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)

    def open(self, out: Tensor) -> Tensor:
        """The caller's layout to ``[B, H, M, d]``."""
        if self.settings.get("skip_output_reshape"):
            return out
        return out.view(out.shape[0], out.shape[1], self.heads, -1).transpose(1, 2)


@dataclass(frozen=True)
class Shares:
    """Whose q and k every row of a call uses, after all of its ``share`` requests.

    Attributes:
        rows: numbers as in `Source.rows`.
        own: the rows of the batch that the call's q and k are of; the rest were not computed.
        kept: q and k from earlier forwards, numbered on from the batch.
        answers: what the requests said.
    """

    rows: list[int]
    own: list[int]
    kept: tuple[tuple[Tensor, Tensor], ...]
    answers: tuple[Source, ...]

    @classmethod
    def of(cls, call: AttentionCall, todo: Sequence[Request]) -> Shares | None:
        """Ask the requests of a call; None where there are none."""
        rows, kept, answers = list(range(call.batch)), [], []
        total = call.batch
        for r in todo:
            if r.verb != "share":
                continue
            answer = r.act(call)
            if not isinstance(answer, Source):
                answer = Source(answer.tolist() if isinstance(answer, Tensor) else answer)
            rows = [rows[s] if s < call.batch else s - call.batch + total for s in answer.rows]
            if answer.kept is not None:
                kept.append(answer.kept)
                total += len(answer.kept[0])
            answers.append(answer)
        return cls(rows, list(range(call.batch)), tuple(kept), tuple(answers)) if answers else None

    @cached_property
    def needed(self) -> list[int]:
        """The rows of the batch whose own q and k somebody uses."""
        asked = {row for answer in self.answers for row in answer.keep}
        return sorted(asked | {s for s in self.rows if s < len(self.rows)})

    def gather(self, tensors: Tensors) -> tuple[Tensor, Tensor, list[int]]:
        """All q and k that there are, and each row's place among them; listeners get what they asked for."""
        place = {row: i for i, row in enumerate(self.own)}
        q, k = tensors.q, tensors.k
        for answer in self.answers:
            if answer.listener is not None:
                which = index_or_slice([place[row] for row in answer.keep], q.device)
                answer.listener(q[which].clone(), k[which].clone())
        if self.kept:
            q, k = (torch.cat([own, *more]) for own, more in zip((q, k), zip(*self.kept, strict=True), strict=True))
        batch = len(self.rows)
        return q, k, [place[s] if s < batch else len(self.own) + s - batch for s in self.rows]


def _serve(call: AttentionCall, todo: list[Request], tensors: Tensors, kernel: Kernel, shares: Shares | None = None) -> Tensor:
    shares = Shares.of(call, todo) if shares is None else shares
    blends = [r for r in todo if r.verb == "blend"]
    small = [r for r in todo if r.verb in ("edit", "read")]
    covered = _covered(call, blends, tensors.heads)
    q, k, source = tensors.q, tensors.k, None
    if shares is not None:
        all_q, all_k, places = shares.gather(tensors)
        if small or covered:
            which = index_or_slice(places, q.device)
            q, k = all_q[which], all_k[which]
        # The mask's rows are the batch's; a map from another forward takes the row's own.
        source = torch.tensor([s if s < call.batch else row for row, s in enumerate(shares.rows)])
    if covered:
        out = torch.empty_like(q)
    elif shares is not None and source is not None:
        out = _shared(tensors, shares, all_q, all_k, places, source, kernel)
    else:
        out = tensors.open(kernel(*tensors.given))
    out = _edit_and_read(call, small, tensors, q, k, out, source)
    for r in blends:
        out = _blend(call, r, tensors, out)
    return tensors.join(out)


def _covered(call: AttentionCall, blends: list[Request], heads: int) -> bool:
    """Whether blends that do not look at the kernel's output fill all of it."""
    covering = [r for r in blends if r.ignores_output]
    if not covering or call.kind != "self":
        return False
    covered = torch.zeros(call.batch, heads, dtype=torch.bool)
    for r in covering:
        chosen = r.where[call.site.name, call.kind]
        rows = covered[call.rows(r.rows)]
        rows[:, slice(None) if chosen is None else list(chosen)] = True
        covered[call.rows(r.rows)] = rows
    return bool(covered.all())


def _shared(
    tensors: Tensors, shares: Shares, q: Tensor, k: Tensor, places: list[int], source: Tensor, kernel: Kernel
) -> Tensor:
    """Rows that use the same map attend once, with their values side by side; rows with a map to themselves all at once.

    Args:
        q, k: all that there are ``[G, H, M or N, d]``.
        places: each row's among them.
        source: the row whose mask each row takes.
    """
    device = q.device
    groups: dict[int, list[int]] = {}
    for row, place in enumerate(places):
        groups.setdefault(place, []).append(row)
    alone = [rows[0] for rows in groups.values() if len(rows) == 1 and shares.rows[rows[0]] == rows[0]]
    if tensors.settings.get("mask") is not None:
        alone = []
    order, parts = [*alone], []
    if alone:
        here, rows = index_or_slice([places[row] for row in alone], device), index_or_slice(alone, device)
        given = tensors.given
        parts.append(tensors.open(kernel(given[0][here], given[1][here], given[2][rows])))
    for place, members in groups.items():
        if members[0] in alone:
            continue
        one = slice(place, place + 1)
        mask = tensors.mask(source[members[:1]], slice(None))
        parts.append(maths.shared(q[one], k[one], tensors.v[index_or_slice(members, device)], tensors.scale, mask))
        order += members
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    back = [0] * len(order)
    for i, row in enumerate(order):
        back[row] = i
    return out[index_or_slice(back, device)]


def _edit_and_read(
    call: AttentionCall, todo: list[Request], tensors: Tensors, q: Tensor, k: Tensor, out: Tensor, source: Tensor | None
) -> Tensor:
    """Compute the needed part of the map once, pass it through the edits, correct the output, and show it to the readers.

    Which rows and columns is worked out in plain numbers, which never wait for the device, and most are neighbours: a view.
    """
    keys = k.shape[2]
    offset = call.text.start if call.kind != "self" else 0
    count = (call.text.stop - call.text.start) if call.kind != "self" else keys
    todo = [r for r in todo if (r.prompt_columns is None or count % r.prompt_columns == 0) and call.rows(r.rows) != []]
    if not todo:
        return out
    device = out.device

    def rows_of(r: Request) -> Sequence[int]:
        rows = call.rows(r.rows)
        return range(call.batch)[rows] if isinstance(rows, slice) else rows

    def columns_of(r: Request) -> Sequence[int]:
        """Keys of a request's columns; with a period, all columns of the prompt's first copy before those of its second."""
        if isinstance(r.columns, str):
            return range(call.image.start, call.image.stop)
        if r.columns is None:
            return range(offset, offset + count)
        if r.columns and max(r.columns) >= (r.prompt_columns or count):
            raise ValueError(f"text column {max(r.columns)} does not exist at {call.site.name}: the prompt has {count} columns")
        return [offset + copy + c for copy in range(0, count, r.prompt_columns or count) for c in r.columns]

    def weights(rows: Sequence[int], columns: Sequence[int], heads: Any = slice(None), mean_heads: bool = False) -> Tensor:
        which = index_or_slice(rows, device)
        mask = tensors.mask(which if source is None else source.to(device)[which], call.image)
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, heads]
        image_q = q[which][:, heads, call.image]
        return maths.probabilities(
            image_q, k[which][:, heads], index_or_slice(columns, device), tensors.scale, mask, mean_heads
        )

    edits = [r for r in todo if r.verb == "edit"]
    chosen: dict[int, int] = {}  # edited rows, and the columns that are looked at: their places in the tensors that follow
    union: dict[int, int] = {}
    before = after = rest = torch.empty(0)
    changes = False
    if edits:
        chosen = {row: i for i, row in enumerate(sorted({row for r in edits for row in rows_of(r)}))}
        looked_at = {c for r in todo if r.verb == "edit" or r.columns is not None for c in columns_of(r)}
        union = {c: i for i, c in enumerate(sorted(looked_at))}
        before = after = weights(list(chosen), list(union))
        rest = torch.ones_like(before[..., :1])
        for r in edits:
            rows = index_or_slice([chosen[row] for row in rows_of(r)], device)
            places = index_or_slice([union[c] for c in columns_of(r)], device)
            given = after[rows][..., places]
            folded = _folded(given, r, count)
            edited = r.act(call, folded)
            if edited is None:
                continue
            changes = True
            new, factor = edited
            copies = given.shape[-1] // folded.shape[-1]
            if copies > 1:  # each takes its part of the change
                new = given + ((new - folded) / copies).repeat(1, 1, 1, copies)
            heads = r.where[call.site.name, call.kind]
            if heads is not None:  # the other heads stay
                keep = torch.ones(tensors.heads, dtype=torch.bool, device=device)
                keep[list(heads)] = False
                new = torch.where(keep[:, None, None], given, new)
                factor = None if factor is None else torch.where(keep[:, None, None], torch.ones_like(factor), factor)
            if factor is not None:
                rest = _put(rest, 0, rows, rest[rows] * factor)
            if not isinstance(places, slice) or places != slice(0, len(union)):
                others = after[rows] if factor is None else after[rows] * factor
                new = _put(others, 3, places, new)
            after = _put(after, 0, rows, new)
    if changes:
        which = index_or_slice(list(chosen), device)
        v = tensors.v[which][:, :, index_or_slice(list(union), device)]
        given = out[which][:, :, call.image]
        if tensors.block_replaced:  # only the text's share changes
            text = F.scaled_dot_product_attention(q[which], k[which], tensors.v[which], scale=tensors.scale)
            fixed = given + maths.replace_columns(text, v, before, after, rest) - text
        else:
            fixed = maths.replace_columns(given, v, before, after, rest)
        if out.requires_grad or fixed.requires_grad:
            out = out.clone()
        out[which, :, call.image] = fixed

    for r in todo:
        if r.verb != "read":
            continue
        asked = r.where[call.site.name, call.kind]
        read_heads = slice(None) if asked is None else list(asked)
        row_numbers, columns = rows_of(r), columns_of(r)
        part = weights(row_numbers, columns, read_heads, r.mean_heads and not edits)
        if edits:
            part = _as_edited(part, row_numbers, columns, read_heads, chosen, union, after, rest)
            part = part.mean(dim=1) if r.mean_heads else part
        r.act(call, _folded(part, r, count))
    return out


def index_or_slice(numbers: Sequence[int], device: torch.device) -> Any:
    """An index for some numbers: a slice where they follow each other, which makes a view and starts nothing on the device."""
    first = numbers[0] if len(numbers) else 0
    if isinstance(numbers, range) or list(numbers) == list(range(first, first + len(numbers))):
        return slice(first, first + len(numbers))
    return index(numbers, device)


def index(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers on a device, without waiting for what it does."""
    return torch.tensor(numbers).to(device, non_blocking=device.type == "cuda")


def _put(whole: Tensor, dim: int, places: Any, new: Tensor) -> Tensor:
    """``whole`` with ``new`` at some places of a dimension."""
    if not isinstance(places, slice):
        return whole.index_copy(dim, places, new)
    if places == slice(0, whole.shape[dim]):
        return new
    return whole.slice_scatter(new, dim, places.start, places.stop)


def _folded(weights: Tensor, r: Request, count: int) -> Tensor:
    """Weights of the prompt's columns ``[..., T]``: the sum over the copies of each, where it is there more than once."""
    if r.prompt_columns is None or r.prompt_columns == count or isinstance(r.columns, str):
        return weights
    return weights.unflatten(-1, (count // r.prompt_columns, -1)).sum(dim=-2)


def _as_edited(
    part: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    heads: Any,
    chosen: Mapping[int, int],
    union: Mapping[int, int],
    after: Tensor,
    rest: Tensor,
) -> Tensor:
    """Weights ``[R, h, M, T]`` of some rows and columns after the edits."""
    here = index_or_slice([i for i, row in enumerate(rows) if row in chosen], part.device)
    places = index_or_slice([chosen[row] for row in rows if row in chosen], part.device)
    inside = index_or_slice([i for i, c in enumerate(columns) if c in union], part.device)
    edited = index_or_slice([union[c] for c in columns if c in union], part.device)
    changed = part[here] * rest[places][:, heads]
    changed = _put(changed, 3, inside, after[places][:, heads][..., edited])
    return _put(part, 0, here, changed)


def _blend(call: AttentionCall, r: Request, tensors: Tensors, out: Tensor) -> Tensor:
    """Write the blend of some rows and heads over the kernel's output, for image tokens only."""
    rows = torch.arange(call.batch, device=out.device)[call.rows(r.rows)]
    if not len(rows):
        return out
    heads = r.where[call.site.name, call.kind]
    chosen = torch.arange(tensors.heads, device=out.device) if heads is None else index(heads, out.device)
    value = tensors.v if call.kind == "cross" else tensors.v[:, :, call.image]
    which = (rows[:, None], chosen[None, :])
    mixed = r.act(call, out[:, :, call.image][which], value[which])
    if out.requires_grad or mixed.requires_grad:
        out = out.clone()
    out[:, :, call.image][which] = mixed
    return out
