"""Attention Regulation: no word left behind."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches import regulation
from ..patches.hook.install import model_sites
from ..patches.hook.sites import select
from ..server.previews import Preview
from .base import AttuneNode
from .words import AttuneWordsType


class AttuneRegulation(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneRegulation",
            display_name="Attention Regulation",
            category="Attune",
            description="For prompts of which a thing goes missing: while the picture takes shape, the model's attention to the chosen words is "
            "raised to where an object can form, and changed as little as that needs. The same seed gives the same picture.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to steer. LoRAs, ControlNets and guidance on it stay; connect the output to the sampler.",
                ),
                AttuneWordsType.Input(
                    "words",
                    tooltip="The words that must not go missing: from Prompt Words, with the text and the CLIP of the positive prompt. Two to "
                    "four things work best; colours and other adjectives need not be named.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the edit is used: 1 is the paper's, lower keeps the picture closer to the plain one, 0 is off.",
                ),
                io.String.Input(
                    "layers",
                    default="auto",
                    tooltip="auto: the last down-sampling and the first up-sampling block with attention, as in the paper (SD3 and FLUX: three "
                    "layers around the middle). Or a selection as in Select Heads: “output.3-5.*”, “joint.8-12”, “L8 L9H0-3”. Fewer are faster.",
                ),
                io.Int.Input(
                    "iterations",
                    default=20,
                    min=1,
                    max=200,
                    tooltip="How long to look for the best edit, in the paper's iterations; our solver needs half as many passes. 10 is faster.",
                ),
                io.Float.Input(
                    "mass_weight",
                    default=80.0,
                    min=0.0,
                    max=1000.0,
                    step=1.0,
                    tooltip="How much it matters that every word gets its share of the picture (a fifth, or less with more than five tokens).",
                ),
                io.Float.Input(
                    "deviation_weight",
                    default=0.1,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much it matters to change little (β in the paper). Higher is closer to the plain picture; on large pictures it "
                    "weighs more.",
                ),
                io.Float.Input(
                    "ema",
                    default=0.25,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="How much of the last steps' edits stays in the next one's (κ in the paper): higher is steadier.",
                ),
                io.Float.Input(
                    "decay",
                    default=0.99,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The edit fades by this factor from step to step (λ in the paper). 1 does not fade.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling to begin: 0 is the first step, where things find their places.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling to stop. Later steps draw fine detail, which an edit would spoil.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The regulated model: connect it to a KSampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        words,
        strength,
        layers,
        iterations,
        mass_weight,
        deviation_weight,
        ema,
        decay,
        start_percent,
        end_percent,
    ) -> io.NodeOutput:
        heads = None
        if layers.strip() not in ("", "auto"):
            family, sites = model_sites(model)
            heads = select(layers, sites, family)
        return io.NodeOutput(
            regulation.apply(
                model,
                words,
                strength,
                heads,
                iterations,
                mass_weight,
                deviation_weight,
                ema,
                decay,
                start_percent,
                end_percent,
                observer=Preview(getattr(cls.hidden, "unique_id", None)),  # none from Python
            )
        )
