"""The state of one sampling run of Detail++: what it asks of attention, and the masks that come of it.

Equations are in `methods.detail`: maps are read and summed here, masks are `subject_masks` (equation 3), latents are blended by
`accumulate` (equation 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...methods.detail import accumulate, subject_masks
from ..hook.call import AttentionCall
from ..hook.requests import COND, MapSource, ReadWeights, Request, ShareMap
from ..hook.sites import Site
from ..observer import NOBODY, Observer
from .branches import BASE, BEFORE, OWN, ReadPlan, own_name

OPTIMIZE = ("off", "entropy", "entropy + centroid")
FINISH = ("last branch", "whole prompt")
RELEASED = "released"
MASKS_FROM = (RELEASED, BASE, BEFORE, OWN)
STRIDE = 4  # latent pixels per token where subjects are looked for, and from where on the layout is shared

Area = tuple[int, int, int, int]  # height, width, y, x in latent pixels


@dataclass(frozen=True)
class Settings:
    """The sampler's numbers, as the node has them; ``share_max_tokens`` 0 and ``branches_at_once`` 0 are automatic.

    ``masks_from``: whose attention shows where a subject is: the base's, that of the branch before, or of the branch that adds the detail
    (the paper: “a sub-prompt”). The released code takes the base's where it optimises it, else that of the branch before.
    """

    share_until: float = 0.8
    share_max_tokens: int = 0
    mask_threshold: float = 0.5
    optimize: str = OPTIMIZE[0]
    optimize_steps: int = 6
    step_size: float = 1.0
    branches_at_once: int = 0
    finish: str = FINISH[0]
    masks_from: str = RELEASED

    @property
    def where(self) -> str:
        """`BASE`, `BEFORE` or `OWN`."""
        if self.masks_from != RELEASED:
            return self.masks_from
        return BEFORE if self.optimize == OPTIMIZE[0] else BASE

    def check(self) -> None:
        """Raises ValueError for a choice that there is not."""
        for name, value, choices in (
            ("optimize", self.optimize, OPTIMIZE),
            ("finish", self.finish, FINISH),
            ("masks_from", self.masks_from, MASKS_FROM),
        ):
            if value not in choices:
                raise ValueError(f"Detail++ Sampler: {name} must be one of {', '.join(choices)}, not “{value}”.")


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


@dataclass
class Session:
    """The state of one sampling run.

    Attributes:
        total: branches; ``pictures``: of each; ``latent``: height and width.
        shared: the steps that share and blend.
        names: of the branches with a subject, for the ``observer``.
        prompts: what is read of each merged conditioning, by the name that ComfyUI gave it.
        now: the branches in the forward that is going on; ``reading``: whether its maps count.
        sums: maps ``[B, h, w]`` of the steps so far, by conditioning, branch and subject.
        seen: conditionings and sites of this step that were read.
        kept: q and k of the base's rows, for the branches of later forwards of the same step.
        masks: those of the last step that was read, ``[n, B, 1, H, W]``.
    """

    settings: Settings
    total: int
    pictures: int
    latent: tuple[int, int]
    shared: int
    read_at: tuple[Site, ...]
    share_at: tuple[Site, ...]
    names: dict[int, str] = field(default_factory=dict)
    observer: Observer = NOBODY
    prompts: dict[Any, ReadPlan] = field(default_factory=dict)
    now: range = field(init=False)
    reading: bool = False
    sums: dict[tuple[Any, int, int], Tensor] = field(default_factory=dict)
    seen: set[Any] = field(default_factory=set)
    kept: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        self.now = range(self.total)

    # --- what is asked of attention ---

    def requests(self) -> tuple[Request, ...]:
        """Of a forward in the steps that share."""
        share = ShareMap({(s.name, "self"): None for s in self.share_at}, self.share)
        reads = [self.reader(p, partial(self.read, p)) for p in self.prompts.values() if self.reading and p.columns]
        return (*([share] if self.share_at else []), *reads)

    def reader(self, plan: ReadPlan, act: Callable[[AttentionCall, Tensor], None]) -> Request:
        """A look at the subjects' columns, heads averaged, in a forward of conditional rows."""
        where: dict[tuple[str, str], None] = {(s.name, "cross"): None for s in self.read_at}
        return ReadWeights(where, act, rows=COND, columns=plan.columns, mean_heads=True, prompt_columns=plan.prompt_columns)

    def share(self, call: AttentionCall) -> MapSource:
        """Conditional rows use the base's map of their picture (algorithm 1, line 4)."""
        rows = list(range(call.batch))
        whole = len(self.now) == self.total
        keep: list[int] = []
        keys: list[Any] = []
        kept: list[tuple[Tensor, Tensor]] = []
        for part in call.parts(COND):
            first = part.rows.start
            key = (call.site.name, call.perturbed, part.role, own_name(part.uuid))
            if self.now.start == 0:
                origin = first
                if not whole:
                    keep += range(first, first + self.pictures)
                    keys.append(key)
            elif key in self.kept:
                origin = call.batch + len(kept) * self.pictures
                kept.append(self.kept[key])
            else:
                raise RuntimeError(
                    f"Detail++ Sampler: the layout's attention at {call.site.name} was not seen; another node changes which layers run."
                )
            rows[part.rows] = [origin + r % self.pictures for r in range(call.pictures)]

        def listen(q: Tensor, k: Tensor) -> None:
            for n, key in enumerate(keys):
                part = slice(n * self.pictures, (n + 1) * self.pictures)
                self.kept[key] = (q[part], k[part])

        more = (torch.cat([q for q, _ in kept]), torch.cat([k for _, k in kept])) if kept else None
        return MapSource(rows, more, tuple(keep), listen if keep else None)

    def read(self, plan: ReadPlan, call: AttentionCall, weights: Tensor) -> None:
        """Add the subjects' maps ``[rows, M, T]`` of one layer to those so far."""
        for chunk in call.parts(COND):
            uuid, start = chunk.uuid, chunk.given.start
            if self.prompts.get(own_name(uuid)) is not plan or (uuid, call.site.name) in self.seen:
                continue  # another prompt, or another pack that runs this one again
            self.seen.add((uuid, call.site.name))
            for branch, subjects in enumerate(plan.subjects):
                for number, subject in enumerate(subjects):
                    if subject.branch not in self.now:
                        continue
                    first = start + (subject.branch - self.now.start) * self.pictures
                    part = subject.map(weights[first : first + self.pictures]).unflatten(1, (call.height, call.width))
                    key = (own_name(uuid), branch, number)
                    self.sums[key] = part if key not in self.sums else self.sums[key] + part

    # --- what comes of it ---

    def begin_step(self) -> None:
        """A step's maps are those of its first evaluation."""
        self.seen.clear()

    def end_forward(self) -> None:
        """All branches have been evaluated."""
        self.now = range(self.total)
        self.kept.clear()

    def make_masks(self, areas: Mapping[Any, Area | None], device: torch.device) -> Tensor:
        """``B_1 … B_n`` from the maps so far (equation 3): boolean ``[n, B, 1, H, W]``, kept as `masks`.

        Args:
            areas: where in the latent each conditioning is; None: everywhere.

        Raises:
            RuntimeError: when no map was seen.
        """
        height, width = self.latent
        out = []
        for branch in range(1, self.total):
            whole, found = True, False
            mask = torch.zeros(self.pictures, 1, height, width, dtype=torch.bool, device=device)
            for uuid, plan in self.prompts.items():
                h, w, y, x = areas.get(uuid) or (height, width, 0, 0)
                for subject in range(len(plan.subjects[branch])):
                    whole = False
                    maps = self.sums.get((uuid, branch, subject))
                    if maps is None:
                        continue
                    found = True
                    own = subject_masks(maps, self.settings.mask_threshold)[:, None]
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
        self.masks = torch.stack(out)
        return self.masks

    def show_masks(self, step: int, steps: int) -> None:
        """The first picture's, to whoever looks on."""
        if self.names and self.masks is not None and self.observer.watching():
            shown = self.masks[[i - 1 for i in self.names], 0, 0]
            self.observer.masks(step, steps, list(self.names.values()), shown, last=step + 1 == self.shared)

    def blend(self, t: Tensor) -> Tensor:
        """The accumulation (equation 4) on a tensor of all rows."""
        assert self.masks is not None
        return accumulate(t.unflatten(0, (self.total, self.pictures)), self.masks).flatten(0, 1)
