"""Encode Branches and the Detail++ Sampler: details put where they belong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io

from ..language.decompose import Branch, Branches
from ..language.words import prompt_words
from ..patches.detail import sampler as detail
from .base import AttuneNode
from .decompose import AttuneBranchesType


def _occurrences(clip: Any, text: str, phrase: str) -> list[tuple[int, ...]]:
    """Columns of every occurrence of a phrase in a prompt; none where it is not in it."""
    try:
        words = prompt_words(clip, text, phrase)
    except ValueError:
        return []
    found = words.phrases[0]
    size = len(found.text.split(" "))
    members = [w.columns for w in words.words if w.columns and set(w.columns) <= set(found.columns)]
    return [tuple(sorted(set().union(*members[i : i + size]))) for i in range(0, len(members), size)]


def _places(
    clip: Any, branches: Sequence[Branch], index: int, released: bool
) -> tuple[list[detail.Place], list[tuple[int, ...]]]:
    """Where the subjects of a branch are read, and their columns in the base.

    That is the base, whose layout everyone shares; ``released``: the branch before, as in the released code. Where that prompt does not
    have the subject (or not as many of these words), it is the branch's own.

    Raises:
        ValueError: for a subject that is not in its branch.
    """
    places, layout = [], []
    for subject in branches[index].subjects:
        own = _occurrences(clip, branches[index].text, subject.text)
        if subject.occurrence >= len(own):
            raise ValueError(
                f"Encode Branches: “{subject.text}” is not in the branch “{branches[index].text}”; write it as it stands there."
            )
        base = _occurrences(clip, branches[0].text, subject.text)
        in_base = base[subject.base] if subject.base is not None and subject.base < len(base) else None
        before = _occurrences(clip, branches[index - 1].text, subject.text)
        if in_base is not None and (index == 1 or not released):
            places.append(detail.Place(0, in_base))
        elif index > 1 and released and len(before) == len(own):
            places.append(detail.Place(index - 1, before[subject.occurrence]))
        else:
            places.append(detail.Place(index, own[subject.occurrence]))
        if in_base is not None:
            layout.append(in_base)
    return places, layout


def encode(clip: Any, branches: Branches, released: bool = False) -> list[Any]:
    """One conditioning per branch that knows its place (several with a schedule of hooks).

    Args:
        released: subjects are looked for where the released code does, in the branch before.

    Raises:
        ValueError: for no CLIP, a CLIP of another family, or a subject that is not in its branch.
    """
    if clip is None:
        raise ValueError("Encode Branches: there is no text encoder: this checkpoint has none, so load a CLIP on its own.")
    out = []
    parts = list(branches.branches)
    for index, branch in enumerate(parts):
        places, layout = _places(clip, parts, index, released)
        for context, options in clip.encode_from_tokens_scheduled(clip.tokenize(branch.text)):
            name = ", ".join(subject.text for subject in branch.subjects)
            known = detail.Branch(index, len(parts), context.shape[1], tuple(places), tuple(layout), name)
            out.append([context, {**options, detail.BRANCH: known}])
    return out


class AttuneEncodeBranches(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneEncodeBranches",
            display_name="Encode Branches",
            category="Attune",
            description="Encodes every branch of a decomposed prompt, for the Detail++ Sampler. ControlNet, area and timestep nodes after it "
            "apply to all branches.",
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP that you would give to CLIP Text Encode, LoRAs included."),
                AttuneBranchesType.Input("branches", tooltip="From Decompose Prompt."),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive",
                    tooltip="One conditioning per branch, each with its subject's place. Connect it to the Detail++ Sampler, through "
                    "ControlNet nodes if you like; any other sampler would mix the branches.",
                )
            ],
        )

    @classmethod
    def execute(cls, clip, branches) -> io.NodeOutput:
        return io.NodeOutput(encode(clip, branches))


class AttuneDetailSampler(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneDetailSampler",
            display_name="Detail++ Sampler",
            category="Attune",
            description="A KSampler that draws all branches of a prompt at once on one layout, and puts each branch's details only where their "
            "subject is. For prompts whose colours, patterns or styles end up on the wrong thing. For SD1.5, SD2 and SDXL.",
            inputs=[
                io.Model.Input("model", tooltip="The model to sample. LoRAs, guidance and other patches on it stay."),
                io.Conditioning.Input(
                    "positive", tooltip="From Encode Branches, through ControlNet, area or timestep nodes if you like."
                ),
                io.Conditioning.Input("negative", tooltip="What no branch should have, as for a KSampler."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The picture to start from, empty or not; batches and noise masks work as in a KSampler.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise, the same for all branches. The same seed gives the same picture.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps."),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly every branch follows its prompt, as for a KSampler.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(comfy.samplers.KSampler.SAMPLERS),
                    tooltip="How noise is removed. Most work; lms, ipndm, deis, uni_pc, er_sde, sa_solver, dpm_fast, dpm_adaptive, "
                    "gradient_estimation and the cfg_pp ones do not, and the node then says which do.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(comfy.samplers.KSampler.SCHEDULERS),
                    tooltip="How fast noise is removed, as for a KSampler.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 keeps something of the latent image, as for a KSampler.",
                ),
                io.Float.Input(
                    "share_until",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="For this part of the steps, branches share the layout and are confined to their subjects; then each refines its "
                    "own. 0 makes independent pictures.",
                ),
                io.Int.Input(
                    "share_max_tokens",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip="Layers with up to this many image tokens share the layout. 0 is automatic: a quarter of the latent's width and "
                    "height, and coarser. 1 shares none.",
                ),
                io.Float.Input(
                    "mask_threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much attention, between the least and the most, makes a place the subject's. Lower values give larger masks.",
                ),
                io.Combo.Input(
                    "optimize",
                    options=list(detail.OPTIMIZE),
                    default=detail.OPTIMIZE[0],
                    tooltip="Moves the layout's noise in the first steps so that subjects become compact. Slower, and needs more memory. "
                    "entropy: less spread; centroid: one centre as well.",
                ),
                io.Int.Input(
                    "optimize_steps",
                    default=6,
                    min=1,
                    max=1000,
                    tooltip="How many of the first steps begin with an optimisation.",
                ),
                io.Float.Input(
                    "step_size",
                    default=detail.Settings.step_size,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="How far an optimisation goes; it falls to 0 over its steps. 1 moves the noise by about a tenth; 0 changes nothing.",
                ),
                io.Combo.Input(
                    "finish",
                    options=list(detail.FINISH),
                    default=detail.FINISH[0],
                    optional=True,
                    tooltip="Which prompt the result has after share_until. last branch: its own, as in the paper. whole prompt: the full one, "
                    "which knows every detail; better where late steps still change colours, as in small pictures.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="result", tooltip="The finished picture: the last branch, with all details."),
                io.Latent.Output(
                    display_name="branches",
                    tooltip="Every branch's picture, in order: the base with its batch, then the next one.",
                ),
                io.Mask.Output(
                    display_name="masks",
                    tooltip="Where each branch with a subject could paint in the last shared step, in order.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        denoise,
        share_until,
        share_max_tokens,
        mask_threshold,
        optimize,
        optimize_steps,
        step_size,
        finish=detail.FINISH[0],
    ) -> io.NodeOutput:
        settings = detail.Settings(
            share_until, share_max_tokens, mask_threshold, optimize, optimize_steps, step_size, finish=finish
        )
        samples, masks = detail.sample(
            model,
            positive,
            negative,
            latent_image,
            seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            denoise,
            settings,
            latent_preview.prepare_callback(model, steps),
            not comfy.utils.PROGRESS_BAR_ENABLED,
        )
        pictures = latent_image["samples"].shape[0]
        count = math.ceil(len(samples) / pictures)
        every = {**latent_image, "samples": samples}
        if "batch_index" in every:
            every["batch_index"] = list(every["batch_index"]) * count
        if "noise_mask" in every:
            mask = every["noise_mask"].reshape(-1, 1, *every["noise_mask"].shape[-2:])
            every["noise_mask"] = comfy.utils.repeat_to_batch_size(mask, pictures).repeat(count, 1, 1, 1)
        return io.NodeOutput({**latent_image, "samples": samples[-pictures:]}, every, masks)
