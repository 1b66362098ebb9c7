"""SoftPAG: guidance from perturbed attention heads."""

from __future__ import annotations

from comfy_api.latest import io

from ..methods.softpag import PATHS, TARGETS, TOKENS
from ..patches import softpag
from ..patches.softpag import AUTOMATIC, Settings
from ..server.previews import Preview
from .base import AttuneNode, in_menu, on_itself
from .heads import AttuneHeadsType
from .inputs import advanced, advanced_choice, automatic, percents


class AttuneSoftPAG(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneSoftPAG",
            display_name="SoftPAG (head-selected guidance)",
            **in_menu(
                "Guidance", "PAG", "perturbed attention guidance", "perturbed", "SAG", "sharper structure", "guidance at cfg 1"
            ),
            description="Sharper structure without a negative prompt: every step also predicts the picture with some attention heads "
            "blurred to themselves, and moves away from that. Works with or without CFG. For SD1.5, SDXL, SD3, FLUX and later models.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. LoRAs, ControlNets and other patches on it stay."),
                automatic(
                    "scale",
                    Settings.scale,
                    tooltip="How far to move away from the perturbed prediction. 0 is off; 2 to 5 is usual; too much over-smooths. -1 is the "
                    "model's own: 3, and 8 for FLUX.1 with FluxGuidance at 0 (less with more of it).",
                ),
                io.Float.Input(
                    "perturbation",
                    default=Settings.perturbation,
                    min=AUTOMATIC,
                    max=1.0,
                    step=0.01,
                    tooltip="How strongly the chosen heads are perturbed (u in the paper). 1 is PAG, lower is gentler, 0 is off. -1 is the "
                    "model's own: 1 for SD1.5 and SDXL, 0.5 for all others, best on SD3; with 24 heads across layers try 0.25.",
                ),
                *percents(
                    Settings,
                    "Where in sampling to begin: 0 is the first step.",
                    "Where in sampling to stop. Layout forms early, so 0.6 saves time and keeps most of the effect.",
                ),
                io.Float.Input(
                    "rescale",
                    default=Settings.rescale,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Shrinks the guidance where it would raise contrast above the model's own. Try 0.5 if colours burn.",
                ),
                AttuneHeadsType.Input(
                    "heads",
                    optional=True,
                    tooltip="Heads from Select Heads. Left open: the whole middle block of a UNet; in SD3 layer 9, one of its best; in "
                    "FLUX and later models the layer at the same depth, by analogy.",
                ),
                advanced_choice(
                    "tokens",
                    TOKENS,
                    Settings.tokens,
                    "SD3, FLUX and most later models, where image and text share one attention: whose attention is perturbed. "
                    "all is the paper's.",
                ),
                advanced_choice(
                    "target",
                    tuple(TARGETS),
                    Settings.target,
                    "What attention is pulled towards. identity: every token looks at itself (SoftPAG). uniform: at all alike. mean query: all "
                    "look as the mean does (SEG). temperature, maximum: sharper or flatter. The others change one block of joint attention: "
                    "who (image or text) sees whom. maximum makes whole maps and is slow.",
                ),
                advanced(
                    io.Float.Input(
                        "temperature",
                        default=Settings.temperature,
                        min=0.01,
                        max=100.0,
                        step=0.01,
                        optional=True,
                        tooltip="For the target temperature: below 1 attention gets sharper, above 1 flatter.",
                    )
                ),
                advanced_choice(
                    "path",
                    tuple(PATHS),
                    Settings.path,
                    "How attention gets to the target as perturbation grows; at 1 all are there. linear is SoftPAG. Other paths make whole "
                    "maps, a part at a time, and are slow; log-linear to uniform, mean query and temperature is not.",
                ),
                AttuneHeadsType.Input(
                    "heads_2",
                    optional=True,
                    tooltip="A second set of heads, perturbed in a pass of its own, with scale_2: for example quality and a style. Costs as a "
                    "second SoftPAG node does.",
                ),
                advanced(
                    automatic(
                        "scale_2",
                        Settings.scale_2,
                        optional=True,
                        tooltip="The scale of heads_2; -1 is the model's own, as for scale.",
                    )
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guided model: connect it to a KSampler.")],
            **on_itself(),
        )

    @classmethod
    def execute(cls, model, scale, perturbation, start_percent, end_percent, rescale, heads=None, **choices) -> io.NodeOutput:
        return io.NodeOutput(
            softpag.apply(
                model,
                scale=scale,
                perturbation=perturbation,
                start_percent=start_percent,
                end_percent=end_percent,
                rescale=rescale,
                heads=heads,
                observer=Preview(cls.hidden.unique_id),
                **{name: value for name, value in choices.items() if value is not None},  # None: nobody filled it in
            )
        )
