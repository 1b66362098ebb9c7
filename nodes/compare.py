"""To see what a number does: one run for each of several numbers, and all pictures in one labelled grid."""

from __future__ import annotations

import math
import re

from comfy_api.latest import io

from ..patches.maps.pictures import grid
from .base import AttuneNode, in_menu, shown

MOST_NUMBERS, MOST_TILES = 64, 400


def numbers_of(text: str) -> list[float]:
    """Numbers with commas, spaces or line breaks between them.

    Raises:
        ValueError: for something else, none, or more than `MOST_NUMBERS`.
    """
    found = []
    for part in re.split(r"[\s,;，；、]+", text.strip()):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"Number List: {shown(part)} is no number; write numbers with commas between them, such as 0, 1, 2.5."
            )
        found.append(number)
    if len(found) > MOST_NUMBERS:
        raise ValueError(
            f"Number List: {len(found)} numbers are {len(found)} runs, and {MOST_NUMBERS} are the most; write fewer."
        )
    return found


class AttuneNumbers(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneNumbers",
            display_name="Number List",
            **in_menu("Start", "XY plot", "sweep", "strengths", "values"),
            description="Several numbers for one input: what it is connected to, and all that comes after, runs once for each. Labelled Grid "
            "puts the pictures together.",
            inputs=[
                io.String.Input(
                    "numbers",
                    default="0, 1, 2, 4",
                    tooltip="Numbers with commas between them. Connect the output to a strength, scale or weight. A 0 shows the plain picture.",
                ),
                io.String.Input("name", default="strength", tooltip="What the numbers are, for the labels: “strength 2”."),
            ],
            outputs=[
                io.Float.Output(display_name="numbers", is_output_list=True, tooltip="The numbers, one run for each."),
                io.String.Output(display_name="labels", is_output_list=True, tooltip="Name and number, for Labelled Grid."),
            ],
        )

    @classmethod
    def execute(cls, numbers, name) -> io.NodeOutput:
        found = numbers_of(numbers)
        return io.NodeOutput(found, [f"{name.strip()} {number:g}".strip() for number in found])


class AttuneGrid(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneGrid",
            display_name="Labelled Grid",
            **in_menu("Start", "XY plot", "contact sheet", "compare", "image grid"),
            description="All pictures of a list in one: a row for each run (as of Number List), a column for each picture of its batch, which "
            "are as many seeds.",
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures of several runs, from VAE Decode."),
                io.String.Input(
                    "labels",
                    optional=True,
                    force_input=True,
                    tooltip="A label for each run: from Number List, or the prompts of Prompt List. Without them runs are numbered.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="One picture: connect it to Save Image or Preview Image.")],
        )

    @classmethod
    def execute(cls, images, labels=None) -> io.NodeOutput:
        labels = labels or [f"run {n}" for n in range(1, len(images) + 1)]
        if len(labels) != len(images):
            raise ValueError(
                f"Labelled Grid: there are {len(labels)} labels and {len(images)} runs of pictures; connect labels to the list that makes "
                "the runs."
            )
        if (count := sum(map(len, images))) > MOST_TILES:
            raise ValueError(f"Labelled Grid: {count} pictures are too many for one; {MOST_TILES} are the most.")
        rows = [
            [(label if len(batch) == 1 else f"{label} · picture {n}", one[None, ..., :3]) for n, one in enumerate(batch, 1)]
            for label, batch in zip(labels, images, strict=True)
        ]
        return io.NodeOutput(grid(rows))
