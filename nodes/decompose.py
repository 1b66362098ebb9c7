"""Decompose Prompt: a prompt as a simple base and sub-prompts that add details."""

from __future__ import annotations

from comfy_api.latest import io

from ..language.decompose import GRANULARITIES, ORDERS, SORTS, decompose, order_of
from ..server.widgets import branches_told
from .base import AttuneNode, in_menu

AttuneBranchesType = io.Custom("ATTUNE_BRANCHES")


class AttuneDecompose(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneDecompose",
            display_name="Decompose Prompt",
            **in_menu("Words", "Detail++", "sub-prompts", "split prompt", "binding", "colours mixed up", "attribute"),
            description="Takes a prompt apart for Detail++: a base for the layout, a branch without modifiers, and sub-prompts that each add "
            "details to one noun. English; or write the sub-prompts yourself.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    tooltip="The prompt. (weights:1.2), \\( escapes \\) and embedding:names are kept in the branches.",
                ),
                io.Combo.Input(
                    "granularity",
                    options=list(GRANULARITIES),
                    default="attribute",
                    tooltip="attribute: a branch for every detail (“red”, “with sunglasses”). subject: one for all details of a "
                    "noun, which needs fewer branches.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default="complex first",
                    tooltip="What gives the layout. complex first: the whole prompt is the base, and the next branch removes all details. "
                    "simple first: the prompt without details is the base. The branches after that add them.",
                ),
                io.Boolean.Input(
                    "remove_then_add",
                    default=False,
                    tooltip="For workflows saved before: on, the order is complex first. Leave it off and choose the order.",
                ),
                io.String.Input(
                    "manual",
                    default="",
                    multiline=True,
                    tooltip="Your own sub-prompts, one a line: the noun, a vertical bar, and the sub-prompt. “*” in place of the noun is the "
                    "whole picture, “car #2” the second car. Empty: the prompt is taken apart automatically (needs spaCy).",
                ),
                io.Combo.Input(
                    "sort",
                    options=list(SORTS),
                    default="as written",
                    optional=True,
                    tooltip="Which details are added first: as written, as in the prompt and the paper; short first, those of few words; long "
                    "first, those of many.",
                ),
            ],
            outputs=[
                AttuneBranchesType.Output(
                    display_name="branches", tooltip="The base and the sub-prompts, each with its nouns."
                ),
                io.String.Output(
                    display_name="summary", tooltip="The branches to read; all but the base are written as manual takes them."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, text, granularity="attribute", order="complex first", remove_then_add=False, manual="", sort="as written"
    ) -> io.NodeOutput:
        order = order_of(order, remove_then_add)
        found = decompose(text, granularity=granularity, order=order, sort=sort, manual=manual)
        return io.NodeOutput(found, found.summary, ui=branches_told(found, order))
