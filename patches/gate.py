"""Semantic gate on ComfyUI models: the estimate of the picture is decoded and scored now and then, an edit carries the gates to attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import comfy.latent_formats
import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods import gate as maths
from ..scoring.scorers import Scorer
from .hook.call import AttentionCall
from .hook.effects import Effect, watch
from .hook.install import ModelPatcher, request
from .hook.requests import COND, EditWeights, Span
from .hook.run import RUN, SamplingRun
from .hook.sites import Heads
from .observer import NOBODY, Observer
from .prompts import edit_own, guard, text_places

if TYPE_CHECKING:
    from ..language.words import Words

METHOD = "Semantic Gate"
DAMP, INVERT = MODES = ("damp", "invert")
OPEN = "every gate stayed open; raise the threshold to lie among the scores"
SHORT = "no step of this run comes after a score; sample more steps, or widen start_percent and end_percent"
PREVIEW = 8  # pixels of a picture per latent pixel of a preview


@dataclass(frozen=True)
class Settings:
    """What a node may choose (its inputs say what each does)."""

    threshold: float = 0.22
    softness: float = 0.02
    every: int = 5
    start_percent: float = 0.2
    end_percent: float = 0.8
    floor: float = 0.3
    mode: str = DAMP


DEFAULTS = Settings()


@dataclass
class _State:
    """Of one run: the step that was scored first and last, and the gain of every column since then."""

    first: int | None = None
    step: int | None = None
    gain: Tensor | None = None  # [pictures, T]


@dataclass(frozen=True)
class _SemanticGate:
    texts: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    count: int
    scorer: Scorer
    vae: Any
    threshold: float
    softness: float
    floor: float
    every: int
    span: Span
    mode: str
    observer: Observer
    effect: Effect
    key: object = field(default_factory=object)

    def __deepcopy__(self, memo: dict[int, Any]) -> _SemanticGate:
        """Cloning a model copies what is on it: not the scorer and the VAE."""
        return self

    def look(self, args: Mapping[str, Any]) -> Tensor:
        """A post-CFG function: scores the estimate where it is time to, and changes nothing itself."""
        denoised, options = args["denoised"], args["model_options"].get("transformer_options", {})
        run: SamplingRun | None = options.get(RUN)
        schedule = options.get("sample_sigmas")
        if run is None or schedule is None:
            return denoised
        sampling = args["model"].model_sampling
        step, levels = run.step(args["sigma"], schedule), run.schedule(schedule)
        state: _State = run.state.setdefault(self.key, _State())
        run.why.setdefault(self.effect, SHORT)
        last = step + 2 >= len(levels) or not run.within(self.span, levels[step + 1], sampling)
        if step == state.step or last or not run.inside(self.span, args["sigma"], sampling):
            return denoised  # scored already, or nothing to come that a score would change
        if state.first is None:
            state.first = step
        if (step - state.first) % self.every:
            return denoised
        comfy.model_management.throw_exception_if_processing_interrupted()
        scores = self.scorer.scores(self._picture(denoised, args["model"]), list(self.texts))
        # Decoding and scoring may have taken the room of the model that is being sampled.
        comfy.model_management.load_models_gpu([args["model"].current_patcher, *self.models])
        gate = maths.gates(scores.float(), self.threshold, self.softness, self.floor)
        gain = maths.of_columns(gate, self.members, self.count)
        first, *gates = torch.cat([scores[:1].to(gate), gate]).tolist()  # one wait for the device
        same = all(g == 1 for of_picture in gates for g in of_picture)
        run.why[self.effect] = OPEN
        state.step, state.gain = step, None if same else gain if self.mode == DAMP else 1 / gain
        said = ", ".join(f"{t} {s:.3g} → {g:.2f}" for t, s, g in zip(self.texts, first, gates[0], strict=True))
        self.observer.tell(f"{METHOD}, step {step + 1} of {len(levels) - 1}: {said}{self._advice(gates)}")
        return denoised

    def _advice(self, gates: list[list[float]]) -> str:
        """What to do where the threshold is not among the scores, and every phrase is treated alike."""
        opened = [(g - self.floor) / (1 - self.floor) for of_picture in gates for g in of_picture]
        if all(g > 0.95 for g in opened):
            return "; every gate is open and nothing changes: raise the threshold to lie among these scores"
        if all(g < 0.05 for g in opened):
            return "; every gate is shut: lower the threshold to lie among these scores"
        return ""

    @property
    def models(self) -> list[ModelPatcher]:
        """What should stay loaded beside the model."""
        return [*self.scorer.models, *([] if self.vae is None else [self.vae.patcher])]

    def _picture(self, denoised: Tensor, base: Any) -> Tensor:
        """The estimate as pictures ``[B, h, w, 3]`` in [0, 1]: decoded, or by the linear map that ComfyUI's previews use."""
        if self.vae is not None:
            return self.vae.decode(base.process_latent_out(denoised))
        factors, bias = preview(base.latent_format)
        flat = F.linear(denoised.float().movedim(1, -1), factors.to(denoised.device).T, bias.to(denoised.device))
        small = ((flat + 1) / 2).clamp(0, 1)
        return small.repeat_interleave(PREVIEW, dim=1).repeat_interleave(PREVIEW, dim=2)

    def edit(self, call: AttentionCall, weights: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """An ``edit`` request, from the evaluation after a score on."""
        state: _State | None = None if call.run is None else call.run.state.get(self.key)
        if state is None or state.gain is None:
            return None
        gain = state.gain

        def change(part: Tensor) -> tuple[Tensor, Tensor | None]:
            if len(part) % len(gain):
                raise RuntimeError(f"{METHOD}: the sampler changed how many pictures it makes at once; take the node out.")
            return maths.scaled(part, gain.to(part, non_blocking=part.is_cuda).repeat(len(part) // len(gain), 1))

        return edit_own(call, weights, change)


def preview(latent_format: Any) -> tuple[Tensor, Tensor]:
    """ComfyUI's linear map from a latent to colours: factors ``[channels, 3]`` and bias ``[3]``.

    Raises:
        ValueError: for latents that have none.
    """
    factors = getattr(latent_format, "latent_rgb_factors", None)
    if (
        factors is None
        or getattr(latent_format, "latent_rgb_factors_reshape", None) is not None
        or latent_format.latent_dimensions != 2
    ):
        raise ValueError(f"{METHOD}: there is no quick preview for this model's latents; connect the VAE.")
    bias = getattr(latent_format, "latent_rgb_factors_bias", None)
    return torch.tensor(factors), torch.zeros(3) if bias is None else torch.tensor(bias)


def apply(
    model: ModelPatcher,
    words: Words,
    scorer: Scorer,
    vae: Any = None,
    threshold: float = DEFAULTS.threshold,
    softness: float = DEFAULTS.softness,
    every: int = DEFAULTS.every,
    start_percent: float = DEFAULTS.start_percent,
    end_percent: float = DEFAULTS.end_percent,
    floor: float = DEFAULTS.floor,
    mode: str = DEFAULTS.mode,
    heads: Heads | None = None,
    observer: Observer = NOBODY,
) -> ModelPatcher:
    """A clone of ``model`` whose attention to phrases follows how well they are seen; with ``floor`` 1, just a clone.

    Each picture of a batch has its own gates. They hold from the evaluation after a score until the next score, inside the span.

    Args:
        vae: decodes the estimate; None takes ComfyUI's latent preview, which is coarse but costs nothing.
        every: steps from one score to the next.
        heads: a selection to work on; None is every head of every layer that attends to text.
        observer: is told the scores.

    Raises:
        ValueError: for no words, settings out of range, a VAE of another model, no preview where there is no VAE, or a model without
            attention to text.
    """
    span = Span.checked(METHOD, start_percent, end_percent)
    if mode not in MODES:
        raise ValueError(f"{METHOD}: mode must be one of {', '.join(MODES)}, not “{mode}”.")
    if not 0 <= floor <= 1 or (mode == INVERT and floor == 0):
        raise ValueError(
            f"{METHOD}: floor must be from 0 to 1, and above 0 to invert (0.3 boosts up to 3.3 times); it is {floor:g}."
        )
    if every < 1 or softness < 0:
        raise ValueError(f"{METHOD}: every must be at least 1 and softness at least 0; they are {every} and {softness:g}.")
    if not words.phrases:
        raise ValueError(f"{METHOD}: there are no words to score; name at least one in Prompt Words.")
    latent_format = model.get_model_object("latent_format")
    if vae is None:
        preview(latent_format)
    elif getattr(vae, "latent_channels", latent_format.latent_channels) != latent_format.latent_channels:
        raise ValueError(
            f"{METHOD}: this VAE has latents of {vae.latent_channels} channels, the model's have {latent_format.latent_channels}; connect the "
            "VAE that belongs to the model."
        )
    where = text_places(model, METHOD, heads)
    patched = model.clone()
    if floor == 1:
        observer.effect("floor is 1, which is off")
        return patched
    columns = tuple(sorted({c for phrase in words.phrases for c in phrase.columns}))
    members = tuple(tuple(columns.index(c) for c in phrase.columns) for phrase in words.phrases)
    texts = tuple(phrase.text for phrase in words.phrases)
    effect = Effect(span, observer.effect)
    method = _SemanticGate(
        texts, members, len(columns), scorer, vae, threshold, softness, floor, every, span, mode, observer, effect
    )
    asking = EditWeights(where, method.edit, rows=COND, span=span, columns=columns, prompt_columns=words.total, effect=effect)
    request(patched, asking)
    watch(patched, effect)
    guard(patched, METHOD, words, observer)
    patched.set_model_sampler_post_cfg_function(method.look)
    patched.set_additional_models(f"attune_gate_{id(method)}", method.models)
    return patched
