"""Semantic Gate: words speak as loudly as the picture shows what they say."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches import gate
from ..server.previews import Preview
from .base import AttuneNode, in_menu, on_itself
from .inputs import percents, steered_model
from .scorers import AttuneScorerType
from .words import AttuneWordsType

DEFAULTS = gate.DEFAULTS


class AttuneSemanticGate(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneSemanticGate",
            display_name="Semantic Gate",
            **in_menu("Words", "gate", "damp words", "CLIP score", "concept strength"),
            description="Looks at the picture while it forms, scores how well it shows each phrase, and turns down the words that it does not "
            "show, or turns up those that it neglects.",
            inputs=[
                steered_model(),
                AttuneWordsType.Input(
                    "words",
                    tooltip="The phrases to score: from Prompt Words, with the text and the CLIP of the positive prompt. Each is scored as "
                    "written there (“a red car”).",
                ),
                AttuneScorerType.Input("scorer", tooltip="Says how well a picture shows a text: from a scorer node."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the picture as far as it has come. Open: ComfyUI's quick preview, coarse but free.",
                ),
                io.Float.Input(
                    "threshold",
                    default=DEFAULTS.threshold,
                    min=-1000.0,
                    max=1000.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="The score at which a phrase's gate is half open. Scorers differ: CLIP gives about 0.15 to 0.3, "
                    "SigLIP less, PickScore 18 to 24. The node shows the scores while it runs; put the threshold among them.",
                ),
                io.Float.Input(
                    "softness",
                    default=DEFAULTS.softness,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="How gradually the gate opens around the threshold, in the scorer's units. 0 is all or nothing.",
                ),
                io.Int.Input(
                    "every",
                    default=DEFAULTS.every,
                    min=1,
                    max=10000,
                    tooltip="Steps from one look to the next. Each costs a decode and a score.",
                ),
                *percents(
                    DEFAULTS,
                    "From here on, as a part of sampling: before, the picture shows nothing yet.",
                    "Until here, as a part of sampling.",
                ),
                io.Float.Input(
                    "floor",
                    default=DEFAULTS.floor,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="What is left of the attention to a phrase that is not seen at all. 1 is off, 0 silences it. With invert, its "
                    "attention grows up to 1 / floor times.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(gate.MODES),
                    default=DEFAULTS.mode,
                    optional=True,
                    tooltip="damp: words that the picture does not show are turned down and spoil nothing. invert: they are turned up, "
                    "so that what is neglected gets drawn.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The steered model: connect it to a KSampler.")],
            **on_itself(),
        )

    @classmethod
    def execute(
        cls,
        model,
        words,
        scorer,
        vae=None,
        threshold=DEFAULTS.threshold,
        softness=DEFAULTS.softness,
        every=DEFAULTS.every,
        start_percent=DEFAULTS.start_percent,
        end_percent=DEFAULTS.end_percent,
        floor=DEFAULTS.floor,
        mode=DEFAULTS.mode,
    ) -> io.NodeOutput:
        observer = Preview(cls.hidden.unique_id)
        return io.NodeOutput(
            gate.apply(
                model,
                words,
                scorer,
                vae,
                threshold,
                softness,
                every,
                start_percent,
                end_percent,
                floor,
                mode,
                observer=observer,
            )
        )
