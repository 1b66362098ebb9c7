"""Phrase Fusion: the words of one phrase look at the same place."""

from __future__ import annotations

from comfy_api.latest import io

from ..language.phrases import fusable
from ..patches import fusion
from ..server.previews import Preview
from .base import AttuneNode, in_menu, on_itself
from .inputs import steered_model
from .words import AttuneWordsType


class AttunePhraseFusion(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttunePhraseFusion",
            display_name="Phrase Fusion",
            **in_menu("Words", "phrase", "binding", "colour", "color", "token merging"),
            description="Lets all words of a phrase (“fire truck”, “red car”) act in the same place of the picture: their attention is "
            "averaged, so that a colour stays with its thing.",
            inputs=[
                steered_model(),
                AttuneWordsType.Input(
                    "words",
                    tooltip="The phrases to fuse: from Prompt Words, with the text and the CLIP of the positive prompt. With its words "
                    "written out (“red car, fire truck”), those; with its words left empty, every noun of the prompt with the words before it "
                    "that describe it.",
                ),
                io.Float.Input(
                    "strength",
                    default=fusion.DEFAULTS.strength,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How far each word's attention moves to its phrase's mean: 1 is all the way and often too much, 0 is off.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The steered model: connect it to a KSampler.")],
            **on_itself(),
        )

    @classmethod
    def execute(cls, model, words, strength) -> io.NodeOutput:
        phrases = fusable(words)
        observer = Preview(cls.hidden.unique_id)
        if not phrases.phrases:
            observer.effect(fusion.SINGLE)
            return io.NodeOutput(model.clone())
        observer.tell(f"Phrase Fusion: {phrases.summary}")
        return io.NodeOutput(fusion.apply(model, phrases, strength, observer=observer))
