"""Semantic-aware CFG: guidance that is even across objects."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches import scfg
from ..server.previews import Preview
from .base import AttuneNode, in_menu, on_itself
from .inputs import advanced_choice, percents
from .maps import AttuneMapsType

DEFAULTS = scfg.Settings()


class AttuneSemanticCFG(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneSemanticCFG",
            display_name="Semantic-aware CFG",
            **in_menu("Guidance", "S-CFG", "semantic cfg", "cfg per region", "weak object", "rescale"),
            description="Gives every object of the picture its fair share of guidance: the model's attention says which words own which "
            "region, and regions where the prompt is weak are guided more, strong ones less. Needs a CFG above 1.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. LoRAs, ControlNets and other patches on it stay."),
                io.Combo.Input(
                    "reference",
                    options=list(scfg.REFERENCES),
                    default=DEFAULTS.reference,
                    tooltip="Whose guidance strength all regions are brought to: the objects' (foreground, as the authors' code does), the "
                    "background's, or the whole image's.",
                ),
                io.Float.Input(
                    "min_ratio",
                    default=DEFAULTS.min_ratio,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="A region is guided at least this many times your CFG. With both ratios at 1 this is plain CFG.",
                ),
                io.Float.Input(
                    "max_ratio",
                    default=DEFAULTS.max_ratio,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    tooltip="A region is guided at most this many times your CFG.",
                ),
                io.Float.Input(
                    "max_scale",
                    default=DEFAULTS.max_scale,
                    min=1.0,
                    max=100.0,
                    step=0.5,
                    tooltip="No region's scale goes above this, whatever the ratio. Keep it at or above your CFG.",
                ),
                io.Int.Input(
                    "completion",
                    default=DEFAULTS.completion,
                    min=0,
                    max=8,
                    tooltip="How far self-attention fills holes in the regions (R in the paper). 0 skips it and is a little faster.",
                ),
                io.Float.Input(
                    "smoothing",
                    default=DEFAULTS.smoothing,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Softens the regions' maps and borders (sigma of a 3×3 Gaussian, in map pixels). 0 is off.",
                ),
                *percents(
                    DEFAULTS,
                    "Where in sampling to begin: 0 is the first step.",
                    "Where in sampling to stop; plain CFG after that.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(scfg.LAYERS),
                    default=DEFAULTS.layers,
                    optional=True,
                    tooltip="Whose attention is read. selection: one layer of each block at a quarter and an eighth of the latent's size (SD3, "
                    "FLUX and later: three around the middle). all: every layer there, as published; on SDXL ten times as many.",
                ),
                advanced_choice(
                    "form",
                    scfg.FORMS,
                    DEFAULTS.form,
                    "paper: the paper's equations. released: the authors' code where it departs from them, in the powers of self-attention, the "
                    "smoothing and the order of renormalising.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The guided model: connect it to a KSampler."),
                AttuneMapsType.Output(
                    display_name="maps",
                    tooltip="The attention it used (mean of its steps), for Show Attention Maps and Segmentation.",
                ),
            ],
            **on_itself(),
        )

    @classmethod
    def execute(
        cls,
        model,
        reference,
        min_ratio,
        max_ratio,
        max_scale,
        completion,
        smoothing,
        start_percent,
        end_percent,
        layers=DEFAULTS.layers,
        form=DEFAULTS.form,
    ) -> io.NodeOutput:
        settings = scfg.Settings(
            reference=reference,
            min_ratio=min_ratio,
            max_ratio=max_ratio,
            max_scale=max_scale,
            completion=completion,
            smoothing=smoothing,
            start_percent=start_percent,
            end_percent=end_percent,
            layers=layers,
            form=form,
        )
        return io.NodeOutput(*scfg.apply(model, settings, Preview(cls.hidden.unique_id)))
