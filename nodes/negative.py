"""Negative Prompt at cfg 1: what a picture should not show, where CFG is off."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches import negative as method
from ..patches.negative import Settings
from ..patches.softpag import AUTOMATIC
from ..server.previews import Preview
from .base import AttuneNode, in_menu, on_itself
from .inputs import automatic, percents, steered_model


class AttuneNegative(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneNegative",
            display_name="Negative Prompt at cfg 1",
            **in_menu("Guidance", "NAG", "normalized attention guidance", "negative", "negative prompt", "cfg 1"),
            description="A negative prompt that works without CFG, as fast models need it (normalised attention guidance): wherever the picture "
            "looks at the prompt, what it finds moves away from what it would find with the negative. With CFG it adds to CFG's own negative.",
            inputs=[
                steered_model(),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What the picture should not show, from CLIP Text Encode: write the things themselves (“glasses”), not “no …”. "
                    "It may be of any length. The sampler's own negative is another one, and does nothing at cfg 1.",
                ),
                automatic(
                    "scale",
                    Settings.scale,
                    tooltip="How far to move away from the negative. 1 is off, more is stronger; change this one first. -1 is the model's own: "
                    "5, and 11 for Wan. Models of few steps may need less.",
                ),
                automatic(
                    "tau",
                    Settings.tau,
                    tooltip="How many times as large the picture's attention may become. Less is safer; 1 lets it only change direction. -1 is "
                    "the model's own: 2.5, and 3.5 for Wan.",
                ),
                io.Float.Input(
                    "alpha",
                    default=Settings.alpha,
                    min=AUTOMATIC,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the change is taken. 0 is off; more is stronger, and costs detail. -1 is the model's own: 0.5 for "
                    "SD1.5, SDXL and Wan, 0.25 for others.",
                ),
                *percents(
                    Settings,
                    "Where in sampling to begin: 0 is the first step.",
                    "Where in sampling to stop. What is in the picture is decided early, so 0.5 saves time and keeps most of the effect.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with the negative in it: connect it to a KSampler with cfg 1."
                )
            ],
            **on_itself(),
        )

    @classmethod
    def execute(cls, model, negative, scale, tau, alpha, start_percent, end_percent) -> io.NodeOutput:
        observer = Preview(cls.hidden.unique_id)
        return io.NodeOutput(method.apply(model, negative, scale, tau, alpha, start_percent, end_percent, observer))
