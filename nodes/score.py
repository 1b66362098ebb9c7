"""Scores as nodes: pictures against a text, pictures against each other, parts against their styles."""

from __future__ import annotations

from comfy_api.latest import io

from ..methods.scores import diversity
from ..scoring.detector import Detector
from ..scoring.folders import DETECTORS, fingerprint, model_folders
from ..scoring.metrics import METRICS, score, style_score, table
from .base import AttuneNode, in_menu
from .scorers import AttuneScorerType

WITHOUT = "none (use masks)"


class AttuneScore(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneScore",
            display_name="Score Images",
            **in_menu("Scores", "rate images", "metric", "evaluate"),
            description="Says in numbers how well pictures show a text, how good they look, or which one people would prefer.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures to judge, one or a batch."),
                io.String.Input(
                    "text",
                    multiline=True,
                    tooltip="What the pictures should show: the prompt. clip_iqa does not need it, or takes two opposites with a vertical "
                    "bar between them, such as “Bright photo.” and “Dark photo.”",
                ),
                AttuneScorerType.Input("scorer", tooltip="The judge: CLIP Scorer, Preference Scorer or Demo Scorer."),
                io.Combo.Input(
                    "metric",
                    options=list(METRICS),
                    default="clip_t",
                    tooltip="clip_t: the cosine of picture and text. clip_iqa: the share of “Good photo.” against “Bad photo.”, 0 to 1. "
                    "preference: the scorer's own reward; of a CLIP, its scale times the cosine.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="score", tooltip="The mean over the pictures."),
                io.String.Output(
                    display_name="table", tooltip="A row for every picture, with tabs between cells: for a spreadsheet."
                ),
            ],
        )

    @classmethod
    def execute(cls, images, text, scorer, metric) -> io.NodeOutput:
        each = score(images, text, scorer, metric)
        mean = float(each.mean())
        rows = [*enumerate(each.tolist(), 1), ("mean", mean)]
        return io.NodeOutput(mean, table(("picture", metric), rows))


class AttuneDiversity(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneDiversity",
            display_name="Diversity",
            **in_menu("Scores", "variety", "metric"),
            description="How different the pictures of a batch are from each other: the mean distance of their vectors, over all pairs. Use "
            "it to see what a method costs in variety.",
            inputs=[
                io.Image.Input("images", tooltip="Two pictures or more, of one prompt with different seeds."),
                AttuneScorerType.Input(
                    "scorer", tooltip="Whose vectors to compare: CLIP Scorer, or Demo Scorer set to similarity."
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="diversity", tooltip="1 minus the mean cosine: 0 for equal pictures, higher is more different."
                )
            ],
        )

    @classmethod
    def execute(cls, images, scorer) -> io.NodeOutput:
        return io.NodeOutput(diversity(scorer.features(images)))


class AttuneSCBScore(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneSCBScore",
            display_name="SCB Score",
            **in_menu("Benchmark", "style composition", "SCB", "Grounding DINO"),
            description="The score of the style composition benchmark: subject and background are each cut out of the picture and held "
            "against their own phrase.",
            inputs=[
                io.Image.Input("image", tooltip="The pictures to judge, one or a batch of one prompt."),
                io.String.Input("subject", tooltip="The subject with its style, from SCB Prompts: “a sketch style robot”."),
                io.String.Input("background", tooltip="The background with its style: “an oil-painting style forest”."),
                AttuneScorerType.Input("scorer", tooltip="The judge: CLIP Scorer."),
                io.Combo.Input(
                    "detector",
                    options=[WITHOUT, *model_folders(DETECTORS)],
                    default=WITHOUT,
                    tooltip=f"A folder in models/{DETECTORS} with Grounding DINO, OWL-ViT or OWLv2 as Hugging Face has it, to find the parts "
                    "with. Masks are used instead where they are connected.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Where the parts are, from Attention Segmentation with the subject's word, then the background's, in Prompt Words: "
                    "the subject's mask for every picture, then the background's. With the subject's alone the background is the whole picture.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="score", tooltip="The mean over parts and pictures: a cosine."),
                io.String.Output(
                    display_name="table", tooltip="Every part, where it was found and its score, with tabs between cells."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, detector=WITHOUT, **others) -> str:
        return "" if detector == WITHOUT else fingerprint(DETECTORS, detector)

    @classmethod
    def execute(cls, image, subject, background, scorer, detector=WITHOUT, masks=None) -> io.NodeOutput:
        finder = Detector(detector) if detector != WITHOUT and masks is None else None
        each, rows = style_score(image, (subject, background), scorer, finder, masks)
        return io.NodeOutput(float(each.mean()), rows)
