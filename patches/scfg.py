"""S-CFG on ComfyUI models: read the maps of every step, then even out the guidance before CFG sums it up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..methods import scfg as maths
from .hook.call import AttentionCall
from .hook.effects import Effect, watch
from .hook.install import ModelPatcher, model_sites, request
from .hook.requests import ALL, COND, PIXELS, ReadWeights, Span
from .hook.run import RUN, SamplingRun
from .hook.sites import Site
from .maps.layers import auto_sites, every_site
from .maps.record import BOTH, CROSS, Maps
from .maps.record import Settings as Kept
from .maps.recorder import Recorder
from .observer import NOBODY, Observer

METHOD = "Semantic-aware CFG"
FOREGROUND, BACKGROUND, IMAGE = REFERENCES = ("foreground", "background", "image")
SELECTION, ALL_LAYERS = LAYERS = ("selection", "all")
PAPER, RELEASED = FORMS = ("paper", "released")
EVENED = "attune_scfg"  # in a run's state: the unconditional prediction that CFG is given, and the true one


@dataclass(frozen=True)
class Settings:
    """What a node may choose (its inputs say what each does).

    Attributes:
        reference: whose strength all regions are brought to.
        min_ratio, max_ratio, max_scale: bounds of a region's scale.
        completion, smoothing: ``R``, and the Gaussian's sigma in pixels of the maps.
        start_percent, end_percent: the part of sampling.
        layers: ``selection``: one of each block; ``all``: as published.
        form: ``paper``, or what the ``released`` code does (`methods.scfg`).
    """

    reference: str = FOREGROUND
    min_ratio: float = 0.8
    max_ratio: float = 3.0
    max_scale: float = 15.0
    completion: int = 4
    smoothing: float = 0.5
    start_percent: float = 0.0
    end_percent: float = 1.0
    layers: str = SELECTION
    form: str = PAPER


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
    """What one evaluation of the model has shown: maps by conditioning and role, step and number of steps, and what is to be seen."""

    maps: dict[tuple[Any, int], _Sum] = field(default_factory=dict)
    at: tuple[int | None, int | None] = (None, None)
    shown: list[tuple[AttentionCall, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class _SemanticCFG:
    """One node's settings, and a key to its state.

    Attributes:
        stride: of the grid that the maps are brought to.
    """

    settings: Settings
    stride: int
    span: Span
    recorder: Recorder
    observer: Observer
    effect: Effect
    key: object

    def requests(self, sites: tuple[Site, ...]) -> tuple[ReadWeights, ...]:
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
        return (pixels, text) if self.settings.completion else (text,)  # pixels first: the text's maps are completed with them

    def read_pixels(self, call: AttentionCall, weights: Tensor) -> None:
        call.forward[self.key, call.site.name] = (
            weights / weights.sum(dim=-1, keepdim=True) if call.kind == "joint" else weights
        )

    def read_text(self, call: AttentionCall, weights: Tensor) -> None:
        run, self_map = call.run, call.forward.pop((self.key, call.site.name), None)
        if run is None:
            return
        self.recorder.read_pair(call, weights, self_map)
        if run.state.get(self.key):  # nothing to even out in this run
            return
        # Conditionings may come at the same time, on threads; each has maps of its own.
        now: _Evaluation = run.state.setdefault((self.key, run.evaluation), _Evaluation())
        now.at = (call.step, call.steps)
        if self.observer.watching() and (rows := call.rows(COND)):
            now.shown.append((call, weights[rows][0]))
        settings, size = self.settings, (-(-call.latent[0] // self.stride), -(-call.latent[1] // self.stride))
        for part in call.parts():
            if part.role > 1 or not part.first_time:
                continue
            cross = weights[part.given]
            if part.role == 1:
                cross = maths.against_start(cross, self._start(call, cross))
            maps = maths.layer_maps(
                cross,
                None if self_map is None else self_map[part.given],
                grid=call.grid,
                size=size,
                powers=settings.completion,
                sigma=settings.smoothing,
                released=settings.form == RELEASED,
            )
            # A negative that is given a positive's area is given its name as well.
            now.maps.setdefault((part.uuid, part.role), _Sum()).add(maps)

    @staticmethod
    def _start(call: AttentionCall, cross: Tensor) -> int | Tensor:
        """The column that takes what nothing else wants: CLIP's start token; for T5, which has none, the most attended one."""
        return 0 if call.kind == "cross" else cross.mean(dim=(0, 1)).argmax(dim=0, keepdim=True)

    def even_out(self, args: Mapping[str, Any]) -> Sequence[Tensor]:
        """A pre-CFG function: the unconditional prediction with which CFG, whoever does it, is S-CFG."""
        given, scale = list(args["conds_out"]), float(args["cond_scale"])
        run: SamplingRun | None = args["model_options"].get("transformer_options", {}).get(RUN)
        if run is None or not run.inside(self.span, args["sigma"], args["model"].model_sampling):
            return given
        now: _Evaluation | None = run.state.pop((self.key, run.evaluation), None)
        if math.isclose(scale, 1.0) or args["conds"][1] is None:
            run.state[self.key] = True
            run.why[self.effect] = "at cfg 1 there is no guidance to even out; raise cfg"
            return given
        if now is None or not now.maps:
            raise RuntimeError(
                f"{METHOD} saw no attention in this step: another node replaces the model's attention layers, or samples "
                "in a way that hides them. Take that node out, or end Semantic-aware CFG before it starts (end_percent)."
            )
        conditional, unconditional = (_picture(t) for t in given[:2])
        run.acted.add(self.effect)
        ratio = self._ratio(now, args, conditional, unconditional, scale)
        true = run.state[EVENED][1] if EVENED in run.state else given[1]
        given[1] = maths.evened(conditional, unconditional, scale, ratio).reshape(true.shape)
        run.state[EVENED] = (given[1], true)
        return given

    def _ratio(
        self, now: _Evaluation, args: Mapping[str, Any], conditional: Tensor, unconditional: Tensor, scale: float
    ) -> Tensor:
        """``γ_i / γ [B, H, W]`` of this evaluation; what is to be seen is shown."""
        settings, x = self.settings, _picture(args["input"])
        owner, count = maths.ownership(self._parts(0, now, args), x)
        reference = torch.ones_like(owner, dtype=torch.bool)
        if settings.reference != IMAGE:
            front = maths.foreground(self._parts(1, now, args), x)
            reference = front if settings.reference == FOREGROUND else ~front
        for call, weights in now.shown:
            self.observer.layer(call, weights)
        if self.observer.watching():
            self.observer.regions(*now.at, owner[0], count - 1)
        return maths.ratios(
            maths.guidance_norm(conditional, unconditional),
            owner,
            reference,
            settings.min_ratio,
            settings.max_ratio,
            limit=settings.max_scale / scale if scale > 0 else float("inf"),
            sigma=settings.smoothing,
            count=count,
            released=settings.form == RELEASED,
        )

    @staticmethod
    def _parts(role: int, now: _Evaluation, args: Mapping[str, Any]) -> list[maths.Part]:
        """The conditionings of a role that count at this step."""
        out, x = [], args["input"]
        for cond in args["conds"][role]:
            if (cond["uuid"], role) not in now.maps:
                continue
            part = comfy.samplers.get_area_and_mult(cond, x, args["sigma"])
            if part is not None:
                top, left = part.area[-2:] if part.area is not None else (0, 0)
                mult = _picture(part.mult)[:, 0].float()
                out.append(maths.Part(now.maps[cond["uuid"], role].mean.to(x.device), (top, left), mult))
        return out


