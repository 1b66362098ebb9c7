"""Demo Model: the pack's own small model of a world of shapes."""

from __future__ import annotations

from comfy_api.latest import io

from .base import AttuneNode, in_menu


class AttuneDemoModel(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneDemoModel",
            display_name="Demo Model (shapes)",
            **in_menu("Start", "bundled model", "test model", "small model", "example"),
            description="A tiny text-to-image model that comes with the pack and behaves like SD1.5 in small: try every node in seconds, "
            "without a download. It draws shapes at 128×128: “a red striped star and a blue circle on a dotted grey wall”.",
            inputs=[
                io.Combo.Input(
                    "variant",
                    options=["shapes"],
                    default="shapes",
                    tooltip="Which bundled model. shapes: circle, square, triangle, star, heart, ring, cross, moon; red, orange, yellow, green, "
                    "cyan, blue, purple, white; plain, striped, dotted, checkered; on a grey, brown, black or pink background.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Use it like a checkpoint's MODEL."),
                io.Clip.Output(display_name="clip", tooltip="Use it like a checkpoint's CLIP."),
                io.Vae.Output(display_name="vae", tooltip="Use it like a checkpoint's VAE."),
            ],
        )

    @classmethod
    def execute(cls, variant) -> io.NodeOutput:
        from ..demo import model

        return io.NodeOutput(*model.load(variant))
