"""Select Heads: name attention heads of a model."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches.hook.attention import model_sites
from ..patches.hook.sites import select
from ..server import layouts
from .base import AttuneNode

AttuneHeadsType = io.Custom("ATTUNE_HEADS")


class AttuneHeads(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneHeads",
            display_name="Select Heads",
            category="Attune",
            description="Choose attention heads of a model by name, for SoftPAG and other Attune nodes. A head is one of the several "
            "eyes of an attention layer; different heads look after different things, such as outline, texture or style.",
            inputs=[
                io.Model.Input("model", tooltip="The model whose heads you want: the selection is checked against it."),
                io.String.Input(
                    "selection",
                    default="middle.*.*",
                    multiline=True,
                    tooltip="Items separated by spaces, new lines or “;”. An item is site:heads, each with numbers, ranges, lists or *: "
                    "“middle.0.0:0-3 output.*.*:1,5”. Without “:heads” all heads of the site are taken. Sites are input.4.0, middle.0.0, "
                    "output.3.1 (SD1.5, SDXL), joint.7 (SD3), double.7 and single.20 (FLUX). Paper style works too: “L8H3 L9H0-4”.",
                ),
            ],
            outputs=[
                AttuneHeadsType.Output(display_name="heads", tooltip="The chosen heads."),
                io.String.Output(display_name="summary", tooltip="What was chosen, in words."),
            ],
        )

    @classmethod
    def execute(cls, model, selection) -> io.NodeOutput:
        family, sites = model_sites(model)
        heads = select(selection, sites, family)
        total = sum(site.heads for site in sites)
        summary = f"{len(heads)} of {total} heads in {len(heads.chosen)} of {len(sites)} layers: {heads.text}"
        return io.NodeOutput(heads, summary, ui=layouts.shown(sites, family, heads))