def _picture(latent: Tensor) -> Tensor:
    """``[B, c, H, W]`` of a latent, which may be a film of one frame; longer ones are refused before (`Effect.pictures`)."""
    return latent[:, :, 0] if latent.ndim == 5 else latent


def restore(args: Mapping[str, Any]) -> Tensor:
    """The first post-CFG function: those that come after it see the unconditional prediction that the model made."""
    run: SamplingRun | None = args["model_options"].get("transformer_options", {}).get(RUN)
    given, true = (None, None) if run is None else run.state.pop(EVENED, (None, None))
    if given is not None and true is not None:
        given.copy_(true)
    return args["denoised"]


def apply(model: ModelPatcher, settings: Settings = Settings(), observer: Observer = NOBODY) -> tuple[ModelPatcher, Maps]:
    """A clone of ``model`` with semantic-aware CFG on it, and the handle to the maps that its runs will have used.

    Args:
        observer: is shown them while they form.

    Raises:
        ValueError: when bounds are the wrong way round, or the model family is unknown or has no text attention.
    """
    for name, known in (("reference", REFERENCES), ("layers", LAYERS), ("form", FORMS)):
        if (value := getattr(settings, name)) not in known:
            raise ValueError(f"{METHOD}: {name} must be one of {', '.join(known)}, not “{value}”.")
    if settings.min_ratio > settings.max_ratio:
        raise ValueError(f"{METHOD}: min_ratio ({settings.min_ratio}) is above max_ratio ({settings.max_ratio}); swap them.")
    span = Span.checked(METHOD, settings.start_percent, settings.end_percent)
    family, sites = model_sites(model)
    chosen = (every_site if settings.layers == ALL_LAYERS else auto_sites)(sites, family)
    maps = Maps(Kept(kind=BOTH if settings.completion else CROSS), observer)
    method = _SemanticCFG(
        settings,
        stride=min(s.stride for s in chosen),
        span=span,
        recorder=Recorder(maps, chosen, mean_heads=True, by_product=True),
        observer=observer,
        effect=Effect(span, observer.effect, METHOD),
        key=object(),
    )
    patched = model.clone()
    request(patched, *method.requests(chosen))
    watch(patched, method.effect)
    patched.set_model_sampler_pre_cfg_function(method.even_out)
    after = patched.model_options.get("sampler_post_cfg_function", [])
    patched.model_options["sampler_post_cfg_function"] = [restore, *(f for f in after if f is not restore)]
    return patched, maps
