"""SoftPAG: guidance from perturbed attention heads."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches import softpag
from .base import AttuneNode
from .heads import AttuneHeadsType


class AttuneSoftPAG(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneSoftPAG",
            display_name="SoftPAG (head-selected guidance)",
            category="Attune",
            description="Sharper structure without a negative prompt: every step also predicts the picture with some attention heads "
            "blurred to themselves, and moves away from that. Works with or without CFG. For SD1.5, SDXL, SD3 and FLUX.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. LoRAs, ControlNets and other patches on it stay."),
                io.Float.Input(
                    "scale",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How far to move away from the perturbed prediction. 0 is off; 2 to 5 is usual; too much over-smooths.",
                ),
                io.Float.Input(
                    "perturbation",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How strongly the chosen heads are perturbed (u in the paper). 1 is PAG, lower is gentler, 0 is off.",
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
                    tooltip="Where in sampling to stop. Layout forms early, so 0.6 saves time and keeps most of the effect.",
                ),
                io.Float.Input(
                    "rescale",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Shrinks the guidance where it would raise contrast above the model's own. Try 0.5 if colours burn.",
                ),
                AttuneHeadsType.Input(
                    "heads",
                    optional=True,
                    tooltip="Heads from Select Heads. Left open: the whole middle block of a UNet; in SD3 and FLUX one layer just after the "
                    "middle of the joint (double) blocks.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guided model: connect it to a KSampler.")],
        )

    @classmethod
    def execute(cls, model, scale, perturbation, start_percent, end_percent, rescale, heads=None) -> io.NodeOutput:
        return io.NodeOutput(softpag.apply(model, scale, perturbation, start_percent, end_percent, rescale, heads))
