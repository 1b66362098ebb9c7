"""A sampling run of many head sets at once: CFG and SoftPAG for every row, each with its own heads, and noise of its own picture.

As long as the rows are still alike (before ``start_percent``, and up to the first guided step) they are computed once for all sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..methods.softpag import guide
from ..patches.hook.install import ModelPatcher
from ..patches.hook.requests import Span
from ..patches.hook.sites import Site
from ..patches.samplers import NONE, SAMPLERS, noise_sampler
from ..patches.softpag import Perturbation, perturbed_rows, recording
from .batches import tiled

Step = tuple[Tensor, Tensor, Tensor]  # input, noise level and prediction of a call that is the same for all sets


def with_own_noise(own: Any, name: str, seeds: Sequence[int], count: int) -> Callable[..., Tensor]:
    """A sampler whose own noise is each picture's alone, and the same for all sets.

    Args:
        own: ComfyUI's sampler object called ``name``.
        seeds: of the pictures; ``count`` sets follow one another in the batch.
    """
    kind = SAMPLERS[name].noise

    def function(model: Any, x: Tensor, sigmas: Tensor, **kwargs: Any) -> Tensor:
        one = x[:1]
        if kind != NONE and len(sigmas) > 1:
            draws = [noise_sampler(kind, one, sigmas, seed) for seed in seeds]
            kwargs["noise_sampler"] = lambda sigma, after: tiled(torch.cat([draw(sigma, after) for draw in draws]), count)
        if own.inpaint_options.get("random"):  # KSAMPLER has drawn it for the batch
            drawn = [torch.randn(one.shape, generator=torch.manual_seed(s + 1), device="cpu") for s in seeds]
            model.noise = tiled(torch.cat(drawn).to(one), count)
        return own.sampler_function(model, x, sigmas, **kwargs)

    return function


class SetsGuider(comfy.samplers.CFGGuider):
    """CFG and SoftPAG for the rows of several head sets, set by set.

    Args:
        perturbations: one for each set; None is no perturbation.
        pictures: of every set.
        span: where SoftPAG acts, and its ``scale``.
        shared: what calls before the span gave in other batches of the same pictures; this run adds to it.
    """

    def __init__(
        self,
        model: ModelPatcher,
        perturbations: Sequence[Perturbation | None],
        sites: tuple[Site, ...],
        pictures: int,
        scale: float,
        span: Span,
        shared: list[Step],
    ):
        super().__init__(model)
        self.perturbations, self.sites, self.pictures = perturbations, sites, pictures
        self.scale, self.span, self.shared = scale, span, shared
        self.calls = 0
        self.together = True

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        options = model_options or {}
        count = len(self.perturbations)
        call, self.calls = self.calls, self.calls + 1
        self.together = self.together and (count == 1 or torch.equal(x, tiled(x[: self.pictures], count)))
        rows = x[: self.pictures] if self.together else x
        levels = timestep[: len(rows)]
        if self.span.holds(timestep, self.inner_model.model_sampling):
            return self._guided(x, timestep, len(rows), options, seed)
        if not self.together:
            return super().predict_noise(x, timestep, options, seed)
        if call < len(self.shared) and torch.equal(self.shared[call][0], rows) and torch.equal(self.shared[call][1], levels):
            return tiled(self.shared[call][2], count)
        denoised = super().predict_noise(rows, levels, options, seed)
        if call == len(self.shared):
            self.shared.append((rows.clone(), levels.clone(), denoised.clone()))
        return tiled(denoised, count)

    def _guided(self, x: Tensor, timestep: Tensor, computed: int, options: dict[str, Any], seed: int | None) -> Tensor:
        """The guided prediction of every row, of which the first ``computed`` stand for all in the plain pass."""
        seen: list[Tensor] = []

        def look(args: dict[str, Any]) -> Tensor:
            seen.append(args["cond_denoised"])
            return args["denoised"]

        perturbed = [p for p in self.perturbations if p is not None]
        looking = {**options, "sampler_post_cfg_function": [*options.get("sampler_post_cfg_function", ()), look]}
        denoised = super().predict_noise(
            x[:computed], timestep[:computed], recording(looking, self.span, perturbed, self.sites), seed
        )
        (conditional,) = seen
        if computed < len(x):
            denoised, conditional = (tiled(t, len(self.perturbations)) for t in (denoised, conditional))
        if not perturbed:
            return denoised
        where = [c * self.pictures + j for c, p in enumerate(self.perturbations) if p is not None for j in range(self.pictures)]
        weaker = perturbed_rows(
            model=self.inner_model,
            cond=self.conds["positive"],
            x=x[where],
            sigma=timestep[where],
            model_options=options,
            perturbations=perturbed,
            sites=self.sites,
            recorded=tuple(row % computed for row in where),
        )
        out = denoised.clone()
        out[where] = guide(denoised[where], conditional[where], weaker, self.scale)
        return out
