"""The engine of a search: draws the pictures of many head sets in one batch, and has them scored.

Sets differ only in the heads that SoftPAG perturbs, so a batch holds every set's pictures, row by row from the same noise. What lies
before a set's first perturbed block is replayed from its conditional pass (`prefix_cache`); sets that begin at the same block share a
perturbed pass. A picture is the one that SoftPAG and a KSampler make of the same seed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from PIL import Image
from torch import Tensor

from ..patches.hook.install import REQUESTS, ModelPatcher, install, model_sites
from ..patches.hook.requests import ReadWeights, ShareMap, Span
from ..patches.hook.sites import Heads
from ..patches.prompts import refuse
from ..patches.softpag import Perturbation, scale_of
from ..scoring.scorers import Scorer
from .batches import ROWS, Batch, HeadSet, alike, batches, joined, tiled
from .identity import Identity, Patched, identity
from .log import Evaluation
from .sampling import SetsGuider, Step, with_own_noise
from .settings import Settings

SHOWN, SMALL = 4, 256  # so many pictures of a set are kept, of this size at the most
VERSION = 1  # of what a score means; another one makes logs of before useless


class Engine:
    """Scores head sets on one model, for one list of prompts.

    Args:
        positives: one conditioning per prompt; picture ``i`` takes them in turn, from the noise of ``seed + i``.
        latent: a ComfyUI LATENT: the size, or pictures to start from (taken in turn as well), and perhaps a noise mask.
        scorers: one or more; each scores every picture.
        texts: what the scorers compare pictures with: one for all, or one per conditioning.
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
        scorers: Sequence[Scorer],
        texts: Sequence[str],
        settings: Settings,
        rows: int = 0,
    ):
        settings.check()
        if not positives or len(texts) not in (1, len(positives)):
            raise ValueError(
                f"HeadHunter: there are {len(positives)} conditionings and {len(texts)} texts; give one text, or one for each."
            )
        _refuse_readers(model)
        refuse(model, "HeadHunter")
        self.family, self.sites = model_sites(model)
        settings = replace(settings, scale=scale_of(self.family, settings.scale))
        self.by_name = {site.name: site for site in self.sites}
        self.given, self.vae, self.negative, self.scorers, self.settings = model, vae, negative, tuple(scorers), settings
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
        self.alike = alike(self.positives)
        self.shared: dict[tuple[int, ...], list[Step]] = {}
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

    def plan(self, sets: Sequence[HeadSet], images: Sequence[int]) -> list[Batch]:
        """Batches: pictures whose prompts can be together, and sets that begin at about the same place."""
        groups: dict[int, list[int]] = {}
        for i in images:
            groups.setdefault(self.alike[i % len(self.positives)], []).append(i)

        def start(heads: HeadSet) -> int:
            return min((self.by_name[name].layer for name, _ in heads), default=-1)

        return batches(sets, list(groups.values()), self.rows, start)

    def perturbation(self, heads: HeadSet) -> Perturbation | None:
        """What SoftPAG does with a set; None for no heads."""
        return Perturbation(dict(self.heads(heads).chosen), self.settings.perturbation) if heads else None

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
        guider = SetsGuider(
            self.model,
            perturbations=[self.perturbation(heads) for heads in sets],
            sites=self.sites,
            pictures=pictures,
            scale=settings.scale,
            span=self.span,
            shared=self.shared.setdefault(tuple(images), []),
        )
        guider.set_conds(joined([self.positives[i % len(self.positives)] for i in images]), self.negative)
        guider.set_cfg(settings.cfg)
        own = comfy.samplers.sampler_object(settings.sampler_name)
        function = with_own_noise(own, settings.sampler_name, [settings.seed + i for i in images], count)
        sampler = comfy.samplers.KSAMPLER(function, own.extra_options, own.inpaint_options)

        def step(i: int, x0: Tensor, x: Tensor, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if self.callback is not None:
                self.callback(i, x0, x, total)

        out = guider.sample(
            tiled(noise, count), tiled(image, count), sampler, self.sigmas, mask, step, True, settings.seed + images[0]
        )
        return out.to(comfy.model_management.intermediate_device())

    @torch.inference_mode()
    def evaluate(self, sets: Sequence[HeadSet], images: Sequence[int]) -> list[Evaluation]:
        """Scores of every set on every picture, and small copies of the first pictures."""
        pictures = self.vae.decode(self.latents(sets, images)).float().cpu().clamp(0, 1)
        scores = torch.empty(len(pictures), len(self.scorers))
        texts = [self.texts[i % len(self.texts)] for i in images] * len(sets)
        for text in dict.fromkeys(texts):
            where = [j for j, t in enumerate(texts) if t == text]
            for s, scorer in enumerate(self.scorers):
                scores[where, s] = scorer.scores(pictures[where], [text])[:, 0].float().cpu()
        found: list[Evaluation] = []
        for c, heads in enumerate(sets):
            for j, i in enumerate(images):
                row = c * len(images) + j
                small = _jpeg(pictures[row]) if i < SHOWN else None
                found.append(Evaluation(self.text(heads), i, tuple(map(float, scores[row])), small))
        return found

    def identities(self) -> list[Identity]:
        """Everything that a score of each scorer depends on."""
        joint = {} if self.family == "unet" else {"tokens": Perturbation.tokens}  # once text rows stayed as they were
        found = identity(
            {
                **joint,
                "version": VERSION,
                "family": self.family,
                "settings": asdict(self.settings),
                "texts": self.texts,
                "scorer": "",
                "latent": [self.latent, self.mask],
                "positive": self.positives,
                "negative": self.negative,
                "sigmas": self.sigmas,
                "model": Patched(self.given),
                "vae": Patched(self.vae.patcher),
            }
        )
        return [({**found[0], "scorer": scorer.key}, found[1]) for scorer in self.scorers]


def _refuse_readers(model: ModelPatcher) -> None:
    """Refuse a model on which a node keeps maps from step to step: a batch here holds now more, now fewer pictures.

    Raises:
        ValueError: with what to do.
    """
    asked = model.model_options.get("transformer_options", {}).get(REQUESTS, ())
    if any(isinstance(request, (ReadWeights, ShareMap)) for request in asked):
        raise ValueError(
            "HeadHunter: on this model a node reads or shares attention maps (Semantic-aware CFG, Capture Attention Maps, Detail++), and a "
            "search draws many pictures in one batch. Connect the model from before that node."
        )


def _jpeg(picture: Tensor) -> bytes:
    """A small copy of a picture ``[h, w, 3]``."""
    small = Image.fromarray((picture * 255).round().to(torch.uint8).numpy())
    small.thumbnail((SMALL, SMALL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=92)
    return file.getvalue()
