"""Structure-aware Latent Refine: even out a latent inside its regions, before it is decoded."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches import structure
from ..server.graph import made_by
from .base import AttuneNode, in_menu, on_itself
from .maps import AttuneMapsType


class AttuneStructureRefine(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneStructureRefine",
            display_name="Structure-aware Latent Refine",
            **in_menu("Maps", "CRF", "edges", "Canny", "latent refine"),
            description="Evens out a finished latent inside its regions and keeps its contours, most of all those of what the prompt names: "
            "for speckle and small artefacts. Goes between the sampler and VAE Decode.",
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to refine, from the sampler. Works with every kind of model."),
                AttuneMapsType.Input(
                    "maps",
                    optional=True,
                    tooltip="From Capture Attention Maps or Semantic-aware CFG on the model that made this latent: contours count where words "
                    "are looked at. Left open: all contours count alike.",
                ),
                io.Float.Input(
                    "strength",
                    default=structure.DEFAULTS.strength,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much a place takes from those around it that look alike, against what it is itself. 0 returns the latent "
                    "untouched; above 1 fine texture goes.",
                ),
                io.Float.Input(
                    "edge_low",
                    default=structure.DEFAULTS.edge_low,
                    min=0.01,
                    max=4.0,
                    step=0.01,
                    tooltip="Canny's lower threshold: weaker edges are none, edges between the two count if they go on from a strong one. The "
                    "strongest edge there can be, from the latent's least to its most, is about 2.6.",
                ),
                io.Float.Input(
                    "edge_high",
                    default=structure.DEFAULTS.edge_high,
                    min=0.01,
                    max=4.0,
                    step=0.01,
                    tooltip="Canny's upper threshold: stronger edges always count.",
                ),
                io.Int.Input(
                    "iterations",
                    default=structure.DEFAULTS.iterations,
                    min=0,
                    max=100,
                    tooltip="How often places tell each other their value. Five come close to the end; 0 is off.",
                ),
                io.Float.Input(
                    "spatial_sigma",
                    default=structure.DEFAULTS.spatial_sigma,
                    min=0.5,
                    max=64.0,
                    step=0.1,
                    tooltip="How far places look around, in latent pixels (eight of the picture's each, for most models). Large latents take "
                    "long: every place is compared with all that are in reach.",
                ),
                io.Float.Input(
                    "feature_sigma",
                    default=structure.DEFAULTS.feature_sigma,
                    min=0.01,
                    max=4.0,
                    step=0.01,
                    tooltip="How different two places may look and still count as alike, where 1 is the least against the most of the latent. "
                    "Lower keeps more.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="samples", tooltip="The refined latent: connect it to VAE Decode.")],
            **on_itself(io.Hidden.prompt),
        )

    @classmethod
    def execute(
        cls, samples, strength, edge_low, edge_high, iterations, spatial_sigma, feature_sigma, maps=None
    ) -> io.NodeOutput:
        prompt, node = cls.hidden.prompt, cls.hidden.unique_id
        record = None if maps is None else maps.record(made_by(prompt, node, "samples"))
        settings = (strength, edge_low, edge_high, iterations, spatial_sigma, feature_sigma)
        return io.NodeOutput(structure.refine(samples, record, *settings))
