"""Semantic-aware CFG: guidance that is even across objects."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches import scfg
from ..server.previews import Preview
from .base import AttuneNode
from .maps import AttuneMapsType


class AttuneSemanticCFG(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneSemanticCFG",
            display_name="Semantic-aware CFG",
            category="Attune",
            description="Gives every object of the picture its fair share of guidance: the model's attention says which words own which "
            "region, and regions where the prompt is weak are guided more, strong ones less. Needs a CFG above 1.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. LoRAs, ControlNets and other patches on it stay."),
                io.Combo.Input(
                    "reference",
                    options=list(scfg.REFERENCES),
                    default="foreground",
                    tooltip="Whose guidance strength all regions are brought to: the objects' (foreground, as the authors' code does), the "
                    "background's, or the whole image's.",
                ),
                io.Float.Input(
                    "min_ratio",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="A region is guided at least this many times your CFG. With both ratios at 1 this is plain CFG.",
                ),
                io.Float.Input(
                    "max_ratio",
                    default=3.0,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    tooltip="A region is guided at most this many times your CFG.",
                ),
                io.Float.Input(
                    "max_scale",
                    default=15.0,
                    min=1.0,
                    max=100.0,
                    step=0.5,
                    tooltip="No region's scale goes above this, whatever the ratio. Keep it at or above your CFG.",
                ),
                io.Int.Input(
                    "completion",
                    default=4,
                    min=0,
                    max=8,
                    tooltip="How far self-attention fills holes in the regions (R in the paper). 0 skips it and is a little faster.",
                ),
                io.Float.Input(
                    "smoothing",
                    default=0.5,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Softens the regions' maps and borders (sigma of a 3×3 Gaussian, in map pixels). 0 is off.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling to begin: 0 is the first step.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling to stop; plain CFG after that.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The guided model: connect it to a KSampler."),
                AttuneMapsType.Output(
                    display_name="maps",
                    tooltip="The attention it used (mean of its steps), for Show Attention Maps and Segmentation.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, reference, min_ratio, max_ratio, max_scale, completion, smoothing, start_percent, end_percent
    ) -> io.NodeOutput:
        ratios = (min_ratio, max_ratio, max_scale)
        span = (start_percent, end_percent)
        observer = Preview(getattr(cls.hidden, "unique_id", None))  # none from Python
        return io.NodeOutput(*scfg.apply(model, reference, *ratios, completion, smoothing, *span, observer=observer))
