"""Fix My Prompt: the way in."""

from __future__ import annotations

from comfy_api.latest import io

from ..language.words import encode_prompt, prompt_words
from ..patches import fix
from ..server.previews import Preview, remember
from .base import AttuneNode, in_menu, on_itself
from .inputs import steered_model


class AttuneFix(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneFix",
            display_name="Fix My Prompt",
            **in_menu(
                "Start", "start here", "help", "colours mixed up", "missing object", "weights", "blurry", "heat map", "PAG"
            ),
            description="Start here: say what is wrong with your pictures, and this node sets what Attune has for it. It encodes the prompt "
            "itself: connect model and conditioning to the KSampler, and compare with strength off at the same seed.",
            inputs=[
                steered_model(),
                io.Clip.Input("clip", tooltip="The CLIP that you would give to CLIP Text Encode."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The positive prompt. It is encoded here, so that no CLIP Text Encode is needed for it.",
                ),
                io.Combo.Input(
                    "problem",
                    options=list(fix.PROBLEMS),
                    default=fix.MIXED,
                    tooltip="What you see in your pictures. something is missing: of two or three things one is not drawn. one thing too weak "
                    "or strong: write (red car:1.4) into the text. see what it looks at: shows here where the model sees each noun.",
                ),
                io.Combo.Input(
                    "strength",
                    options=list(fix.STRENGTHS),
                    default=fix.NORMAL,
                    tooltip="off is the plain model, to compare with at the same seed. Go to strong only while pictures stay natural.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Connect it to the KSampler."),
                io.Conditioning.Output(display_name="positive", tooltip="The encoded prompt: connect it to the KSampler."),
                io.String.Output(
                    display_name="what it set",
                    tooltip="What was set, what is known of it on this model, and how to do the same with single nodes.",
                ),
            ],
            **on_itself(),
        )

    @classmethod
    def execute(cls, model, clip, text, problem, strength) -> io.NodeOutput:
        nouns = "" if problem in fix.NOUNS and strength != fix.OFF else None
        words, conditioning = encode_prompt(clip, prompt_words(clip, text, nouns))
        if nouns is not None:
            remember(words)
        observer = Preview(cls.hidden.unique_id)
        patched, said = fix.apply(model, words, problem, strength, observer)
        observer.tell(said)
        return io.NodeOutput(patched, conditioning, said)
