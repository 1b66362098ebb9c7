"""Encode Branches and the Detail++ Sampler: details put where they belong."""

from __future__ import annotations

import math

import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io

from ..patches.detail.encode import encode
from ..patches.detail.sampler import sample
from ..patches.detail.session import FINISH, MASKS, OPTIMIZE, Settings
from ..server.previews import Preview
from .base import AttuneNode, in_menu
from .decompose import AttuneBranchesType


class AttuneEncodeBranches(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneEncodeBranches",
            display_name="Encode Branches",
            **in_menu("Words", "Detail++", "sub-prompts", "branches"),
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
            **in_menu(
                "Words", "Detail++", "binding", "colour", "color", "attribute leak", "colours mixed up", "regional", "KSampler"
            ),
            description="A KSampler that draws all branches of a prompt at once on one layout, and puts each branch's details only where their "
            "subject is. For prompts whose colours, patterns or styles end up on the wrong thing. For SD1.5, SD2, SDXL, Wan and Cosmos "
            "Predict 2.",
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
                    max=0xFFFFFFFFFFFFFFFE,  # ComfyUI's ddim also takes the next one, and PyTorch has no larger than that
                    control_after_generate=True,
                    tooltip="The noise, the same for all branches. The same seed gives the same picture.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
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
                    default=Settings.share_until,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="For this part of the steps, branches share the layout and are confined to their subjects; then each refines its "
                    "own. 0 makes independent pictures.",
                ),
                io.Int.Input(
                    "share_max_tokens",
                    default=Settings.share_max_tokens,
                    min=0,
                    max=65536,
                    tooltip="Layers with up to this many image tokens share the layout. 0 is automatic: a quarter of the latent's width and "
                    "height, and coarser. 1 shares none.",
                ),
                io.Float.Input(
                    "mask_threshold",
                    default=Settings.mask_threshold,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much attention, between the least and the most, makes a place the subject's. Lower values give larger masks.",
                ),
                io.Combo.Input(
                    "optimize",
                    options=list(OPTIMIZE),
                    default=Settings.optimize,
                    tooltip="Moves the layout's noise before the first steps so that subjects become compact; masks then come from the "
                    "base. entropy: less spread; centroid: one centre as well, the paper's full method. Each of these steps costs 1 to 6 "
                    "times a forward and a backward pass of one picture, and more memory. off is faster.",
                ),
                io.Int.Input(
                    "optimize_steps",
                    default=Settings.optimize_steps,
                    min=1,
                    max=1000,
                    tooltip="How many of the first steps begin with an optimisation.",
                ),
                io.Float.Input(
                    "step_size",
                    default=Settings.step_size,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="How far an update goes: 1 is the authors' length, scaled to the latent's size, and less from step to step. 0 is "
                    "off.",
                ),
                io.Combo.Input(
                    "finish",
                    options=list(FINISH),
                    default=Settings.finish,
                    optional=True,
                    tooltip="Which prompt the result has after share_until. last branch: its own, as in the paper. whole prompt: the full one, "
                    "which knows every detail; better where late steps still change colours, as in small pictures.",
                ),
                io.Combo.Input(
                    "masks",
                    options=list(MASKS),
                    default=Settings.masks,
                    optional=True,
                    tooltip="published: every place where a subject has enough attention, as in the paper; masks may overlap. exclusive: a "
                    "place is the one subject's that stands out most there, after Semantic-aware CFG's maps; try a lower mask_threshold.",
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
        finish=Settings.finish,
        masks=Settings.masks,
    ) -> io.NodeOutput:
        settings = Settings(
            share_until=share_until,
            share_max_tokens=share_max_tokens,
            mask_threshold=mask_threshold,
            optimize=optimize,
            optimize_steps=optimize_steps,
            step_size=step_size,
            finish=finish,
            masks=masks,
        )
        samples, regions = sample(
            model,
            positive,
            negative,
            latent_image,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler_name,
            scheduler=scheduler,
            denoise=denoise,
            settings=settings,
            callback=latent_preview.prepare_callback(model, steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            observer=Preview(None),
        )
        pictures = latent_image["samples"].shape[0]
        count = math.ceil(len(samples) / pictures)
        every = {**latent_image, "samples": samples}
        if "batch_index" in every:
            every["batch_index"] = list(every["batch_index"]) * count
        if "noise_mask" in every:
            mask = every["noise_mask"].reshape(-1, 1, *every["noise_mask"].shape[-2:])
            every["noise_mask"] = comfy.utils.repeat_to_batch_size(mask, pictures).repeat(count, 1, 1, 1)
        return io.NodeOutput({**latent_image, "samples": samples[-pictures:]}, every, regions)
