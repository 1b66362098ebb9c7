"""S-CFG on ComfyUI models: read the maps of every step, then even out the guidance after CFG."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods import scfg as maths
from .hook.call import AttentionCall
from .hook.install import ModelPatcher, model_sites, request
from .hook.requests import ALL, COND, PIXELS, ReadWeights, Request, Span
from .hook.run import RUN, SamplingRun
from .hook.sites import Site
from .maps.record import Maps, Recorder, auto_sites
from .observer import NOBODY, Observer

REFERENCES = ("foreground", "background", "image")


@dataclass
class _Sum:
    """Token maps of one conditioning, added up over the layers of one forward."""

    total: Tensor | None = None
    count: int = 0

    def add(self, maps: Tensor) -> None:
        self.total = maps if self.total is None else self.total + maps
        self.count += 1

    @property
    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / self.count


@dataclass
class _Evaluation:
    """What one evaluation of the model has shown: maps by conditioning, and the self-attention that waits for its cross-attention."""

    sigma: Tensor | None
    maps: dict[Any, _Sum] = field(default_factory=dict)
    waiting: dict[str, Tensor] = field(default_factory=dict)
    seen: set[tuple[Any, str]] = field(default_factory=set)
    at: tuple[int | None, int | None] = (None, None)  # step, of how many


@dataclass(frozen=True)
class _Method:
    """The settings, and a key to the state of this one node."""

    reference: str
    min_ratio: float
    max_ratio: float
    max_scale: float
    completion: int
    smoothing: float
    released: bool
    stride: int  # of the grid that the maps are brought to
    span: Span
    recorder: Recorder
    key: object
    observer: Observer = NOBODY

    def requests(self, sites: tuple[Site, ...]) -> tuple[Request, ...]:
        joint = sites[0].kind == "joint"
        text = ReadWeights(
            {(s.name, "joint" if joint else "cross"): None for s in sites},
            self.read_text,
            rows=ALL,
            span=self.span,
            mean_heads=True,
        )
        pixels = ReadWeights(
            {(s.name, s.kind): None for s in sites},
            self.read_pixels,
            rows=ALL,
            span=self.span,
            columns=PIXELS if joint else None,
            mean_heads=True,
        )
        return (pixels, text) if self.completion else (text,)  # pixels first: the text's maps are completed with them

    def _evaluation(self, call: AttentionCall) -> _Evaluation | None:
        if call.run is None or call.sigma is None:
            return None
        now: _Evaluation | None = call.run.state.get(self.key)
        if now is None or now.sigma is not call.sigma:
            now = call.run.state[self.key] = _Evaluation(call.sigma)
        return now

    def read_pixels(self, call: AttentionCall, weights: Tensor) -> None:
        now = self._evaluation(call)
        if now is not None:
            now.waiting[call.site.name] = weights / weights.sum(dim=-1, keepdim=True) if call.kind == "joint" else weights

    def read_text(self, call: AttentionCall, weights: Tensor) -> None:
        now = self._evaluation(call)
        if now is None:
            return
        now.at = (call.step, call.steps)
        self_map = now.waiting.pop(call.site.name, None)
        if self.observer.watching() and (rows := call.rows(COND)):
            self.observer.layer(call, weights[rows][0])
        self.recorder.read_pair(call, weights, self_map)
        size = (-(-call.latent[0] // self.stride), -(-call.latent[1] // self.stride))
        for part in call.parts():
            own_key = (part.uuid, part.role)  # a negative that is given a positive's area is given its name as well
            if part.role > 1 or (own_key, call.site.name) in now.seen:  # another pack runs the same conditioning again
                continue
            now.seen.add((own_key, call.site.name))
            cross = weights[part.given]
            if part.role == 1:
                cross = maths.against_start(cross, self._start(call, cross))
            own = None if self_map is None else self_map[part.given]
            grid = (call.height, call.width)
            maps = maths.layer_maps(cross, own, grid, size, self.completion, self.smoothing, self.released)
            now.maps.setdefault(own_key, _Sum()).add(maps)

    @staticmethod
    def _start(call: AttentionCall, cross: Tensor) -> int:
        """The column that takes what nothing else wants: CLIP's start token; for T5, which has none, the most attended one."""
        return 0 if call.kind == "cross" else int(cross.mean(dim=(0, 1)).argmax())

    def guidance(self, args: Mapping[str, Any]) -> Tensor:
        """A post-CFG function."""
        denoised, scale = args["denoised"], float(args["cond_scale"])
        if args.get("uncond") is None or not self.span.holds(args["sigma"], args["model"].model_sampling):
            return denoised
        run: SamplingRun | None = args["model_options"].get("transformer_options", {}).get(RUN)
        now: _Evaluation | None = None if run is None else run.state.pop(self.key, None)
        if now is None or not now.maps:
            raise RuntimeError(
                "Semantic-aware CFG saw no attention in this step: another node replaces the model's attention layers, or samples "
                "in a way that hides them. Take that node out, or end Semantic-aware CFG before it starts (end_percent)."
            )
        x = args["input"]
        best = torch.full((x.shape[0], *x.shape[-2:]), -torch.inf, device=x.device)
        owner = torch.zeros(best.shape, dtype=torch.int64, device=x.device)
        count = 1  # region 0: where no prompt applies
        for maps, where, weight in self._placed(args["cond"], 0, now, args):
            size = (weight.shape[-2], weight.shape[-1])
            top = F.interpolate(maps.amax(dim=1, keepdim=True), size=size, mode="nearest")[:, 0] * weight
            label = maths.enlarge(maths.regions(maps), size) + count
            count += maps.shape[1]
            wins = (top > best[where]) & (weight > 0)
            owner[where] = torch.where(wins, label, owner[where])
            best[where] = torch.where(wins, top, best[where])
        reference = torch.ones_like(owner, dtype=torch.bool)
        if self.reference != "image":
            margin = torch.zeros_like(best)
            for maps, where, weight in self._placed(args["uncond"], 1, now, args):
                difference = F.interpolate(maps[:, 1:] - maps[:, :1], size=weight.shape[-2:], mode="nearest")[:, 0]
                margin[where] += difference * weight
            reference = margin > 0 if self.reference == "foreground" else margin <= 0
        if self.observer.watching():
            self.observer.regions(*now.at, owner[0], count - 1)
        delta = maths.guidance_norm(args["cond_denoised"], args["uncond_denoised"])
        ratio = maths.ratios(
            delta,
            owner,
            reference,
            self.min_ratio,
            self.max_ratio,
            self.max_scale / scale if scale > 0 else float("inf"),
            self.smoothing,
            count,
            self.released,
        )
        return maths.guide(denoised, args["cond_denoised"], args["uncond_denoised"], scale, ratio)

    @staticmethod
    def _placed(
        conds: Any, role: int, now: _Evaluation, args: Mapping[str, Any]
    ) -> list[tuple[Tensor, tuple[slice, ...], Tensor]]:
        """Maps, place in the latent and weight ``[B, h, w]`` of the conditionings that count at this step."""
        out = []
        for cond in conds:
            if (cond["uuid"], role) not in now.maps:
                continue
            part = comfy.samplers.get_area_and_mult(cond, args["input"], args["sigma"])
            if part is None:
                continue
            height, width, y, x = part.area if part.area is not None else (*args["input"].shape[-2:], 0, 0)
            where: tuple[slice, ...] = (slice(None), slice(y, y + height), slice(x, x + width))
            out.append((now.maps[cond["uuid"], role].mean, where, part.mult[:, 0].float()))
        return out


