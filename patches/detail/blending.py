"""Between sampler and model: the steps that share, read and blend.

The paper blends the latents after a step, ``z_{t-1} ← blend(z_{t-1})``. Samplers keep their latents to themselves, but every sampler
that is supported here makes the next latent by a rule that is linear in the model's input, its prediction, its earlier predictions
and noise, with the same factors for all rows (`SamplerNeeds.linear`). Blending is linear too and leaves alone what is the same in all
branches, noise above all; so blending the rule's ingredients is blending its result, exactly. `Blending` stands between sampler and
model and does that: it blends, in place, the tensor it was called with (the sampler's own), the prediction it returns and those it
returned before (a multi-step sampler's history). Samplers that keep anything else from step to step are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...methods.detail import EARLY, most_updates, step_length, threshold_at
from ..hook.install import REQUESTS
from ..hook.tensors import index_or_slice
from ..samplers import HISTORY, NONE, SAMPLERS, evaluations, noise_sampler
from .gradient import gradient
from .guider import Guider
from .session import FINISH, OPTIMIZE, Session


class Blending:
    """Stands for the model before the sampler (see the module's text).

    Args:
        model: ComfyUI's, which knows the picture under a noise mask.
        plan: how often the sampler calls it in each step.
    """

    def __init__(self, model: Any, session: Session, guider: Guider, plan: list[int]):
        self.model, self.session, self.guider = model, session, guider
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
                self.guider.follow_base()
            return self.model(x, sigma, **kwargs)
        options = kwargs["model_options"]
        if first:
            self._optimise(x, sigma, step, kwargs)
        session.reading = first
        asked = options.get("transformer_options", {})
        asked = {**asked, REQUESTS: (*asked.get(REQUESTS, ()), *session.requests())}
        denoised = self.model(x, sigma, **{**kwargs, "model_options": {**options, "transformer_options": asked}})
        if first:
            session.make_masks(self.guider.areas, x.device)
            session.show_masks(step, self.steps[-1] + 1)
        denoised = session.blend(denoised)
        for t in (x, *self.older):
            t.copy_(session.blend(t))
        self.older = [denoised, *self.older][:HISTORY]
        return denoised

    def _optimise(self, x: Tensor, sigma: Tensor, step: int, kwargs: Mapping[str, Any]) -> None:
        """Move the base's latents down the gradient of their maps' loss (equation 9), in place, each until its loss is small enough."""
        session = self.session
        settings = session.settings
        if settings.optimize == OPTIMIZE[0] or step >= settings.optimize_steps or settings.step_size == 0:
            return
        sampling = self.inner_model.inner_model.model_sampling
        # The paper's latents are those of the network's scale: there x is divided by c, and so the way back has it twice.
        scale = 1 / float(sampling.calculate_input(sigma[:1], x.new_ones(1, 1, 1, 1)))
        length = step_length(step, self.steps[-1] + 1, settings.step_size, x[0].numel()) * scale**2
        early = float(sigma[0]) > float(sampling.percent_to_sigma(EARLY))
        pictures = list(range(session.pictures))
        for _ in range(most_updates(early)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            found = gradient(session, self.guider, self.model, x, sigma, pictures, kwargs)
            if found is None:
                return
            losses, by_z = found
            x[index_or_slice(pictures, x.device)] -= length * by_z
            pictures = [p for p, loss in zip(pictures, losses.tolist(), strict=True) if loss >= threshold_at(step)]
            if not pictures:
                return


def with_branches(own: Any, name: str, session: Session, guider: Guider) -> comfy.samplers.KSAMPLER:
    """ComfyUI's sampler ``own`` with `Blending` before it, whose noise is the same for all branches."""

    def function(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], **kwargs: Any) -> Tensor:
        seed = extra_args.get("seed")
        if SAMPLERS[name].noise != NONE and len(sigmas) > 1:
            draw = noise_sampler(SAMPLERS[name].noise, x[: session.pictures], sigmas, seed)
            kwargs["noise_sampler"] = lambda sigma, after: draw(sigma, after).repeat(session.total, *[1] * (x.ndim - 1))
        if own.inpaint_options.get("random"):  # KSAMPLER has drawn it for every row
            rows = model.noise[: session.pictures]
            generator = torch.manual_seed(41 if seed is None else seed + 1)
            drawn = torch.randn(rows.shape, generator=generator, device="cpu").to(rows)
            model.noise = drawn.repeat(session.total, *[1] * (drawn.ndim - 1))
        blending = Blending(model, session, guider, evaluations(name, sigmas))
        shown: Callable[[dict[str, Any]], None] | None = kwargs.pop("callback", None)

        def callback(info: dict[str, Any]) -> None:
            if blending.step != info["i"]:
                raise RuntimeError(
                    f"Detail++ Sampler does not know this version of the sampler “{name}”; choose another, or update Attune."
                )
            if shown is not None:
                shown(info)

        return own.sampler_function(blending, x.clone(), sigmas, extra_args=extra_args, callback=callback, **kwargs)

    return comfy.samplers.KSAMPLER(function, own.extra_options, own.inpaint_options)
