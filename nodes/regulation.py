"""Attention Regulation: no word left behind."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches import regulation
from ..server.previews import Preview
from .base import AttuneNode, in_menu, on_itself
from .inputs import advanced_choice, percents, selected, steered_model
from .words import AttuneWordsType

DEFAULTS = regulation.Settings()


class AttuneRegulation(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneRegulation",
            display_name="Attention Regulation",
            **in_menu(
                "Words",
                "missing object",
                "catastrophic neglect",
                "attend and excite",
                "attention regulation",
                "something is missing",
            ),
            description="For prompts of which a thing goes missing: while the picture takes shape, the model's attention to the chosen words is "
            "raised to where an object can form, and changed as little as that needs. The same seed gives the same picture.",
            inputs=[
                steered_model(),
                AttuneWordsType.Input(
                    "words",
                    tooltip="The words that must not go missing: from Prompt Words, with the text and the CLIP of the positive prompt. Two to "
                    "four things work best; colours and other adjectives need not be named.",
                ),
                io.Float.Input(
                    "strength",
                    default=DEFAULTS.strength,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the edit is used: 1 is the paper's, lower keeps the picture closer to the plain one, 0 is off.",
                ),
                io.String.Input(
                    "layers",
                    default="auto",
                    tooltip="auto: the last down-sampling and the first up-sampling block with attention, as in the paper (SD3, FLUX and "
                    "later: three "
                    "layers around the middle). Or a selection as in Select Heads: “output.3-5.*”, “joint.8-12”, “L8 L9H0-3”. Fewer are faster.",
                ),
                io.Int.Input(
                    "iterations",
                    default=DEFAULTS.iterations,
                    min=1,
                    max=200,
                    tooltip="How long to look for the best edit in the first step, in the paper's iterations. The steps that follow go on from "
                    "it, with a twentieth of them.",
                ),
                io.Float.Input(
                    "mass_weight",
                    default=DEFAULTS.mass_weight,
                    min=0.0,
                    max=1000.0,
                    step=1.0,
                    tooltip="How much it matters that every word gets its share of the picture (a fifth, or less with more than five tokens).",
                ),
                io.Float.Input(
                    "deviation_weight",
                    default=DEFAULTS.deviation_weight,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much it matters to change little (β in the paper, here for each pixel, so that it means the same at every "
                    "size). Higher is closer to the plain picture.",
                ),
                io.Float.Input(
                    "ema",
                    default=DEFAULTS.ema,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="How much of the last steps' edits stays in the next one's (κ in the paper): higher is steadier.",
                ),
                io.Float.Input(
                    "decay",
                    default=DEFAULTS.decay,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The edit fades by this factor from step to step (λ in the paper). 1 does not fade.",
                ),
                *percents(
                    DEFAULTS,
                    "Where in sampling to begin: 0 is the first step, where things find their places.",
                    "Where in sampling to stop. Later steps draw fine detail, which an edit would spoil.",
                ),
                advanced_choice(
                    "form",
                    regulation.FORMS,
                    DEFAULTS.form,
                    "paper: the paper's objective, found in few passes. released: what the authors' code does instead, a penalty on the "
                    "edit itself (set deviation_weight to its 0.09) and plain gradient descent from a random start in every step; it is "
                    "several times slower.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The regulated model: connect it to a KSampler.")],
            **on_itself(),
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
        form=DEFAULTS.form,
    ) -> io.NodeOutput:
        settings = regulation.Settings(
            strength=strength,
            iterations=iterations,
            mass_weight=mass_weight,
            deviation_weight=deviation_weight,
            ema=ema,
            decay=decay,
            start_percent=start_percent,
            end_percent=end_percent,
            form=form,
        )
        observer = Preview(cls.hidden.unique_id)
        return io.NodeOutput(regulation.apply(model, words, settings, selected(model, layers), observer))
