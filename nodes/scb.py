"""SCB Prompts: the prompts of the style composition benchmark."""

from __future__ import annotations

from comfy_api.latest import io

from ..language.scb import SIZE, style_prompt
from .base import AttuneNode, in_menu


class AttuneSCBPrompts(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneSCBPrompts",
            display_name="SCB Prompts",
            **in_menu("Benchmark", "style composition", "SCB", "Detail++"),
            description="A prompt of the style composition benchmark of the Detail++ paper: a subject in one style before a "
            "background in another.",
            inputs=[
                io.Int.Input(
                    "index", default=0, min=0, max=SIZE - 1, tooltip=f"Which of the {SIZE} prompts; none comes twice."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="Which draw of the benchmark. Keep it the same for all prompts and all methods that you compare.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="“a sketch style robot in an oil-painting style forest”"),
                io.String.Output(display_name="subject", tooltip="The subject with its style: “a sketch style robot”."),
                io.String.Output(
                    display_name="background", tooltip="The background with its style: “an oil-painting style forest”."
                ),
            ],
        )

    @classmethod
    def execute(cls, index=0, seed=0) -> io.NodeOutput:
        found = style_prompt(index, seed)
        return io.NodeOutput(found.prompt, found.subject, found.background)
