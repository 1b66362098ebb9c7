"""Attention maps to look at and to use: capture, show, segment."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches.maps import pictures, record, recorder
from ..server.graph import made_by
from ..server.previews import Preview
from ..server.widgets import maps_told
from .base import AttuneNode, in_menu, on_itself
from .inputs import selected
from .words import AttuneWordsType

DEFAULTS = record.Settings()

AttuneMapsType = io.Custom("ATTUNE_MAPS")


class AttuneAttentionMaps(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneAttentionMaps",
            display_name="Capture Attention Maps",
            **in_menu("Maps", "heat map", "DAAM", "attention map", "visualize", "capture"),
            description="Keeps what the model attends to while it samples, and nothing else: the picture stays the same to the last bit. "
            "Look at it with Show Attention Maps, or cut it into masks with Attention Segmentation.",
            inputs=[
                io.Model.Input("model", tooltip="The model to listen to; connect the output to the sampler."),
                io.String.Input(
                    "layers",
                    default="auto",
                    tooltip="auto: the layers that show objects best (a quarter and an eighth of the latent's size; in SD3, FLUX and "
                    "later models three "
                    "layers around the middle). Or a site selection as in Select Heads: “output.*.*”, “joint.8-12”, “L8 L9”.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(record.KINDS),
                    default=DEFAULTS.kind,
                    tooltip="cross: which pixels look at which word. self: which pixels look at each other. Segmentation is sharper with both.",
                ),
                io.Combo.Input(
                    "steps",
                    options=list(record.STEPS),
                    default=DEFAULTS.steps,
                    tooltip="mean: the average of all steps, in the room of one. last: the last step only. The others keep single steps.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(record.PRECISIONS),
                    default=DEFAULTS.precision,
                    tooltip="How finely the maps are stored; fp16 takes half the room and looks the same.",
                ),
                io.Combo.Input(
                    "keep_on",
                    options=list(record.DEVICES),
                    default=DEFAULTS.keep_on,
                    tooltip="device: stay where the model runs (fast). cpu: move to main memory at once (saves VRAM, a little slower).",
                ),
                io.Int.Input(
                    "limit_mb",
                    default=int(DEFAULTS.limit_mb),
                    min=1,
                    max=65536,
                    tooltip="Sampling stops with an error at its very first step if the maps would take more room than this.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Connect it to the sampler."),
                AttuneMapsType.Output(display_name="maps", tooltip="The maps, filled when the sampler runs."),
            ],
            **on_itself(),
        )

    @classmethod
    def execute(cls, model, layers, kind, steps, precision, keep_on, limit_mb) -> io.NodeOutput:
        settings = record.Settings(kind=kind, steps=steps, precision=precision, keep_on=keep_on, limit_mb=limit_mb)
        return io.NodeOutput(*recorder.apply(model, settings, selected(model, layers), Preview(cls.hidden.unique_id)))


class AttuneShowMaps(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneShowMaps",
            display_name="Show Attention Maps",
            **in_menu("Maps", "heat map", "DAAM", "attention map", "compare", "explain"),
            description="Paints where the model saw each word, as heat over the picture, and gives the same as soft masks.",
            inputs=[
                AttuneMapsType.Input("maps", tooltip="From Capture Attention Maps or Semantic-aware CFG."),
                AttuneWordsType.Input(
                    "words", tooltip="Which words to show: from Prompt Words, with the prompt that is sampled."
                ),
                io.Image.Input("image", tooltip="The picture that the sampler made with these maps, from VAE Decode."),
                io.Combo.Input(
                    "view",
                    options=list(pictures.VIEWS),
                    default="mean",
                    tooltip="mean: one picture per word. The others add one row per layer, per head or per kept step.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="A labelled grid of heat maps, one grid per picture."),
                io.Mask.Output(
                    display_name="masks",
                    tooltip="Soft masks at the picture's size, 0 to 1: the first word's for every picture, then the second word's, …",
                ),
            ],
            **on_itself(io.Hidden.prompt),
        )

    @classmethod
    def execute(cls, maps, words, image, view) -> io.NodeOutput:
        kept = maps.record(made_by(cls.hidden.prompt, cls.hidden.unique_id))
        shown = pictures.show(kept, words, image, view)
        return io.NodeOutput(*shown, ui=maps_told(pictures.explained(kept, words, image)))


class AttuneSegmentation(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneSegmentation",
            display_name="Attention Segmentation",
            **in_menu("Maps", "mask from word", "segment", "auto mask", "inpaint"),
            description="Cuts the picture into the regions of its words, from the model's own attention: masks for inpainting, noise "
            "masks and compositing, without another model.",
            inputs=[
                AttuneMapsType.Input(
                    "maps", tooltip="From Capture Attention Maps (kind both is sharpest) or Semantic-aware CFG."
                ),
                io.Image.Input("image", tooltip="The picture that the sampler made with these maps, from VAE Decode."),
                AttuneWordsType.Input(
                    "words",
                    optional=True,
                    tooltip="Which words compete for pixels, from Prompt Words; whole phrases (“red star”) work best. Left open: only "
                    "foreground and background.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The regions in colour over the picture, with a legend."),
                io.Mask.Output(
                    display_name="masks",
                    tooltip="Hard masks at the picture's size: the first word's for every picture, then the second word's, …",
                ),
                io.Mask.Output(display_name="foreground", tooltip="Everything that is not background, one mask per picture."),
            ],
            **on_itself(io.Hidden.prompt),
        )

    @classmethod
    def execute(cls, maps, image, words=None) -> io.NodeOutput:
        kept = maps.record(made_by(cls.hidden.prompt, cls.hidden.unique_id))
        return io.NodeOutput(*pictures.segmentation(kept, words, image))
