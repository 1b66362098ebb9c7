"""Prompt Words: which tokens of a prompt belong to which words."""

from __future__ import annotations

from comfy_api.latest import io

from ..language.words import encode_prompt, prompt_words
from ..server.previews import remember
from ..server.widgets import words_told
from .base import AttuneNode, in_menu

AttuneWordsType = io.Custom("ATTUNE_WORDS")


class AttuneWords(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneWords",
            display_name="Prompt Words",
            **in_menu("Words", "prompt words", "CLIP text encode", "tokens", "phrases"),
            description="Choose words of a prompt, for Attune nodes that look at or change what single words do to the picture. "
            "For the text encoders of all models, chat templates included.",
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The CLIP that you would give to CLIP Text Encode, LoRAs included: it decides how the prompt is cut.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt, as for CLIP Text Encode, with (weights:1.2), \\( escapes \\) and embedding:names. Take its "
                    "conditioning from here, and it is written only once.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words or phrases of the prompt, separated by commas: “cat, red car”. Each is found everywhere it "
                    "occurs; capitals and weights do not matter. Left empty: every noun of the prompt (in English).",
                ),
            ],
            outputs=[
                AttuneWordsType.Output(display_name="words", tooltip="The chosen words and where they are in the prompt."),
                io.String.Output(display_name="summary", tooltip="What was found: each word and its token columns."),
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="The prompt encoded, as CLIP Text Encode does it: connect it as positive, and words and prompt are the same.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, text, words="") -> io.NodeOutput:
        found, conditioning = encode_prompt(clip, prompt_words(clip, text, words))
        remember(found)
        return io.NodeOutput(found, found.summary, conditioning, ui=words_told(found))
