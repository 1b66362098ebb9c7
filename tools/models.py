"""MODELS.md: which node works on which kind of model, where SoftPAG acts by itself, and what that costs (``run.py models``).

What a cell says is checked on small models of every kind by ``tests/patches/test_models.py``, which reads the same table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from .measurements import markdown
from .runtime import RunError
from .runtime.setup import ROOT

PAGE = ROOT / "MODELS.md"
START, END = "<!-- models: written by python3 run.py models -->\n", "<!-- end of models -->\n"
PAPER, BEYOND, REFUSED = "paper", "yes", "no"


@dataclass(frozen=True)
class Model:
    """A kind of model: what people call it, whether text and image share one attention, and what is peculiar to it."""

    title: str
    joint: bool = True
    about: str = ""


@dataclass(frozen=True)
class Node:
    """What one node does on models.

    Attributes:
        paper: the families on which its source shows it.
        joint, separate: why it is refused where text and image share one attention, and where each has its own; nothing: it works.
        only: the families on which alone it works, if there are such.
        about: what is peculiar on families that its source does not have.
    """

    paper: tuple[str, ...] = ()
    joint: str = ""
    separate: str = ""
    only: tuple[str, ...] = ()
    about: str = ""


_REFERENCES = (
    "Tokens of reference pictures come after the image: maps and words skip them, SoftPAG's identity is over them too."
)
MODELS: Mapping[str, Model] = {
    "unet": Model("SD1.5, SD2, SDXL", joint=False),
    "sd3": Model(
        "SD3, SD3.5", about="SD3.5 medium attends once more among the image in some blocks; SoftPAG leaves that alone."
    ),
    "flux": Model("FLUX.1", about=_REFERENCES),
    "flux2": Model(
        "FLUX.2 dev, klein", about=f"ComfyUI puts zeros before a text of under 512 tokens, which are no words. {_REFERENCES}"
    ),
    "chroma": Model("Chroma", about="Not Chroma Radiance, which draws pixels."),
    "qwen_image": Model("Qwen-Image 1, Edit", about=_REFERENCES),
    "qwen_image21": Model(
        "Qwen-Image 2.1",
        about="Needs a ComfyUI that has it. Text and reference pictures are computed apart from the image, once, and ComfyUI keeps that: only "
        "the image's own queries can be changed, no map is of the text's, and the perturbed pass of SoftPAG runs in full.",
    ),
    "z_image": Model(
        "Z-Image",
        about="Text and image are padded to 32 tokens each: padding is neither, but the identity is over it too. The refiners before the "
        "layers are outside.",
    ),
    "lumina2": Model("Lumina 2", about="The refiners before the layers are outside."),
    "krea2": Model("Krea 2", about="Needs a ComfyUI that has it. The blocks that only text goes through are outside."),
    "wan": Model("Wan 2.1, 2.2 from text", joint=False, about="One frame is a picture; of a film, maps are over all frames."),
    "cosmos_predict2": Model(
        "Cosmos Predict 2", joint=False, about="One frame is a picture; of a film, maps are over all frames."
    ),
    "anima": Model("Anima", joint=False, about="Needs a ComfyUI that has it. The adapter of its text is outside."),
}
NODES: Mapping[str, Node] = {
    "SoftPAG": Node(
        ("unet", "sd3", "flux"),
        about="where text and image share one attention, the identity is over all of its tokens, as in the paper",
    ),
    "HeadHunter": Node(("sd3", "flux")),
    "Head Filter": Node(("unet",), about="where text and image share one attention, only both kinds at once can be filtered"),
    "Capture, Show, Segmentation": Node(("unet",), about="beyond UNets, by three layers around the middle"),
    "Semantic-aware CFG": Node(
        ("unet",),
        about="beyond UNets, by three layers around the middle; acts only where cfg is above 1, and on pictures, not films",
    ),
    "Attention Regulation": Node(("unet",), about="beyond UNets, in three layers around the middle"),
    "Phrase Fusion": Node(("unet",)),
    "Semantic Gate": Node(
        ("unet",), about="FLUX.2, Qwen-Image and models of films need the VAE, ComfyUI has no quick preview of theirs"
    ),
    "Refine Attention": Node(("unet",), about="where text and image share one attention it needs words"),
    "Word Weights": Node(about="its equations are this pack's own"),
    "Negative Prompt": Node(("unet", "sd3", "flux", "chroma", "wan")),
    "Detail++": Node(
        ("unet",),
        joint="there is no self-attention apart from the text's, whose map the branches could share",
        separate="its text is adapted inside the model, one prompt at a time",
        only=("unet", "wan", "cosmos_predict2"),
        about="beyond UNets, by three layers around the middle, and every layer's layout is shared; pictures, not films; there without its "
        "optimisation in newer ComfyUI",
    ),
}


def verdict(node: str, family: str) -> str:
    """One cell of the table: `PAPER`, `BEYOND` or `REFUSED`."""
    if why(node, family):
        return REFUSED
    return PAPER if family in NODES[node].paper else BEYOND


def why(node: str, family: str) -> str:
    """Why a node is refused on a family; nothing where it works."""
    found = NODES[node]
    if found.only and family in found.only:
        return ""
    return found.joint if MODELS[family].joint else found.separate


def families() -> tuple[str, ...]:
    """The families that the hook knows, in the table's order; those of a kind that is not in the table are an error.

    Raises:
        RunError: for such.
    """
    from ..patches.hook.families import FAMILIES

    known = {kind.name for kind in FAMILIES}
    if missing := known - MODELS.keys():
        raise RunError(f"tools/models.py has no row for {', '.join(sorted(missing))}.")
    return tuple(name for name in MODELS if name in known)


def works() -> str:
    """The table of models and nodes, and what there is to say of its cells."""
    mine = families()
    rows = [[f"**{MODELS[f].title}**", *(verdict(node, f) for node in NODES)] for f in mine]
    lines = [markdown(["", *NODES], rows), "\n"]
    for node, found in NODES.items():
        refused = dict.fromkeys(why(node, f) for f in mine if why(node, f))
        lines += [f"- **{node}**: {found.about}.\n"] if found.about else []
        for reason in refused:
            titles = "; ".join(MODELS[f].title for f in mine if why(node, f) == reason)
            lines.append(f"- **{node}** is refused on {titles}: {reason}.\n")
    lines += ["\n"] + [f"- **{MODELS[f].title}**: {MODELS[f].about}\n" for f in mine if MODELS[f].about]
    return "".join(lines)


def refused() -> str:
    """Why some models are refused."""
    from ..patches.hook.families import WHY

    return "".join(f"- `{name}`: {reason}\n" for name, reason in WHY.items())


def heads(page: str) -> str:
    """SoftPAG's own choice on the published models; rows of those that this ComfyUI does not know are the page's."""
    from ..patches.softpag import AUTOMATIC, perturbation_of, scale_of
    from ..server import layouts

    rows = []
    for name, (title, _, _) in layouts.ARCHITECTURES.items():
        if name not in layouts.PRESETS:
            rows += [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(f"| {title} | ")]
            continue
        found = layouts.preset(name)
        family, count = found["family"], sum(heads for _, heads in found["layers"])
        sites = [item.partition(":")[0] for item in found["default"].split()]
        default = "` to `".join(dict.fromkeys((sites[0], sites[-1])))
        by = {"unet": "PAG", "sd3": "the paper"}.get(family, "depth of SD3's")
        numbers = (f"{scale_of(family, AUTOMATIC):g}", f"{perturbation_of(family, AUTOMATIC):g}")
        rows.append([title, str(len(found["layers"])), str(count), f"`{default}`", by, *numbers])
    return markdown(["", "layers", "heads", "SoftPAG's layer", "by", "scale", "perturbation"], rows)


def written(page: str) -> str:
    """The page with the tables as they are now.

    Raises:
        RunError: for a page without the marks.
    """
    before, found, rest = page.partition(START)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise RunError(f"{PAGE.name} has no lines '{START.strip()}' and '{END.strip()}': put them where the tables belong.")
    return f"{before}{START}{works()}\n## Where SoftPAG acts by itself\n\n{heads(page)}\n## Models that are refused\n\n{refused()}{END}{after}"


def main(argv: list[str]) -> int:
    """Write the page."""
    argparse.ArgumentParser(prog="run.py models", description=__doc__).parse_args(argv)
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0
