"""Refine Attention: each word's attention keeps its peaks, with soft edges."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches import refine
from ..server.previews import Preview
from .base import AttuneNode, in_menu, on_itself
from .inputs import percents, steered_model
from .words import AttuneWordsType

DEFAULTS = refine.DEFAULTS


class AttuneRefineMaps(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneRefineMaps",
            display_name="Refine Attention",
            **in_menu("Words", "sharpen attention", "threshold", "refine"),
            description="Sharpens where words act: in a few rounds each word's attention is cut to where it is strongest, and smoothed. Weak "
            "attention all over the picture goes.",
            inputs=[
                steered_model(),
                AttuneWordsType.Input(
                    "words",
                    optional=True,
                    tooltip="The words to refine: from Prompt Words, with the text and the CLIP of the positive prompt. Left open: every token "
                    "of every positive prompt but the start token (SD1.5, SD2 and SDXL; models with one attention for text and "
                    "image need words).",
                ),
                io.Int.Input(
                    "rounds",
                    default=DEFAULTS.rounds,
                    min=0,
                    max=10,
                    tooltip="How often to cut and smooth. 0 is off; one is gentle.",
                ),
                io.Float.Input(
                    "keep",
                    default=DEFAULTS.keep,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Attention under this share of the word's strongest is cut. Higher keeps less; 0 cuts nothing.",
                ),
                io.Float.Input(
                    "sigma",
                    default=DEFAULTS.sigma,
                    min=0.0,
                    max=8.0,
                    step=0.05,
                    tooltip="How far what is left is smoothed, in cells of the layer's own grid. 0 is hard edges.",
                ),
                *percents(
                    DEFAULTS,
                    "Where in sampling to begin: 0 is the first step, where things find their places.",
                    "Where in sampling to stop. Lower it if fine detail gets lost.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The steered model: connect it to a KSampler.")],
            **on_itself(),
        )

    @classmethod
    def execute(cls, model, rounds, keep, sigma, start_percent, end_percent, words=None) -> io.NodeOutput:
        observer = Preview(cls.hidden.unique_id)
        return io.NodeOutput(refine.apply(model, words, rounds, keep, sigma, start_percent, end_percent, observer=observer))
