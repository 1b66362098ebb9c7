"""The state of one sampling run of Detail++: what it asks of attention, and the masks that come of it.

Equations are in `methods.detail`: maps are read and summed here, masks are `subject_masks` (equation 3), latents are blended by
`accumulate` (equation 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...methods.detail import accumulate, exclusive_masks, subject_masks
from ...methods.maps import added
from ...methods.scfg import layer_maps
from ..hook.call import AttentionCall
from ..hook.requests import COND, MapSource, ReadWeights, Request, ShareMap
from ..hook.sites import Site
from ..maps.layers import auto_sites
from ..observer import NOBODY, Observer
from .branches import BASE, BEFORE, OWN, Columns, ReadPlan, own_name

OPTIMIZE = ("off", "entropy", "entropy + centroid")
FINISH = ("last branch", "whole prompt")
MASKS = ("published", "exclusive")
RELEASED = "released"
MASKS_FROM = (RELEASED, BASE, BEFORE, OWN)
STRIDE = 4  # latent pixels per token where subjects are looked for, and from where on the layout is shared

Area = tuple[int, int, int, int]  # height, width, y, x in latent pixels


@dataclass(frozen=True)
class Settings:
    """The sampler's numbers, as the node has them; ``share_max_tokens`` 0 and ``branches_at_once`` 0 are automatic.

    ``masks``: “published” (equation 3), or “exclusive”: subjects compete for pixels, with maps as S-CFG has them.
    ``masks_from``: whose attention shows where a subject is: the base's, that of the branch before, or of the branch that adds the detail
    (the paper: “a sub-prompt”). The released code takes the base's where it optimises it, else that of the branch before.
    """

    share_until: float = 0.8
    share_max_tokens: int = 0
    mask_threshold: float = 0.5
    optimize: str = OPTIMIZE[2]
    optimize_steps: int = 6
    step_size: float = 1.0
    branches_at_once: int = 0
    finish: str = FINISH[0]
    masks: str = MASKS[0]
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
            ("masks", self.masks, MASKS),
            ("masks_from", self.masks_from, MASKS_FROM),
        ):
            if value not in choices:
                raise ValueError(f"Detail++ Sampler: {name} must be one of {', '.join(choices)}, not “{value}”.")


def mask_sites(sites: Sequence[Site], family: str = "unet") -> tuple[Site, ...]:
    """The sites whose maps say where subjects are: a quarter of the latent's size; elsewhere the coarsest size but one.

    Beyond UNets every site has the same size: three around the middle, as the other methods take there.

    Raises:
        ValueError: for a model without attention to text.
    """
    with_text = [s for s in sites if "cross" in s.kinds]
    if not with_text:
        raise ValueError("Detail++ Sampler: this model has no attention to text; connect a text-to-image model.")
    if family != "unet":
        return auto_sites(tuple(with_text), family)
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
        prompts: what is read of each merged conditioning, by the name that ComfyUI gave it; ``negative``: names of the negative ones.
        now: the branches in the forward that is going on; ``reading``: whether its maps count.
        sums: maps ``[B, 1, h, w]`` of the steps so far, by conditioning, branch and subject.
        pixels: the base's self-attention ``[B, M, M]`` of this forward, by conditioning and site, for exclusive masks.
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
    negative: frozenset[Any] = frozenset()
    now: range = field(init=False)
    reading: bool = False
    sums: dict[tuple[Any, int, int], Tensor] = field(default_factory=dict)
    pixels: dict[tuple[Any, str], Tensor] = field(default_factory=dict)
    kept: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        self.now = range(self.total)

    # --- what is asked of attention ---

    @property
    def exclusive(self) -> bool:
        return self.settings.masks == MASKS[1]

    def requests(self) -> tuple[Request, ...]:
        """Of a forward in the steps that share."""
        out: list[Request] = []
        if self.share_at:
            out.append(ShareMap({(s.name, "self"): None for s in self.share_at}, self.share))
        plans = [plan for plan in self.prompts.values() if self.reading and plan.columns]
        if plans and self.exclusive:
            pixels = {(s.name, "self"): None for s in self.read_at}
            out.append(ReadWeights(pixels, self.read_pixels, rows=COND, mean_heads=True))
        return (*out, *(self.reader(plan.columns, plan.prompt_columns, partial(self.read, plan)) for plan in plans))

    def reader(self, columns: Columns, prompt_columns: int, act: Callable[[AttentionCall, Tensor], None]) -> Request:
        """A look at some columns of a prompt, heads averaged, in a forward of conditional rows."""
        where: dict[tuple[str, str], None] = {(s.name, "cross"): None for s in self.read_at}
        return ReadWeights(where, act, rows=COND, columns=columns, mean_heads=True, prompt_columns=prompt_columns)

    def share(self, call: AttentionCall) -> MapSource:
        """Conditional rows use the base's map of their picture (algorithm 1, line 4).

        A picture has more than one row where another node cuts its tokens into tiles.
        """
        rows = list(range(call.batch))
        whole = len(self.now) == self.total
        own = call.pictures // len(self.now)
        keep: list[int] = []
        keys: list[Any] = []
        kept: list[tuple[Tensor, Tensor]] = []
        for part in call.parts(COND):
            if own_name(part.uuid) in self.negative:
                continue  # another node's own pass
            first = part.rows.start
            # Each pass, our own and other packs', has maps of its own.
            key = (call.site.name, call.perturbed, part.role, part.first_time, own_name(part.uuid))
            if self.now.start == 0:
                origin = first
                if not whole:
                    keep += range(first, first + own)
                    keys.append(key)
            elif key in self.kept:
                if len(self.kept[key][0]) != own:
                    continue  # other tiles than the base had
                origin = call.batch + len(kept) * own
                kept.append(self.kept[key])
            else:
                raise RuntimeError(
                    f"Detail++ Sampler: the layout's attention at {call.site.name} was not seen; another node changes which layers run."
                )
            rows[part.rows] = [origin + r % own for r in range(call.pictures)]

        def listen(q: Tensor, k: Tensor) -> None:
            for n, key in enumerate(keys):
                part = slice(n * own, (n + 1) * own)
                self.kept[key] = (q[part], k[part])

        more = (torch.cat([q for q, _ in kept]), torch.cat([k for _, k in kept])) if kept else None
        return MapSource(rows, more, tuple(keep), listen if keep else None)

    def read_pixels(self, call: AttentionCall, weights: Tensor) -> None:
        """Remember the base's self-attention ``[rows, M, M]`` in one layer: all branches share it."""
        if self.now.start == 0 and call.height > 1:  # tokens that another pack regroups are said to be a row
            for chunk in call.parts(COND):
                if chunk.first_time:
                    own = weights[chunk.given.start : chunk.given.start + self.pictures]
                    self.pixels[own_name(chunk.uuid), call.site.name] = own

    def read(self, plan: ReadPlan, call: AttentionCall, weights: Tensor) -> None:
        """Add the subjects' maps ``[rows, M, T]`` of one layer to those so far."""
        for chunk in call.parts(COND):
            start, name = chunk.given.start, own_name(chunk.uuid)
            if self.prompts.get(name) is not plan or not chunk.first_time:
                continue  # another prompt, or another pack that runs this one again
            whole = len(self.now) == self.total
            pixels = self.pixels.pop((name, call.site.name), None) if whole else self.pixels.get((name, call.site.name))
            grid = (call.height, call.width)
            for looked_at, keys, subjects in plan.by_branch(self.now):
                first = start + (looked_at - self.now.start) * self.pictures
                part = torch.stack([subject.map(weights[first : first + self.pictures]) for subject in subjects], dim=-1)
                maps = layer_maps(part, pixels, grid, grid) if self.exclusive else part.transpose(1, 2).unflatten(2, grid)
                for i, (branch, number) in enumerate(keys):
                    key = (name, branch, number)
                    self.sums[key] = added(self.sums.get(key), maps[:, i : i + 1])

    # --- what comes of it ---

    def end_forward(self) -> None:
        """All branches have been evaluated."""
        self.now = range(self.total)
        self.kept.clear()
        self.pixels.clear()

    def make_masks(self, areas: Mapping[Any, Area | None], device: torch.device) -> Tensor:
        """``B_1 … B_n`` from the maps so far (equation 3): boolean ``[n, B, 1, H, W]``, kept as `masks`.

        Args:
            areas: where in the latent each conditioning is; None: everywhere.

        Raises:
            RuntimeError: when no map was seen.
        """
        height, width = self.latent
        made = torch.zeros(self.total, self.pictures, 1, height, width, dtype=torch.bool, device=device)
        whole = [not any(plan.subjects[branch] for plan in self.prompts.values()) for branch in range(self.total)]
        found = list(whole)
        for uuid, plan in self.prompts.items():
            h, w, y, x = areas.get(uuid) or (height, width, 0, 0)
            for branch, masks in self._subjects_masks(uuid, plan, (h, w)):
                found[branch] = True
                made[branch, ..., y : y + h, x : x + w] |= masks.to(device)
        if not all(found):
            raise RuntimeError(
                "Detail++ Sampler saw no attention to the subjects' words: another node replaces the model's attention layers. Take "
                "that node out, or set share_until to 0."
            )
        for branch in range(self.total):
            if whole[branch]:
                made[branch] = True
        self.masks = made[1:]
        return self.masks

    def _subjects_masks(self, uuid: Any, plan: ReadPlan, size: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        """Branches and the masks ``[B, 1, *size]`` of their subjects, as far as they were seen."""
        threshold = self.settings.mask_threshold
        seen = [
            (branch, subject.name, self.sums[uuid, branch, number])
            for branch, subjects in enumerate(plan.subjects)
            for number, subject in enumerate(subjects)
            if (uuid, branch, number) in self.sums
        ]
        if not self.exclusive:
            yield from ((branch, subject_masks(maps, threshold, size)) for branch, _, maps in seen)
            return
        together: dict[Any, list[Tensor]] = {}  # a subject that several branches add to has one region
        for _, name, maps in seen:
            together.setdefault(name, []).append(maps)
        if together:
            each = torch.cat([torch.stack(maps).mean(dim=0) for maps in together.values()], dim=1)
            masks = exclusive_masks(each, threshold, size)
            place = {name: i for i, name in enumerate(together)}
            yield from ((branch, masks[:, place[name], None]) for branch, name, _ in seen)

    def show_masks(self, step: int, steps: int) -> None:
        """The first picture's, to whoever looks on."""
        if self.names and self.masks is not None and self.observer.watching():
            shown = self.masks[[i - 1 for i in self.names], 0, 0]
            self.observer.masks(step, steps, list(self.names.values()), shown, last=step + 1 == self.shared)

    def blend(self, t: Tensor) -> Tensor:
        """The accumulation (equation 4) on a tensor of all rows."""
        assert self.masks is not None
        masks = self.masks.unsqueeze(3) if t.ndim == 5 else self.masks  # a picture may be a film of one frame
        return accumulate(t.unflatten(0, (self.total, self.pictures)), masks).flatten(0, 1)
