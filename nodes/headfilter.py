"""Head Filter: only the chosen heads speak."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches import headfilter
from ..server.previews import Preview
from .base import AttuneNode, in_menu, on_itself
from .heads import AttuneHeadsType


class AttuneHeadFilter(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneHeadFilter",
            display_name="Head Filter",
            **in_menu("Heads", "silence heads", "ablate", "mute"),
            description="Silences attention heads: in the layers that you name, only the chosen heads act, to find out what a head is for or to "
            "keep a bad one from the picture. Other layers stay as they are.",
            inputs=[
                io.Model.Input("model", tooltip="The model to filter. LoRAs, ControlNets and guidance on it stay."),
                AttuneHeadsType.Input(
                    "heads",
                    tooltip="The heads that go on speaking, from Select Heads. Layers of which it names no head, or all of them, stay as they "
                    "are: “middle.0.0:0-5” silences heads 6 and 7 of the middle, and nothing else.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(headfilter.KINDS),
                    default=headfilter.DEFAULTS.kind,
                    tooltip="Which attention of these layers: self (pixels look at pixels), cross (pixels look at words), or both. SD3, "
                    "FLUX and most later models have one attention for both, so choose both there.",
                ),
                io.Combo.Input(
                    "others",
                    options=list(headfilter.OTHERS),
                    default=headfilter.DEFAULTS.others,
                    tooltip="What the silenced heads say instead. zero: nothing. mean: their own output averaged over the picture, so that only "
                    "what differs from place to place is lost. uniform attention: as if they looked at everything alike.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The filtered model: connect it to a KSampler.")],
            **on_itself(),
        )

    @classmethod
    def execute(cls, model, heads, kind, others) -> io.NodeOutput:
        return io.NodeOutput(headfilter.apply(model, heads, kind, others, Preview(cls.hidden.unique_id)))