def apply(
    model: ModelPatcher,
    reference: str = "foreground",
    min_ratio: float = 0.8,
    max_ratio: float = 3.0,
    max_scale: float = 15.0,
    completion: int = 4,
    smoothing: float = 0.5,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    released: bool = False,
    observer: Observer = NOBODY,
) -> tuple[ModelPatcher, Maps]:
    """A clone of ``model`` with semantic-aware CFG on it, and the handle to the maps that its runs will have used.

    Args:
        observer: is shown them while they form.

    Raises:
        ValueError: when bounds are the wrong way round, or the model family is unknown or has no text attention.
    """
    if reference not in REFERENCES:
        raise ValueError(f"Semantic-aware CFG: reference must be one of {', '.join(REFERENCES)}, not “{reference}”.")
    if min_ratio > max_ratio:
        raise ValueError(f"Semantic-aware CFG: min_ratio ({min_ratio}) is above max_ratio ({max_ratio}); swap them.")
    span = Span.checked("Semantic-aware CFG", start_percent, end_percent)
    family, sites = model_sites(model)
    chosen = auto_sites(sites, family)
    patched = model.clone()
    maps = Maps(kind="both" if completion else "cross", precision="fp16", observer=observer)
    method = _Method(
        reference,
        min_ratio,
        max_ratio,
        max_scale,
        completion,
        smoothing,
        released,
        min(s.stride for s in chosen),
        span,
        Recorder(maps, chosen, mean_heads=True, by_product=True),
        object(),
        observer,
    )
    request(patched, *method.requests(chosen))
    patched.set_model_sampler_post_cfg_function(method.guidance)
    return patched, maps
