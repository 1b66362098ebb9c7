"""Scorers: models that say how well a picture shows a text."""

from __future__ import annotations

from comfy_api.latest import io

from ..scoring.folders import SCORERS, fingerprint, model_folders
from ..scoring.scorers import ClipScorer, PreferenceScorer
from .base import AttuneNode, in_menu

AttuneScorerType = io.Custom("ATTUNE_SCORER")
NONE = "(none yet)"


def folder_names(kind: str) -> list[str]:
    """Names for a menu; it must never be empty."""
    return list(model_folders(kind)) or [NONE]


class _OfFolder(AttuneNode):
    """A node whose scorer is made of a model folder."""

    scorer: type[ClipScorer] | type[PreferenceScorer]

    @classmethod
    def fingerprint_inputs(cls, folder) -> str:
        return fingerprint(SCORERS, folder)

    @classmethod
    def execute(cls, folder) -> io.NodeOutput:
        return io.NodeOutput(cls.scorer(folder))


def _schema(node_id: str, display_name: str, description: str, holds: str, gives: str, aliases: tuple[str, ...]) -> io.Schema:
    """What the nodes of a model folder show: ``holds`` says of the folder, and ``gives`` of the scores, what they are."""
    return io.Schema(
        node_id=node_id,
        display_name=display_name,
        **in_menu("Scores", *aliases),
        description=description,
        inputs=[io.Combo.Input("folder", options=folder_names(SCORERS), tooltip=f"A folder in models/{SCORERS} with {holds}")],
        outputs=[AttuneScorerType.Output(display_name="scorer", tooltip=gives)],
    )


class AttuneClipScorer(_OfFolder):
    scorer = ClipScorer

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            node_id="AttuneClipScorer",
            display_name="CLIP Scorer",
            description="How well a picture shows a text, by a CLIP or SigLIP model of yours. Nothing is downloaded.",
            holds="a whole CLIP or SigLIP model as Hugging Face has it: config.json, model.safetensors, tokenizer and preprocessor files. "
            "Press R after adding one.",
            gives="Gives cosines, usually 0.15 to 0.35 with CLIP; for Score Images and the rest.",
            aliases=("CLIP score", "CLIP-T", "CLIP-IQA", "similarity"),
        )


class AttunePreferenceScorer(_OfFolder):
    scorer = PreferenceScorer

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            node_id="AttunePreferenceScorer",
            display_name="Preference Scorer",
            description="Which picture people would prefer for a text, by a model tuned on people's choices, such as PickScore. Nothing is "
            "downloaded.",
            holds="PickScore or another preference-tuned CLIP as Hugging Face has it; or a CLIP with a head.safetensors beside it, an MLP on "
            "its vectors.",
            gives="Gives rewards: higher is preferred. Only differences between pictures of one text mean something.",
            aliases=("PickScore", "HPS", "aesthetic", "reward"),
        )


class AttuneDemoScorer(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneDemoScorer",
            display_name="Demo Scorer (shapes)",
            **in_menu("Scores", "reader", "bound", "bundled scorer"),
            description="How well a picture shows a text, for pictures of the bundled demo model: a small CLIP of its world of shapes, or "
            "the reader that names what a picture shows. Comes with the pack.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=["similarity", "all present", "all bound"],
                    default="similarity",
                    tooltip="similarity: the cosine of picture and text, as CLIP's. all present: 1 if every thing that the text names is "
                    "there, else 0. all bound: 1 if every thing is there with its colour and pattern, else 0.",
                )
            ],
            outputs=[AttuneScorerType.Output(display_name="scorer", tooltip="For pictures of the demo model only.")],
        )

    @classmethod
    def execute(cls, kind="similarity") -> io.NodeOutput:
        from ..demo.scorer import scorer

        return io.NodeOutput(scorer(kind))
