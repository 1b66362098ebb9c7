"""Select Heads, Save Heads and Load Heads: name attention heads of a model, and share them."""

from __future__ import annotations

from comfy_api.latest import io

from ..hunt import head_files
from ..patches.head_presets import OWN, PRESETS, preset_heads
from ..patches.hook.install import model_sites
from ..patches.hook.sites import Heads, Site, select
from ..patches.softpag import default_heads
from ..server import layouts
from .base import AttuneNode, in_menu
from .inputs import AUTO

AttuneHeadsType = io.Custom("ATTUNE_HEADS")
NONE = "(none yet)"


def _written(selection: str, sites: tuple[Site, ...], family: str) -> Heads:
    """The heads of a ``selection`` text."""
    return default_heads(family, sites) if selection.strip() == AUTO else select(selection, sites, family)


class AttuneHeads(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneHeads",
            display_name="Select Heads",
            **in_menu("Heads", "attention heads", "layers", "pick heads"),
            description="Choose attention heads of a model by name, for SoftPAG and other Attune nodes. A head is one of the several "
            "eyes of an attention layer; different heads look after different things, such as outline, texture or style.",
            inputs=[
                io.Model.Input("model", tooltip="The model whose heads you want: the selection is checked against it."),
                io.String.Input(
                    "selection",
                    default=AUTO,
                    multiline=True,
                    tooltip="auto: the layer that SoftPAG takes by itself on this model. Or "
                    "items separated by spaces, new lines or “;”. An item is site:heads, each with numbers, ranges, lists or *: "
                    "“middle.0.0:0-3 output.*.*:1,5”. Without “:heads” all heads of the site are taken. Sites are input.4.0, middle.0.0, "
                    "output.3.1 (SD1.5, SDXL), joint.7 (SD3, Qwen-Image, Z-Image, Krea 2), double.7 and single.20 (FLUX), "
                    "block.7 (Wan, Anima). Paper style works too: “L8H3 L9H0-4”.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[OWN, *PRESETS],
                    default=OWN,
                    optional=True,
                    tooltip="selection: what is written above. Or a set by name: unet_middle (SD1.5, SDXL), sd3_quality and flux_quality "
                    "are the layers that SoftPAG takes by itself: as PAG, as its paper, and for FLUX.1, whose layers the paper does not "
                    "compare, at the depth of SD3's. The others bring out what their name says in the paper's figures, on SD3 medium and "
                    "FLUX.1. There is none for other models: nobody has measured one.",
                ),
            ],
            outputs=[
                AttuneHeadsType.Output(display_name="heads", tooltip="The chosen heads."),
                io.String.Output(display_name="summary", tooltip="What was chosen, in words."),
            ],
        )

    @classmethod
    def execute(cls, model, selection, preset=OWN) -> io.NodeOutput:
        family, sites = model_sites(model)
        preset = preset or OWN  # None: an optional input that nobody filled in
        heads = preset_heads(preset, sites, family) if preset != OWN else _written(selection, sites, family)
        total = sum(site.heads for site in sites)
        about = "" if preset == OWN else f"{preset}, {PRESETS[preset].source}: "
        summary = f"{about}{len(heads)} of {total} heads in {len(heads.chosen)} of {len(sites)} layers: {heads.text}"
        return io.NodeOutput(heads, summary, ui=layouts.shown(sites, family, heads))


class AttuneSaveHeads(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneSaveHeads",
            display_name="Save Heads",
            **in_menu("Heads", "export heads"),
            description="Writes a head set as a small file in ComfyUI's user folder (attune/heads), with the model that it is for, and where it "
            "comes from. Share the file; Load Heads reads it.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that the heads are for."),
                AttuneHeadsType.Input("heads", tooltip="From HeadHunter or Select Heads."),
                io.String.Input(
                    "name", default="my heads", tooltip="The file's name. A head set of the same name is replaced."
                ),
            ],
            outputs=[
                AttuneHeadsType.Output(display_name="heads", tooltip="The same heads."),
                io.String.Output(display_name="path", tooltip="The file."),
            ],
        )

    @classmethod
    def execute(cls, model, heads, name) -> io.NodeOutput:
        family, sites = model_sites(model)
        return io.NodeOutput(heads, str(head_files.save(heads, sites, family, name)))


class AttuneLoadHeads(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneLoadHeads",
            display_name="Load Heads",
            **in_menu("Heads", "import heads", "preset"),
            description="Reads a head set that Save Heads wrote, that somebody shared, or that comes with the pack. It must be for this kind of "
            "model.",
            inputs=[
                io.Model.Input("model", tooltip="The model to use the heads on; a set for another kind of model is refused."),
                io.Combo.Input(
                    "name",
                    options=head_files.names() or [NONE],
                    tooltip="The files in attune/heads in ComfyUI's user folder, and the pack's presets. Press R after adding one.",
                ),
            ],
            outputs=[
                AttuneHeadsType.Output(display_name="heads", tooltip="For SoftPAG, or as HeadHunter's candidates."),
                io.String.Output(display_name="summary", tooltip="What it is and where it comes from."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model, name) -> str:
        try:
            path = head_files.find(name)
            return f"{path} {path.stat().st_mtime_ns}"
        except ValueError:
            return ""

    @classmethod
    def execute(cls, model, name) -> io.NodeOutput:
        family, sites = model_sites(model)
        told = head_files.load(name, sites, family)
        lines = [f"{name}: {len(told)} heads: {told.text}"]
        told_of = ("objective", "scorer", "scores", "images", "prompts", "settings", "pack")
        lines += [f"{key}: {told.about[key]}" for key in told_of if key in told.about]
        heat = layouts.scores(told.about["heatmap"], name) if "heatmap" in told.about else None
        return io.NodeOutput(told, "\n".join(lines), ui=heat)
