"""Detail++ on ComfyUI models: all branches of a prompt in one batch, sharing a layout, each painting inside its subject's region.

Rows of every batch are branch by branch, ``[branch 0's pictures, branch 1's pictures, …]``, and all branches have the same noise,
so that the ``n + 1`` rows of a picture differ by their prompts only.

The paper blends the latents after a step, ``z_{t-1} ← blend(z_{t-1})``. Samplers keep their latents to themselves, but every sampler
that is supported here makes the next latent by a rule that is linear in the model's input, its prediction, its earlier predictions
and noise, with the same factors for all rows. Blending is linear too and leaves alone what is the same in all branches, noise above
all; so blending the rule's ingredients is blending its result, exactly. `Blending` stands between sampler and model and does
that: it blends, in place, the tensor it was called with (the sampler's own), the prediction it returns and those it returned before
(a multi-step sampler's history). Samplers that keep anything else from step to step are refused.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.k_diffusion import sampling as k_diffusion
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ...methods import detail as maths
from ...server import previews as live
from ..hook.attention import (
    COND,
    KEY,
    AttentionCall,
    ExtraForward,
    ModelPatcher,
    Request,
    Source,
    install,
    model_sites,
    with_extra_forward,
)
from ..hook.prefix_cache import blocks
from ..hook.sites import Site
from ..prompts import refuse

BRANCH = "attune_branch"  # in a conditioning's options: the `Branch` that it is
BRANCHES = "attune_branches"  # in those of branches merged into one
OPTIMIZE = ("off", "entropy", "entropy + centroid")
FINISH = ("last branch", "whole prompt")
STRIDE = 4  # latent pixels per token where subjects are looked for, and from where on the layout is shared
HISTORY = 2  # earlier predictions that a supported sampler may hold
PIXELS = 8  # per latent pixel, in every UNet
ROWS = ("mask", "concat_latent_image", "concat_mask")  # tensors in a conditioning's options that have a row per picture

NORMAL, TREE, TREE_GPU = "normal", "brownian tree", "brownian tree on the device"
# How often a step calls the model (the last one always once), and where its noise comes from.
SAMPLERS: dict[str, tuple[int, str | None]] = {
    "euler": (1, None),
    "euler_ancestral": (1, NORMAL),
    "heun": (2, None),
    "heunpp2": (3, None),
    "dpm_2": (2, None),
    "dpm_2_ancestral": (2, NORMAL),
    "dpmpp_2s_ancestral": (2, NORMAL),
    "dpmpp_sde": (2, TREE),
    "dpmpp_sde_gpu": (2, TREE_GPU),
    "dpmpp_2m": (1, None),
    "dpmpp_2m_sde": (1, TREE),
    "dpmpp_2m_sde_gpu": (1, TREE_GPU),
    "dpmpp_2m_sde_heun": (1, TREE),
    "dpmpp_2m_sde_heun_gpu": (1, TREE_GPU),
    "dpmpp_3m_sde": (1, TREE),
    "dpmpp_3m_sde_gpu": (1, TREE_GPU),
    "ddpm": (1, NORMAL),
    "lcm": (1, NORMAL),
    "res_multistep": (1, NORMAL),
    "res_multistep_ancestral": (1, NORMAL),
    "seeds_2": (2, NORMAL),
    "seeds_3": (3, NORMAL),
    "ddim": (1, None),
}


@dataclass(frozen=True)
class Place:
    """Where a subject's attention is read: a branch, and the subject's columns in that branch's own prompt."""

    branch: int
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """What a branch's conditioning carries to the sampler.

    Attributes:
        index, count: which one of how many; 0 is the base, which gives the layout.
        tokens: columns of its prompt.
        subjects: whose regions its details go to; none is the whole picture.
        layout: columns of its subjects in the base's prompt, for the optimisation; none where they are not in it.
        name: of its subjects, for people.
    """

    index: int
    count: int
    tokens: int
    subjects: tuple[Place, ...] = ()
    layout: tuple[tuple[int, ...], ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Settings:
    """The sampler's numbers, as the node has them; ``share_max_tokens`` 0 and ``branches_at_once`` 0 are automatic."""

    share_until: float = 0.8
    share_max_tokens: int = 0
    mask_threshold: float = 0.5
    optimize: str = "off"
    optimize_steps: int = 6
    step_size: float = 1.0
    branches_at_once: int = 0
    finish: str = FINISH[0]


# --- conditioning: many branches, one batch -----------------------------------------------------------------------------


def _of_batch(t: Tensor, pictures: int) -> Tensor:
    """One row per picture, as ComfyUI repeats rows."""
    return comfy.utils.repeat_to_batch_size(t, pictures)


def _tiled(t: Tensor, pictures: int, count: int) -> Tensor:
    """Rows of pictures for all branches; one row for all pictures stays one."""
    return t if t.shape[0] == 1 else _of_batch(t, pictures).repeat(count, *[1] * (t.ndim - 1))


def _tiled_options(options: Mapping[str, Any], pictures: int, count: int) -> dict[str, Any]:
    out = dict(options)
    for name in ROWS:
        if isinstance(out.get(name), Tensor):
            out[name] = _tiled(out[name], pictures, count)
    return out


def tiled(conditioning: Sequence[Any], pictures: int, count: int) -> list[Any]:
    """A conditioning that is the same for all branches (the negative one): its rows for every branch."""
    out = []
    for context, options in conditioning:
        options = _tiled_options(options, pictures, count)
        if isinstance(options.get("pooled_output"), Tensor):
            options["pooled_output"] = _tiled(options["pooled_output"], pictures, count)
        out.append([None if context is None else _tiled(context, pictures, count), options])
    return out


def sets_of_branches(positive: Sequence[Any]) -> list[list[Any]]:
    """The branches in a conditioning, each set in order: more than one set after a schedule or Conditioning Combine.

    Raises:
        ValueError: when there are none, or not all of them.
    """
    found: dict[int, list[Any]] = {}
    for entry in positive:
        if BRANCH in entry[1]:
            found.setdefault(entry[1][BRANCH].index, []).append(entry)
    if not found:
        raise ValueError(
            "Detail++ Sampler: the positive conditioning has no branches. Connect Encode Branches, or what ControlNet, area and timestep "
            "nodes made of its output."
        )
    counts = {entry[1][BRANCH].count for entries in found.values() for entry in entries}
    if len(counts) > 1 or set(found) != set(range(max(counts))) or len({len(e) for e in found.values()}) > 1:
        raise ValueError(
            "Detail++ Sampler: the positive conditioning does not hold every branch equally often. Connect one Encode Branches, without a "
            "node that keeps only some of its conditionings."
        )
    return [list(entries) for entries in zip(*(found[i] for i in sorted(found)), strict=True)]


def merged(branches: Sequence[Any], pictures: int) -> Any:
    """One conditioning of all branches' rows; the base's ControlNet, area and timesteps are everyone's.

    Raises:
        ValueError: for a branch that has lost tokens.
    """
    contexts = []
    for context, options in branches:
        if context is None or context.shape[1] < options[BRANCH].tokens:
            raise ValueError(
                "Detail++ Sampler: a branch's conditioning is shorter than its prompt; another node has cut it. Connect Encode Branches "
                "without that node."
            )
        contexts.append(_of_batch(context, pictures))
    length = math.lcm(*(c.shape[1] for c in contexts))
    context = torch.cat([c.repeat(1, length // c.shape[1], 1) for c in contexts])
    options = _tiled_options(branches[0][1], pictures, len(branches))
    pooled = [o.get("pooled_output") for _, o in branches]
    if all(isinstance(p, Tensor) for p in pooled):
        options["pooled_output"] = torch.cat([_of_batch(p, pictures) for p in pooled])
    del options[BRANCH]
    options[BRANCHES] = tuple((o[BRANCH], c.shape[1]) for c, (_, o) in zip(contexts, branches, strict=True))
    return [context, options]


# --- where -----------------------------------------------------------------------------------------------------------


def mask_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites whose maps say where subjects are: a quarter of the latent's size; elsewhere the coarsest size but one.

    Raises:
        ValueError: for a model without attention to text.
    """
    with_text = [s for s in sites if "cross" in s.kinds]
    if not with_text:
        raise ValueError("Detail++ Sampler: this model has no attention to text; connect a text-to-image model.")
    strides = sorted({s.stride for s in with_text})
    stride = STRIDE if STRIDE in strides else strides[-2:][0]
    return tuple(s for s in with_text if s.stride == stride)


def share_sites(sites: Sequence[Site], latent: tuple[int, int], max_tokens: int, auto: int) -> tuple[Site, ...]:
    """The sites whose self-attention is shared: up to ``max_tokens`` image tokens, or from the stride ``auto`` on where that is 0."""
    if max_tokens == 0:
        return tuple(s for s in sites if s.stride >= auto)
    return tuple(s for s in sites if math.prod(-(-n // s.stride) for n in latent) <= max_tokens)


# --- a run -----------------------------------------------------------------------------------------------------------


class _EnoughError(Exception):
    """The last map has been read: the rest of the forward has nothing to add."""


@dataclass
class _Layout:
    """One conditioning of all branches, as the readers need it: what is asked of which columns.

    Attributes:
        period: columns of the merged prompt.
        columns: those that are read.
        subjects: of each branch: the branch to look at, and where its columns are among those read.
        base: the same for every subject in the base's prompt.
    """

    prompt_columns: int
    columns: tuple[int, ...]
    subjects: list[list[tuple[int, list[int], int]]]
    base: list[tuple[list[int], int]]

    @classmethod
    def of(cls, conditioning: Any) -> _Layout:
        context, options = conditioning
        branches: Sequence[tuple[Branch, int]] = options[BRANCHES]
        prompt_columns = context.shape[1]
        places: dict[int, int] = {}

        def read(columns: Sequence[int], own: int) -> tuple[list[int], int]:
            copies = [c + k for k in range(0, prompt_columns, own) for c in columns]
            return [places.setdefault(c, len(places)) for c in copies], len(columns)

        subjects = [[(p.branch, *read(p.columns, branches[p.branch][1])) for p in b.subjects] for b, _ in branches]
        known = dict.fromkeys(columns for b, _ in branches for columns in b.layout)
        base = [read(columns, branches[0][1]) for columns in known]
        return cls(prompt_columns, tuple(places), subjects, base)


def _plain(uuid: Any) -> Any:
    """A conditioning's own name: its parts in chunks of branches have names of their own."""
    return uuid[0] if isinstance(uuid, tuple) else uuid


@dataclass
class Session:
    """The state of one sampling run.

    Attributes:
        total: branches; ``pictures``: of each; ``latent``: height and width.
        shared: the steps that share and blend.
        names: of the branches with a subject.
        now: the branches in the forward that is going on.
    """

    settings: Settings
    total: int
    pictures: int
    latent: tuple[int, int]
    shared: int
    read_at: tuple[Site, ...]
    share_at: tuple[Site, ...]
    layouts: list[_Layout]
    names: dict[int, str] = field(default_factory=dict)
    guider: Guider = field(init=False)
    now: range = field(init=False)
    reading: bool = False
    sums: dict[tuple[Any, int, int], Tensor] = field(default_factory=dict)
    seen: set[Any] = field(default_factory=set)
    memory: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    current: Tensor | None = None

    def __post_init__(self) -> None:
        self.now = range(self.total)

    @property
    def prompts(self) -> dict[Any, _Layout]:
        """The merged conditionings by the name that ComfyUI gave them."""
        positive = self.guider.original_conds["positive"]
        return {cond["uuid"]: lay for cond, lay in zip((c for c in positive if BRANCHES in c), self.layouts, strict=True)}

    # --- what is asked of attention ---

    def requests(self) -> tuple[Request, ...]:
        """Of a forward in the steps that share."""
        share = Request("share", {(s.name, "self"): None for s in self.share_at}, self.share)
        reads = [self.reader(lay, partial(self.read, lay)) for lay in self.layouts if self.reading and lay.columns]
        return (*([share] if self.share_at else []), *reads)

    def reader(self, lay: _Layout, act: Callable[[AttentionCall, Tensor], None]) -> Request:
        """A look at the subjects' columns, heads averaged, in a forward of conditional rows."""
        where: dict[tuple[str, str], None] = {(s.name, "cross"): None for s in self.read_at}
        return Request("read", where, act, rows=COND, columns=lay.columns, mean_heads=True, prompt_columns=lay.prompt_columns)

    def share(self, call: AttentionCall) -> Source:
        """Conditional rows use the base's map of their picture."""
        size = call.batch // len(call.chunks)
        rows = list(range(call.batch))
        whole = len(self.now) == self.total
        keep: list[int] = []
        keys: list[Any] = []
        kept: list[tuple[Tensor, Tensor]] = []
        for i, role in enumerate(call.chunks):
            if role != 0 and not call.perturbed:
                continue
            first = i * size
            key = (call.site.name, call.perturbed, role, _plain(call.uuids[i]) if i < len(call.uuids) else None)
            if self.now.start == 0:
                origin = first
                if not whole:
                    keep += range(first, first + self.pictures)
                    keys.append(key)
            elif key in self.memory:
                origin = call.batch + len(kept) * self.pictures
                kept.append(self.memory[key])
            else:
                raise RuntimeError(
                    f"Detail++ Sampler: the layout's attention at {call.site.name} was not seen; another node changes which layers run."
                )
            rows[first : first + size] = [origin + r % self.pictures for r in range(size)]

        def listen(q: Tensor, k: Tensor) -> None:
            for n, key in enumerate(keys):
                part = slice(n * self.pictures, (n + 1) * self.pictures)
                self.memory[key] = (q[part], k[part])

        more = (torch.cat([q for q, _ in kept]), torch.cat([k for _, k in kept])) if kept else None
        return Source(rows, more, tuple(keep), listen if keep else None)

    def read(self, lay: _Layout, call: AttentionCall, weights: Tensor) -> None:
        """Add the subjects' maps ``[rows, M, T]`` of one layer to those so far."""
        size = call.batch // len(call.chunks)
        start = -size
        prompts = self.prompts
        for i, role in enumerate(call.chunks):
            if role != 0:
                continue
            start += size
            uuid = call.uuids[i] if i < len(call.uuids) else None
            if prompts.get(_plain(uuid)) is not lay or (uuid, call.site.name) in self.seen:
                continue  # another prompt, or another pack that runs this one again
            self.seen.add((uuid, call.site.name))
            for branch, subjects in enumerate(lay.subjects):
                for subject, (looked_at, places, count) in enumerate(subjects):
                    if looked_at not in self.now:
                        continue
                    first = start + (looked_at - self.now.start) * self.pictures
                    part = weights[first : first + self.pictures][..., places].sum(dim=-1) / count
                    part = part.unflatten(1, (call.height, call.width))
                    key = (_plain(uuid), branch, subject)
                    self.sums[key] = part if key not in self.sums else self.sums[key] + part

    def masks(self, device: torch.device) -> Tensor:
        """``B_1 … B_n``: boolean ``[n, B, 1, H, W]``.

        Raises:
            RuntimeError: when no map was seen.
        """
        height, width = self.latent
        areas = {cond["uuid"]: cond.get("area") for cond in self.guider.conds["positive"]}
        out = []
        for branch in range(1, self.total):
            whole, found = True, False
            mask = torch.zeros(self.pictures, 1, height, width, dtype=torch.bool, device=device)
            for uuid, lay in self.prompts.items():
                h, w, y, x = areas.get(uuid) or (height, width, 0, 0)
                for subject in range(len(lay.subjects[branch])):
                    whole = False
                    maps = self.sums.get((uuid, branch, subject))
                    if maps is None:
                        continue
                    found = True
                    own = maths.subject_masks(maps, self.settings.mask_threshold)[:, None]
                    part = mask[..., y : y + h, x : x + w]
                    part |= F.interpolate(own.float(), size=part.shape[-2:], mode="nearest") > 0.5
            if whole:
                mask = torch.ones_like(mask)
            elif not found:
                raise RuntimeError(
                    "Detail++ Sampler saw no attention to the subjects' words: another node replaces the model's attention layers. Take "
                    "that node out, or set share_until to 0."
                )
            out.append(mask)
        return torch.stack(out)

    def blend(self, t: Tensor) -> Tensor:
        """The paper's accumulation on a tensor of all rows."""
        assert self.current is not None
        return maths.accumulate(t.unflatten(0, (self.total, self.pictures)), self.current).flatten(0, 1)


class Guider(comfy.samplers.CFGGuider):
    """ComfyUI's guider for KSampler; branches that do not fit in memory together are evaluated in parts, the base's first."""

    def __init__(self, model: ModelPatcher, session: Session):
        super().__init__(model)
        self.session = session
        self.size = session.settings.branches_at_once
        self.parts: dict[tuple[str, range], list[dict[str, Any]]] = {}
        self.following = False

    def follow_base(self) -> None:
        """From here on the last branch has the base's prompt, which knows every detail."""
        if self.following:
            return
        self.following = True
        self.parts.clear()
        n, total = self.session.pictures, self.session.pictures * self.session.total
        rows = torch.tensor([*range(total - n), *range(n)])
        known: dict[str, list[dict[str, Any]]] = self.__dict__["conds"]
        self.conds = {**known, "positive": [{**c, "model_conds": _chosen(c, total, rows)} for c in known["positive"]]}

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: int | None = None) -> Tensor:
        session = self.session
        if not self.size:  # once a run, so that all of its steps are computed alike
            self.size = self._fitting(x)
        model_options = {} if model_options is None else model_options
        if self.size >= session.total:
            return super().predict_noise(x, timestep, model_options, seed)
        out = []
        for start in range(0, session.total, self.size):
            session.now = range(start, min(start + self.size, session.total))
            rows = slice(session.now.start * session.pictures, session.now.stop * session.pictures)
            negative, positive = (self._part(role, x.shape[0], rows) for role in ("negative", "positive"))
            out.append(
                comfy.samplers.sampling_function(
                    self.inner_model,
                    x[rows],
                    timestep[rows],
                    negative,
                    positive,
                    self.cfg,
                    model_options=model_options,
                    seed=seed,
                )
            )
        session.now = range(session.total)
        session.memory.clear()
        return torch.cat(out)

    def _fitting(self, x: Tensor) -> int:
        """How many branches fit in memory at once, by ComfyUI's own estimate; it runs cond and uncond one by one where it must."""
        free = comfy.model_management.get_free_memory(x.device)
        session = self.session
        for size in range(session.total, 1, -1):
            if self.inner_model.memory_required([size * session.pictures, *x.shape[1:]]) * 1.5 < free:
                return size
        return 1

    def _part(self, role: str, total: int, rows: slice) -> list[dict[str, Any]]:
        """A role's conditionings for some rows, under names of their own: methods that keep state by name keep one for each part."""
        key = (role, range(rows.start, rows.stop))
        if key not in self.parts:
            self.parts[key] = [_rows_of(cond, total, rows) for cond in self.conds[role]]
        return self.parts[key]


def _rows_of(cond: Mapping[str, Any], total: int, rows: slice) -> dict[str, Any]:
    """Some rows of a conditioning that ComfyUI has prepared for ``total`` of them."""
    out = {**cond, "uuid": (cond["uuid"], rows.start)}
    for name in ROWS:
        if isinstance(out.get(name), Tensor) and out[name].shape[0] == total:
            out[name] = out[name][rows]
    return {**out, "model_conds": _chosen(cond, total, rows)}


def _chosen(cond: Mapping[str, Any], total: int, rows: slice | Tensor) -> dict[str, Any]:
    """What the model sees of a conditioning, for some of its ``total`` rows."""
    out = {}
    for name, value in cond["model_conds"].items():
        held = getattr(value, "cond", None)
        if isinstance(held, Tensor) and held.ndim and held.shape[0] == total:
            value = value._copy_with(held[rows])
        elif isinstance(held, list):
            value = value._copy_with([t[rows] if t.shape[0] == total else t for t in held])
        out[name] = value
    return out


# --- between sampler and model ------------------------------------------------------------------------------------------


def evaluations(sampler_name: str, sigmas: Tensor) -> list[int]:
    """How often a sampler calls the model in each of its steps."""
    most = SAMPLERS[sampler_name][0]
    levels = sigmas.tolist()
    out = []
    for i in range(len(levels) - 1):
        if sampler_name == "heunpp2":
            out.append(1 if levels[i + 1] == levels[-1] else 2 if levels[i + 2] == levels[-1] else 3)
        else:
            out.append(1 if levels[i + 1] == 0 else most)
    return out


def shared_noise(kind: str, x: Tensor, sigmas: Tensor, seed: int | None, count: int) -> Callable[[Any, Any], Tensor]:
    """A sampler's own kind of noise, made for the first branch's rows and given to all."""
    rows = x[: len(x) // count]
    if kind == NORMAL:
        draw = k_diffusion.default_noise_sampler(rows, seed=seed)
    else:
        low, high = sigmas[sigmas > 0].min(), sigmas.max()
        draw = k_diffusion.BrownianTreeNoiseSampler(rows, low, high, seed=seed, cpu=kind == TREE)
    return lambda sigma, sigma_next: draw(sigma, sigma_next).repeat(count, *[1] * (x.ndim - 1))


class Blending:
    """Stands for the model before the sampler: shares, reads and blends in the first steps (see the module's text)."""

    def __init__(self, model: Any, session: Session, plan: list[int]):
        self.model, self.session = model, session
        self.steps = [step for step, times in enumerate(plan) for _ in range(times)]
        self.calls = self.step = 0
        self.older: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        session = self.session
        self.step = step = self.steps[min(self.calls, len(self.steps) - 1)]
        first = self.calls == 0 or self.steps[self.calls - 1] != step
        self.calls += 1
        if step >= session.shared:
            if session.settings.finish == FINISH[1]:
                session.guider.follow_base()
            return self.model(x, sigma, **kwargs)
        options = kwargs["model_options"]
        if first:
            self._optimise(x, sigma, step, kwargs)
            session.seen.clear()
        session.reading = first  # a step's masks are those of its first evaluation
        asked = options.get("transformer_options", {})
        asked = {**asked, KEY: (*asked.get(KEY, ()), *session.requests())}
        denoised = self.model(x, sigma, **{**kwargs, "model_options": {**options, "transformer_options": asked}})
        if first:
            session.current = session.masks(x.device)
            if session.names and live.listening():
                shown = session.current[[i - 1 for i in session.names], 0, 0]
                live.show(
                    step, self.steps[-1] + 1, list(session.names.values()), shown, "masks", last=step + 1 == session.shared
                )
        denoised = session.blend(denoised)
        for t in (x, *self.older):
            t.copy_(session.blend(t))
        self.older = [denoised, *self.older][:HISTORY]
        return denoised

    def _optimise(self, x: Tensor, sigma: Tensor, step: int, kwargs: Mapping[str, Any]) -> None:
        """Move the base's latents down the gradient of their maps' loss, in place."""
        settings = self.session.settings
        if settings.optimize == "off" or step >= settings.optimize_steps:
            return
        comfy.model_management.throw_exception_if_processing_interrupted()
        base = slice(0, self.session.pictures)
        found = _gradient(self.session, self.model, x[base], sigma[base], kwargs)
        if found is None:
            return
        # The paper's latents are those of the network's scale: there x is divided by c, and so the way back has it twice.
        scale = 1 / float(self.inner_model.inner_model.model_sampling.calculate_input(sigma[:1], x.new_ones(1, 1, 1, 1)))
        length = maths.step_length(step, settings.optimize_steps, settings.step_size, x[0].numel())
        x[base] -= length * scale**2 * found


# --- the base's gradient -------------------------------------------------------------------------------------------------


class _Normal(TorchFunctionMode):
    """Autograd takes no tensors made in inference mode, as ComfyUI's weights are: it gets normal ones that share their memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, _normal, (args, kwargs or {}))
        return func(*args, **kwargs)


def _normal(t: Tensor) -> Tensor:
    if type(t) not in (Tensor, nn.Parameter):
        return t
    if t.is_inference():
        with torch.inference_mode(False):
            return torch.empty(0, dtype=t.dtype, device=t.device).set_(
                t.untyped_storage(), t.storage_offset(), t.size(), t.stride()
            )
    return t.detach() if isinstance(t, nn.Parameter) else t  # weights are not what is optimised


@contextlib.contextmanager
def _sparing(diffusion_model: nn.Module, until: tuple[str, int]) -> Iterator[None]:
    """While a forward runs, layers before a block keep their input only and are computed again when gradients come back."""
    order = blocks(diffusion_model)
    changed = []
    for name, number in order[: order.index(until)]:
        held: Any = getattr(diffusion_model, name)
        for layer in held if name == "middle_block" else held[number]:
            if isinstance(layer, (ResBlock, SpatialTransformer)):
                changed.append((layer, layer.__dict__.get("forward")))  # another pack's, perhaps
                layer.forward = _spared(layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, own in changed:
            del layer.forward
            if own is not None:
                layer.forward = own


def _spared(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with _Normal():
            return forward(*args, **kwargs)

    def again(*args: Any, **kwargs: Any) -> Any:
        # ComfyUI writes down where it is in the options as it goes along; what comes back must find itself where it was.
        args = tuple(dict(value) if isinstance(value, dict) else value for value in args)
        kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return again


def _with_backward(kernel: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Attention whose gradient is known: SageAttention's and others', chosen for ComfyUI or by another pack, is not."""
    return attention_pytorch(*args, **kwargs)


def _gradient(session: Session, model: Any, x: Tensor, sigma: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Gradient of the loss of the base's maps by its latents ``x [B, c, H, W]``; None where the base has none of the subjects.

    The forward stops at the last layer that feeds a map. It is a pass of its own: no other method reads, edits or records in it.

    Args:
        model: ComfyUI's, which knows the picture under a noise mask.
    """
    found = next(((uuid, lay) for uuid, lay in session.prompts.items() if lay.base), None)
    if found is None:
        return None
    uuid, lay = found
    rows = slice(0, session.pictures)
    guider = session.guider
    base = guider.inner_model
    total = session.total * session.pictures
    cond = next(_rows_of(c, total, rows) for c in guider.conds["positive"] if c["uuid"] == uuid)
    last = session.read_at[-1]
    maps: list[Tensor] = []
    done = False

    def read(call: AttentionCall, weights: Tensor) -> None:
        part = torch.stack([weights[..., places].sum(dim=-1) / count for places, count in lay.base], dim=1)
        if not done:  # a spared layer comes here once more, and must do the same up to this line
            maps.append(part.unflatten(-1, (call.height, call.width)))
            if call.site.name == last.name:
                raise _EnoughError

    options = kwargs["model_options"]
    asked = {**options.get("transformer_options", {}), KEY: (), "optimized_attention_override": _with_backward}
    options = {**options, "transformer_options": asked}
    options = with_extra_forward(options, ExtraForward((session.reader(lay, read),)))
    with torch.inference_mode(False), torch.enable_grad(), _Normal():
        z = x.clone().requires_grad_()
        sigma = sigma.clone()
        seen = z
        mask = kwargs.get("denoise_mask")
        if mask is not None:
            if "denoise_mask_function" in options:
                mask = options["denoise_mask_function"](
                    sigma, mask, extra_options={"model": model.inner_model, "sigmas": model.sigmas}
                )
            mask = mask[rows].clone()
            known = base.scale_latent_inpaint(x=z, sigma=sigma, noise=model.noise[rows], latent_image=model.latent_image[rows])
            seen = z * mask + known * (1 - mask)
        with contextlib.suppress(_EnoughError), _sparing(base.diffusion_model, last.block):
            comfy.samplers.calc_cond_batch(base, [[cond]], seen, sigma, options)
        done = True
        if not maps:
            return None  # outside the prompt's timesteps
        loss = maths.objective(torch.stack(maps).mean(dim=0), session.settings.optimize == OPTIMIZE[2], released=True).sum()
        lift = 2.0**8 if base.get_dtype() == torch.float16 else 1.0  # small gradients of half precision are zero
        (gradient,) = torch.autograd.grad(loss * lift, z)
    if not bool(gradient.isfinite().all()):
        logging.warning("Attune: Detail++ skips an optimisation step whose gradient is not finite.")
        return None
    return gradient / lift


# --- the sampler --------------------------------------------------------------------------------------------------------


def check(sampler_name: str, settings: Settings) -> None:
    """Refuse what cannot be done.

    Raises:
        ValueError: with what can.
    """
    if sampler_name not in SAMPLERS:
        raise ValueError(
            f"Detail++ Sampler: the sampler “{sampler_name}” keeps a history of its own from step to step, which branches cannot share. "
            f"Choose one of: {', '.join(SAMPLERS)}."
        )
    if settings.optimize not in OPTIMIZE:
        raise ValueError(f"Detail++ Sampler: optimize must be one of {', '.join(OPTIMIZE)}, not “{settings.optimize}”.")
    if settings.finish not in FINISH:
        raise ValueError(f"Detail++ Sampler: finish must be one of {', '.join(FINISH)}, not “{settings.finish}”.")


def sample(
    model: ModelPatcher,
    positive: Sequence[Any],
    negative: Sequence[Any],
    latent: Mapping[str, Any],
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float = 1.0,
    settings: Settings | None = None,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
    disable_pbar: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sample all branches.

    Args:
        positive: a conditioning with branches; others beside them are for all branches.
        callback: as KSampler's; it is shown the last branch.

    Returns:
        All branches' latents ``[(n + 1)·B, c, H, W]``, branch by branch, the last being the result; and the subjects' final masks
        ``[subjects' branches · B, 8H, 8W]`` (all ones where nothing was shared).

    Raises:
        ValueError: for a model, sampler or conditioning that does not fit.
    """
    settings = settings or Settings()
    check(sampler_name, settings)
    family, sites = model_sites(model)
    if family != "unet":
        raise ValueError(
            "Detail++ Sampler works with SD1.5, SD2 and SDXL. SD3 and FLUX have no self-attention apart from the text's, whose map "
            "the branches could share; use one of those models."
        )
    read_at = mask_sites(sites)
    sets = sets_of_branches(positive)
    count = len(sets[0])
    image = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    pictures, size = image.shape[0], (image.shape[-2], image.shape[-1])
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    mask = latent.get("noise_mask")
    shown = None if callback is None else lambda i, x0, x, n: callback(i, x0[-pictures:], x[-pictures:], n)
    if count == 1:
        out = comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler_name,
            scheduler,
            list(positive),
            negative,
            image,
            denoise=denoise,
            noise_mask=mask,
            callback=shown,
            disable_pbar=disable_pbar,
            seed=seed,
        )
        return out, _pictures(torch.ones(pictures, 1, *size))

    refuse(model, "Detail++ Sampler")
    plan = comfy.samplers.KSampler(model, steps, model.load_device, sampler_name, scheduler, denoise, model.model_options)
    sigmas = plan.sigmas
    made = [merged(branches, pictures) for branches in sets]
    others = tiled([e for e in positive if BRANCH not in e[1]], pictures, count)
    auto = read_at[0].stride
    session = Session(
        settings,
        count,
        pictures,
        size,
        int(settings.share_until * (len(sigmas) - 1) + 0.5),
        read_at,
        share_sites(sites, size, settings.share_max_tokens, auto),
        [_Layout.of(m) for m in made],
        {b.index: b.name or f"branch {b.index}" for b, _ in made[0][1][BRANCHES] if b.subjects},
    )
    patched = model.clone()
    install(patched)
    session.guider = guider = Guider(patched, session)
    guider.set_conds([*made, *others], tiled(negative, pictures, count))
    guider.set_cfg(cfg)
    if mask is not None:
        mask = _tiled(mask.reshape(-1, 1, *mask.shape[-2:]), pictures, count)
    own = comfy.samplers.sampler_object(sampler_name)
    sampler = comfy.samplers.KSAMPLER(_wrapped(own, sampler_name, session), own.extra_options, own.inpaint_options)
    out = guider.sample(
        noise.repeat(count, 1, 1, 1), image.repeat(count, 1, 1, 1), sampler, sigmas, mask, shown, disable_pbar, seed
    )
    masks = torch.ones(count - 1, pictures, 1, *size, dtype=torch.bool) if session.current is None else session.current
    subjects = [i for i in range(1, count) if any(lay.subjects[i] for lay in session.layouts)]
    chosen = masks[[i - 1 for i in subjects]] if subjects else torch.ones(1, pictures, 1, *size)
    return out.to(comfy.model_management.intermediate_device()), _pictures(chosen.flatten(0, 1).float().cpu())


def _pictures(masks: Tensor) -> Tensor:
    """Masks ``[N, 1, H, W]`` of latent pixels as ComfyUI's MASK."""
    return masks[:, 0].repeat_interleave(PIXELS, dim=1).repeat_interleave(PIXELS, dim=2)


def _wrapped(own: Any, sampler_name: str, session: Session) -> Callable[..., Tensor]:
    """ComfyUI's sampler with our model before it and the branches' noise shared."""

    def function(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], **kwargs: Any) -> Tensor:
        seed = extra_args.get("seed")
        kind = SAMPLERS[sampler_name][1]
        if kind is not None and len(sigmas) > 1:
            kwargs["noise_sampler"] = shared_noise(kind, x, sigmas, seed, session.total)
        if own.inpaint_options.get("random"):  # KSAMPLER has drawn it for every row
            rows = model.noise[: session.pictures]
            generator = torch.manual_seed(41 if seed is None else seed + 1)
            drawn = torch.randn(rows.shape, generator=generator, device="cpu").to(rows)
            model.noise = drawn.repeat(session.total, 1, 1, 1)
        blending = Blending(model, session, evaluations(sampler_name, sigmas))
        shown = kwargs.pop("callback", None)

        def callback(info: dict[str, Any]) -> None:
            if blending.step != info["i"]:
                raise RuntimeError(
                    f"Detail++ Sampler does not know this version of the sampler “{sampler_name}”; choose another, or update Attune."
                )
            if shown is not None:
                shown(info)

        return own.sampler_function(blending, x.clone(), sigmas, extra_args=extra_args, callback=callback, **kwargs)

    return function
