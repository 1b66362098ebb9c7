"""HeadHunter on ComfyUI models: what head sets are worth, many of them in one batch, and the search over them.

Candidates differ only in the heads that SoftPAG perturbs, so a batch holds every candidate's pictures, row by row from the same noise.
As long as the rows are still alike (before ``start_percent``, and up to the first guided step) they are computed once for all; what
lies before a candidate's first perturbed block is replayed from its conditional pass (`reuse`); candidates that begin at the same block
share a perturbed pass, in which every row has its own heads. A picture is the one that SoftPAG and a KSampler make of the same seed.
"""

from __future__ import annotations

import inspect
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import comfy.model_management
import comfy.sample
import comfy.samplers
import numpy as np
import torch
from comfy.k_diffusion import sampling as k_diffusion
from PIL import Image
from torch import Tensor

from ..methods import headhunter as maths
from ..methods import softpag
from ..patches.hook import prefix_cache
from ..patches.hook.attention import (
    AttentionCall,
    ExtraForward,
    ModelPatcher,
    Request,
    Span,
    install,
    model_sites,
    with_extra_forward,
)
from ..patches.hook.sites import Heads, Site, check
from ..patches.prompts import refuse
from ..scoring.scorers import Scorer
from . import log as evaluations

HeadSet: TypeAlias = tuple[tuple[str, int], ...]  # (site, head number) pairs
Unit: TypeAlias = tuple[tuple[HeadSet, ...], tuple[int, ...]]  # sets, and numbers of the pictures that each is tried on
Row: TypeAlias = tuple[str, int, float, "bytes | None"]  # a set's text, picture, score, and a small JPEG of it
Progress = Callable[[int, int, float], None]  # pictures done, pictures in all, seconds left

ROWS = 32  # pictures in a batch at the most: more is no faster, and shown progress gets coarse
SHOWN, SMALL = 4, 256  # so many pictures of a set are kept, of this size at the most
VERSION = 1  # of what a score means; another one makes logs of before useless


@dataclass(frozen=True)
class Settings:
    """The sampler's numbers and SoftPAG's, as their nodes have them."""

    seed: int = 0
    steps: int = 20
    cfg: float = 5.0
    sampler_name: str = "euler"
    scheduler: str = "normal"
    scale: float = 3.0
    perturbation: float = 1.0
    start_percent: float = 0.0

    def check(self) -> None:
        """Raises ValueError for settings that cannot be searched with."""
        known = comfy.samplers.KSampler
        if self.sampler_name not in known.SAMPLERS or self.scheduler not in known.SCHEDULERS:
            raise ValueError(
                f"HeadHunter: this ComfyUI has no sampler “{self.sampler_name}” or no scheduler “{self.scheduler}”."
            )
        if self.sampler_name == "dpm_adaptive" or self.sampler_name.endswith("cfg_pp"):
            raise ValueError(
                f"HeadHunter: the sampler “{self.sampler_name}” mixes the pictures of a batch or reads single predictions; choose another."
            )
        if self.scale == 0 or not 0 < self.perturbation <= 1:
            raise ValueError(
                "HeadHunter: with scale 0 or perturbation 0 all heads are alike; set scale to 3 and perturbation to 1."
            )
        if not 0 <= self.start_percent < 1 or self.steps < 1:
            raise ValueError("HeadHunter: start_percent must be from 0 up to, but not including, 1, and steps 1 or more.")


def all_heads(sites: Iterable[Site], family: str) -> Heads:
    """Every head of a model."""
    return Heads(family, tuple((s.name, tuple(range(s.heads))) for s in sites))


