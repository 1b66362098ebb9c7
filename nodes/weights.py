"""Word Weights: phrases that weigh more, less, nothing, or only in one part of the picture."""

from __future__ import annotations

from comfy_api.latest import io

from ..language.weights import HIGH, LOW, Weighted, weighted
from ..language.words import encode_prompt, prompt_words
from ..patches import weights as method
from ..server.previews import Preview
from .base import AttuneNode, in_menu, on_itself
from .inputs import advanced, advanced_choice, percents, steered_model
from .words import AttuneWordsType

DEFAULTS = method.DEFAULTS


class AttuneWordWeights(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneWordWeights",
            display_name="Word Weights",
            **in_menu(
                "Words",
                "prompt weights",
                "emphasis",
                "weights",
                "(word:1.3)",
                "negative word",
                "regional",
                "regional prompt",
                "mask",
            ),
            description="Makes phrases of the prompt count more, less, not at all, or only in one part of the picture, by the model's own "
            "attention to them: at any cfg, and also where (red car:1.3) in a prompt does nothing. Weights that a CLIP uses stay its own.",
            inputs=[
                steered_model(),
                AttuneWordsType.Input(
                    "words",
                    optional=True,
                    tooltip="The prompt and its words: from Prompt Words, whose conditioning goes to the sampler. Or leave it open and connect "
                    "clip, with the prompt in text.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="In place of words: the CLIP that encodes the positive prompt.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    dynamic_prompts=True,
                    tooltip="With clip: the positive prompt, the same as in CLIP Text Encode. Its (weights:1.3) are used here "
                    "where the text encoder takes them for text (Z-Image, Qwen-Image, FLUX.2), and not a second time where it uses them (SD1.5, "
                    "SDXL, SD3, FLUX.1).",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    multiline=True,
                    tooltip=f"One a line: “red car: 1.4”. From {LOW:g} to {HIGH:g}: 1 is as it is, 0 is as if the words were not there, "
                    "below 0 the picture is pushed away from them. Each phrase counts everywhere it stands in the prompt. Left empty with a "
                    "mask: all phrases of Prompt Words, with weight 1.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the weights hold; elsewhere the phrases weigh “outside”. One mask for all, or a batch with one for each "
                    "phrase, in their order. Soft edges and any size will do. To put a thing in its place, let it weigh 5, and -2 outside.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(method.MODES),
                    default=DEFAULTS.mode,
                    tooltip="attention: words compete, so that what one gains all others lose. value: only what the phrase itself adds is "
                    "multiplied.",
                ),
                *percents(
                    DEFAULTS,
                    "Where in sampling to begin: 0 is the first step, where things find their places.",
                    "Where in sampling to stop. Lower it if strong weights spoil fine detail.",
                ),
                advanced(
                    io.Float.Input(
                        "outside",
                        default=DEFAULTS.outside,
                        min=LOW,
                        max=HIGH,
                        step=0.05,
                        optional=True,
                        tooltip="What the phrases weigh where their mask is black. 0 keeps them out, -1 more strongly; 0.3 is "
                        "gentler. Without a mask it does nothing.",
                    )
                ),
                advanced_choice(
                    "tokens",
                    method.LOOKING,
                    DEFAULTS.tokens,
                    "Who looks at the phrases with these weights. image: the picture's tokens. image and text: the other words too, on models "
                    "where text and picture attend together (SD3, FLUX and later ones), so that the phrase also says more or less to them.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The steered model: connect it to a KSampler."),
                io.String.Output(display_name="summary", tooltip="What weighs how much, and its token columns."),
            ],
            **on_itself(),
        )

    @classmethod
    def execute(
        cls,
        model,
        weights,
        mode,
        start_percent,
        end_percent,
        words=None,
        clip=None,
        text="",
        mask=None,
        outside=DEFAULTS.outside,
        tokens=DEFAULTS.tokens,
    ) -> io.NodeOutput:
        settings = method.Settings(mode, start_percent, end_percent, outside, tokens)
        if words is not None and clip is not None:
            raise ValueError(
                "Word Weights: words and clip are both connected, which may be of two prompts; disconnect clip, or words and use text."
            )
        if words is None and clip is None:
            raise ValueError(
                "Word Weights: there is no prompt; connect words from Prompt Words, or connect clip and write the prompt into text."
            )
        found = encode_prompt(clip, prompt_words(clip, text, None))[0] if words is None else words
        chosen = weighted(found, weights)
        if not chosen and mask is not None:
            chosen = tuple(Weighted(phrase, 1.0) for phrase in found.phrases)
            if not chosen:
                raise ValueError(
                    "Word Weights: there is a mask, but no phrase for it; write one into weights, as “red car: 1”."
                )
        observer = Preview(cls.hidden.unique_id)
        patched = method.apply(model, found, chosen, mask, settings, observer=observer)
        said = method.summary(found, chosen, mask, settings)
        observer.tell(f"Word Weights: {said}")
        return io.NodeOutput(patched, said)