class Engine:
    """Scores head sets on one model, for one list of prompts.

    Args:
        positives: one conditioning per prompt; picture ``i`` takes them in turn, from the noise of ``seed + i``.
        latent: a ComfyUI LATENT: the size, or pictures to start from (taken in turn as well), and perhaps a noise mask.
        texts: what the scorer compares pictures with: one for all, or one per conditioning.
        rows: pictures in a batch; 0 is as many as fit, up to `ROWS`.

    Raises:
        ValueError: for settings, texts or a model that do not fit.
    """

    def __init__(
        self,
        model: ModelPatcher,
        vae: Any,
        positives: Sequence[Sequence[Any]],
        negative: Sequence[Any],
        latent: Mapping[str, Any],
        scorer: Scorer,
        texts: Sequence[str],
        settings: Settings,
        rows: int = 0,
    ):
        settings.check()
        if not positives or len(texts) not in (1, len(positives)):
            raise ValueError(
                f"HeadHunter: there are {len(positives)} conditionings and {len(texts)} texts; give one text, or one for each."
            )
        refuse(model, "HeadHunter")
        self.family, self.sites = model_sites(model)
        self.by_name = {site.name: site for site in self.sites}
        self.given, self.vae, self.negative, self.scorer, self.settings = model, vae, negative, scorer, settings
        self.positives, self.texts = list(positives), list(texts)
        self.latent = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        self.mask = latent.get("noise_mask")
        self.model = model.clone()
        install(self.model)
        plan = comfy.samplers.KSampler(
            model, settings.steps, model.load_device, settings.sampler_name, settings.scheduler, 1.0, model.model_options
        )
        self.sigmas = plan.sigmas
        self.span = Span(settings.start_percent, 1.0)
        self.rows = rows or self._fitting()
        self.alike = _alike(self.positives)
        self.shared: dict[tuple[int, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.callback: Callable[[int, Tensor, Tensor, int], None] | None = None  # as KSampler's

    def _fitting(self) -> int:
        """As many rows as half of the device's memory holds. Not of what is free now: the same search makes the same batches."""
        room = comfy.model_management.get_total_memory(self.model.load_device) / 2
        count = ROWS
        while count > 1 and self.model.model.memory_required([2 * count, *self.latent.shape[1:]]) > room:
            count //= 2
        return count

    # --- names and order ---

    def text(self, heads: HeadSet) -> str:
        """A set's name in logs, whatever order its heads are in: the selection grammar; nothing for no heads."""
        return self.heads(heads).text

    def heads(self, heads: HeadSet) -> Heads:
        """The set as ``ATTUNE_HEADS``."""
        by_site: dict[str, set[int]] = {}
        for site, number in heads:
            by_site.setdefault(site, set()).add(number)
        order = sorted(by_site, key=lambda name: self.by_name[name].layer)
        return Heads(self.family, tuple((name, tuple(sorted(by_site[name]))) for name in order))

    def first(self, heads: HeadSet) -> Site | None:
        """The first perturbed site of a set."""
        return min((self.by_name[name] for name, _ in heads), key=lambda s: s.layer, default=None)

    def plan(self, sets: Sequence[HeadSet], images: Sequence[int]) -> list[Unit]:
        """Batches: pictures whose prompts can be together, and sets that begin at about the same place."""
        groups: dict[int, list[int]] = {}
        for i in images:
            groups.setdefault(self.alike[i % len(self.positives)], []).append(i)

        def start(heads: HeadSet) -> int:
            first = self.first(heads)
            return -1 if first is None else first.layer

        ordered = sorted(sets, key=start)
        units: list[Unit] = []
        for group in groups.values():
            for part in _parts(group, self.rows):
                units += [(tuple(some), tuple(part)) for some in _parts(ordered, max(1, self.rows // len(part)))]
        return units

    # --- pictures ---

    def latents(self, sets: Sequence[HeadSet], images: Sequence[int]) -> Tensor:
        """Finished latents ``[sets · images, c, H, W]``, set by set."""
        settings, count, pictures = self.settings, len(sets), len(images)
        which = [i % len(self.latent) for i in images]
        image = self.latent[which]
        noise = torch.cat([comfy.sample.prepare_noise(image[j : j + 1], settings.seed + i) for j, i in enumerate(images)])
        mask = self.mask
        if mask is not None:
            mask = mask.reshape(-1, 1, *mask.shape[-2:])
            mask = mask[[i % len(mask) for i in images]].repeat(count, 1, 1, 1)
        guider = _Guider(self, sets, pictures, self.shared.setdefault(tuple(images), []))
        guider.set_conds(_joined([self.positives[i % len(self.positives)] for i in images]), self.negative)
        guider.set_cfg(settings.cfg)
        own = comfy.samplers.sampler_object(settings.sampler_name)
        function = _with_own_noise(own, settings.sampler_name, [settings.seed + i for i in images], count)
        sampler = comfy.samplers.KSAMPLER(function, own.extra_options, own.inpaint_options)

        def step(i: int, x0: Tensor, x: Tensor, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if self.callback is not None:
                self.callback(i, x0, x, total)

        out = guider.sample(
            _tiled(noise, count), _tiled(image, count), sampler, self.sigmas, mask, step, True, settings.seed + images[0]
        )
        return out.to(comfy.model_management.intermediate_device())

    @torch.inference_mode()
    def evaluate(self, sets: Sequence[HeadSet], images: Sequence[int]) -> list[Row]:
        """Scores of every set on every picture, and small copies of the first pictures."""
        pictures = self.vae.decode(self.latents(sets, images)).float().cpu().clamp(0, 1)
        scores = torch.empty(len(pictures))
        texts = [self.texts[i % len(self.texts)] for i in images] * len(sets)
        for text in dict.fromkeys(texts):
            where = [j for j, t in enumerate(texts) if t == text]
            scores[where] = self.scorer.scores(pictures[where], [text])[:, 0].float().cpu()
        rows: list[Row] = []
        for c, heads in enumerate(sets):
            for j, i in enumerate(images):
                row = c * len(images) + j
                small = _jpeg(pictures[row]) if i < SHOWN else None
                rows.append((self.text(heads), i, float(scores[row]), small))
        return rows

    def identity(self) -> tuple[dict[str, Any], np.ndarray]:
        """Everything that a score depends on: what is compared exactly, and numbers that may differ a little (see `evaluations`)."""
        return evaluations.identity(
            {
                "version": VERSION,
                "family": self.family,
                "settings": asdict(self.settings),
                "texts": self.texts,
                "scorer": self.scorer.key,
                "latent": [self.latent, self.mask],
                "positive": self.positives,
                "negative": self.negative,
                "sigmas": self.sigmas,
                "model": evaluations.Patched(self.given),
                "vae": evaluations.Patched(self.vae.patcher),
            }
        )


def _parts(things: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Equal parts (to one) of at most ``size``, in order."""
    count = math.ceil(len(things) / size)
    for i in range(count):
        yield things[len(things) * i // count : len(things) * (i + 1) // count]


def _tiled(t: Tensor, count: int) -> Tensor:
    return t.repeat(count, *[1] * (t.ndim - 1))


def _jpeg(picture: Tensor) -> bytes:
    """A small copy of a picture ``[h, w, 3]``."""
    small = Image.fromarray((picture * 255).round().to(torch.uint8).numpy())
    small.thumbnail((SMALL, SMALL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=92)
    return file.getvalue()


# --- prompts in one batch -------------------------------------------------------------------------------------------------


def _joinable(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two conditionings differ in nothing but the text, so that they can be rows of one batch."""
    if len(a) != 1 or len(b) != 1 or a[0][0].shape != b[0][0].shape or len(a[0][0]) != 1 or a[0][1].keys() != b[0][1].keys():
        return False
    for key, value in a[0][1].items():
        other = b[0][1][key]
        if isinstance(value, Tensor):
            if key != "pooled_output" or not isinstance(other, Tensor) or value.shape != other.shape:
                return False
        elif value is not other and not (isinstance(value, (int, float, str)) and value == other):
            return False
    return True


def _alike(positives: Sequence[Sequence[Any]]) -> list[int]:
    """For every conditioning the number of the first one that it can share a batch with."""
    return [next(j for j in range(i + 1) if j == i or _joinable(positives[j], p)) for i, p in enumerate(positives)]


def _joined(conditionings: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """One conditioning with a row per picture; ComfyUI repeats the rows for every candidate."""
    first = conditionings[0]
    if all(c is first for c in conditionings):
        return first
    options = dict(first[0][1])
    if isinstance(options.get("pooled_output"), Tensor):
        options["pooled_output"] = torch.cat([c[0][1]["pooled_output"] for c in conditionings])
    return [[torch.cat([c[0][0] for c in conditionings]), options]]


# --- sampling -----------------------------------------------------------------------------------------------------------


def _with_own_noise(own: Any, name: str, seeds: Sequence[int], count: int) -> Callable[..., Tensor]:
    """A sampler whose own noise is each picture's alone, and the same for all candidates."""
    takes = "noise_sampler" in inspect.signature(own.sampler_function).parameters
    tree = "_sde" in name and name != "er_sde"

    def function(model: Any, x: Tensor, sigmas: Tensor, **kwargs: Any) -> Tensor:
        one = x[:1]
        if takes and len(sigmas) > 1:
            if tree:
                low, high = sigmas[sigmas > 0].min(), sigmas.max()
                cpu = not name.endswith("_gpu")
                draws = [k_diffusion.BrownianTreeNoiseSampler(one, low, high, seed=s, cpu=cpu) for s in seeds]
            else:
                draws = [k_diffusion.default_noise_sampler(one, seed=s) for s in seeds]
            kwargs["noise_sampler"] = lambda sigma, after: _tiled(torch.cat([draw(sigma, after) for draw in draws]), count)
        if own.inpaint_options.get("random"):  # KSAMPLER has drawn it for the batch
            drawn = [torch.randn(one.shape, generator=torch.manual_seed(s + 1), device="cpu") for s in seeds]
            model.noise = _tiled(torch.cat(drawn).to(one), count)
        return own.sampler_function(model, x, sigmas, **kwargs)

    return function


class _Guider(comfy.samplers.CFGGuider):
    """CFG and SoftPAG for the rows of several candidates, set by set, each with its own heads."""

    def __init__(self, engine: Engine, sets: Sequence[HeadSet], pictures: int, shared: list[tuple[Tensor, Tensor, Tensor]]):
        super().__init__(engine.model)
        self.engine, self.sets, self.pictures = engine, sets, pictures
        self.shared = shared  # input, noise level and prediction of calls that are the same for all candidates
        self.calls = 0
        self.together = True
        self.passes: dict[tuple[str, int], list[int]] = {}  # candidates by their first perturbed block
        for number, heads in enumerate(sets):
            first = engine.first(heads)
            if first is not None:
                self.passes.setdefault(first.block, []).append(number)

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        options = model_options or {}
        count = len(self.sets)
        call, self.calls = self.calls, self.calls + 1
        self.together = self.together and (count == 1 or torch.equal(x, _tiled(x[: self.pictures], count)))
        rows = x[: self.pictures] if self.together else x
        levels = timestep[: len(rows)]
        if self.engine.span.holds(timestep, self.inner_model.model_sampling):
            return self._guided(x, timestep, rows, levels, options, seed)
        if not self.together:
            return super().predict_noise(x, timestep, options, seed)
        if call < len(self.shared) and torch.equal(self.shared[call][0], rows) and torch.equal(self.shared[call][1], levels):
            return _tiled(self.shared[call][2], count)
        denoised = super().predict_noise(rows, levels, options, seed)
        if call == len(self.shared):
            self.shared.append((rows.clone(), levels.clone(), denoised.clone()))
        return _tiled(denoised, count)

    def _guided(
        self, x: Tensor, timestep: Tensor, rows: Tensor, levels: Tensor, options: dict[str, Any], seed: int | None
    ) -> Tensor:
        count, pictures, settings = len(self.sets), self.pictures, self.engine.settings
        seen: list[Tensor] = []

        def look(args: dict[str, Any]) -> Tensor:
            seen.append(args["cond_denoised"])
            return args["denoised"]

        transformer = options.get("transformer_options", {})
        prefixes = tuple((self.engine.span, block) for block in self.passes)
        recording = {
            **options,
            "sampler_post_cfg_function": [*options.get("sampler_post_cfg_function", ()), look],
            "transformer_options": {
                **transformer,
                prefix_cache.PREFIXES: (*transformer.get(prefix_cache.PREFIXES, ()), *prefixes),
            },
        }
        denoised = super().predict_noise(rows, levels, recording, seed)
        (conditional,) = seen
        if self.together:
            denoised, conditional = _tiled(denoised, count), _tiled(conditional, count)
        out = denoised.clone()
        for block, members in self.passes.items():
            where = [c * pictures + j for c in members for j in range(pictures)]
            source = tuple(row % pictures if self.together else row for row in where)
            own = with_extra_forward(options, ExtraForward(self._requests(members), block, source))
            conds = [self.conds["positive"]]
            (perturbed,) = comfy.samplers.calc_cond_batch(self.inner_model, conds, x[where], timestep[where], own)
            out[where] = softpag.guide(denoised[where], conditional[where], perturbed, settings.scale)
        return out

    def _requests(self, members: Sequence[int]) -> tuple[Request, ...]:
        """Every candidate's heads for its own rows; candidates with the same heads of a site share a request."""
        u = self.engine.settings.perturbation

        def act(call: AttentionCall, out: Tensor, value: Tensor) -> Tensor:
            return softpag.soften(out, value, u)

        found: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for place, number in enumerate(members):
            own = range(place * self.pictures, (place + 1) * self.pictures)
            for chosen in self.engine.heads(self.sets[number]).chosen:
                found.setdefault(chosen, []).extend(own)
        return tuple(
            Request("blend", {(name, self.engine.by_name[name].kind): heads}, act, rows=tuple(rows), ignores_output=u == 1)
            for (name, heads), rows in found.items()
        )


# --- the search -----------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a search gives: the hunt itself, scores and pictures of the sets along the way, and how much was computed now."""

    hunt: maths.Hunt
    heads: Heads
    pictures: list[list[Image.Image]] = field(default_factory=list)  # of no heads, and of the set after every round
    images: int = 0
    computed: int = 0
    known: int = 0


Workers = Callable[[Sequence[Unit]], Iterator[list[Row]]]  # carries out batches, in any order


def search(
    engine: Engine,
    log: evaluations.Search,
    candidates: Heads | None,
    rounds: int,
    heads_per_round: int,
    images: int,
    halving: int = 0,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Found:
    """Search for heads; what the log already knows is not computed again.

    Args:
        images: pictures per candidate; at least one for every conditioning.
        workers: carries out batches elsewhere; None: here, one after the other.

    Raises:
        ValueError: for candidates of another model, or too few images for the conditionings.
    """
    chosen = check(candidates or all_heads(engine.sites, engine.family), engine.sites, engine.family)
    every = [(name, number) for name, numbers in chosen.items() for number in numbers]
    if images < len(engine.positives):
        raise ValueError(
            f"HeadHunter: {len(engine.positives)} conditionings need images_per_candidate of at least as many, not {images}."
        )
    total = maths.evaluations(len(every), rounds, heads_per_round, images, halving)
    asked: dict[str, int] = {}
    done = computed = 0
    began = time.monotonic()

    def here(units: Sequence[Unit]) -> Iterator[list[Row]]:
        for sets, numbers in units:
            yield engine.evaluate(sets, numbers)

    def tell() -> None:
        if progress is not None:
            left = (time.monotonic() - began) / computed * (total - done) if computed else math.nan
            progress(min(done, total), total, left)

    def evaluate(sets: Sequence[Any], over: int) -> list[float]:
        nonlocal done, computed
        # Batches follow from what this search has asked for so far, never from the log: a resumed search makes the same ones.
        fresh: dict[int, list[HeadSet]] = {}
        for heads in sets:
            if asked.get(engine.text(heads), 0) < over:
                fresh.setdefault(asked.get(engine.text(heads), 0), []).append(heads)
        todo: list[Unit] = []
        for start, members in fresh.items():
            for unit, numbers in engine.plan(members, range(start, over)):
                missing = tuple(h for h in unit if not log.has(engine.text(h), numbers))
                done += (len(unit) - len(missing)) * len(numbers)
                if missing:
                    todo.append((missing, numbers))
            asked.update((engine.text(h), over) for h in members)
        tell()
        for rows in (workers or here)(todo):
            log.add(rows)
            done, computed = done + len(rows), computed + len(rows)
            tell()
        return [log.mean(engine.text(heads), over) for heads in sets]

    hunt = maths.hunt(every, evaluate, rounds, heads_per_round, images, halving)
    sets: list[Any] = [()]
    for r in hunt.rounds:
        sets.append((*sets[-1], *r.chosen))
    names = [engine.text(heads) for heads in sets]
    log.keep_pictures(names)
    pictures = [[Image.open(io.BytesIO(p)).convert("RGB") for p in log.pictures(name)] for name in names]
    return Found(hunt, engine.heads(sets[-1]), pictures, images, computed, done - computed)


def heatmap(engine: Engine, found: Found) -> dict[str, list[float | None]]:
    """Each head's score alone, as the first round found it, for every searched site; None for heads that were no candidates."""
    alone = found.hunt.rounds[0].scores
    searched = {site for site, _ in alone}
    return {
        s.name: [round(alone[s.name, n], 4) if (s.name, n) in alone else None for n in range(s.heads)]
        for s in engine.sites
        if s.name in searched
    }


def story(engine: Engine, found: Found, objective: str) -> dict[str, Any]:
    """What a head set's file says about where it comes from."""
    rounds = [{"chosen": [f"{site}:{number}" for site, number in r.chosen], "score": r.score} for r in found.hunt.rounds]
    return {
        "objective": objective,
        "scorer": engine.scorer.name,
        "scores": {"no heads": found.hunt.plain, "rounds": rounds},
        "heatmap": heatmap(engine, found),
        "images": found.images,
        "prompts": len(engine.positives),
        "settings": asdict(engine.settings),
    }


def report(engine: Engine, found: Found, objective: str) -> str:
    """The search in words."""
    hunt = found.hunt
    lines = [
        f"HeadHunter: {len(hunt.rounds[0].scores)} heads, {found.images} pictures of {len(engine.positives)} prompts for each, "
        f"scorer {engine.scorer.name}, {objective}",
        f"no heads: {hunt.plain:.4f}",
    ]
    for i, r in enumerate(hunt.rounds, 1):
        tried = sum(1 for n in r.images.values() if n < found.images)
        fewer = f"; {tried} of {len(r.images)} candidates were left early, on fewer pictures" if tried else ""
        joined = ", ".join(f"{site}:{number} ({r.scores[(site, number)]:.4f})" for site, number in r.chosen)
        lines.append(f"round {i}: {joined}; all together {r.score:.4f} ({r.score - hunt.plain:+.4f}){fewer}")
    best = max(range(len(hunt.rounds)), key=lambda i: hunt.rounds[i].score)
    if hunt.rounds[best].score > hunt.rounds[-1].score:
        lines.append(
            f"The set was worth most after round {best + 1}: search again with that many rounds to get it; all is in the log."
        )
    lines.append(f"heads: {found.heads.text}")
    lines.append(f"{found.computed} pictures made and scored now, {found.known} were in the log.")
    return "\n".join(lines)
