"""Head sets by name: the layers and heads that the paper shows, for the models that it shows them on.

Source: "Where and How to Perturb" (NeurIPS 2025, arXiv 2506.10978 v4). The heads that its searches for quality found are not printed, so
quality is a layer; heads are from its figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .hook.sites import Heads, Site, select
from .softpag import default_heads

OWN = "selection"  # not a preset: what is written


@dataclass(frozen=True)
class HeadPreset:
    """A head set of one kind of model.

    Attributes:
        family: of the model.
        selection: in the grammar of `select`; nothing is the family's default, whatever its depth.
        layers: how many the model has, for a selection of heads by number.
        source: what it is and where it is from.
    """

    family: str
    selection: str
    layers: int
    source: str


SD3, FLUX = 24, 57
PRESETS: Mapping[str, HeadPreset] = {
    "unet_middle": HeadPreset("unet", "", 0, "the middle block, as PAG"),
    "sd3_quality": HeadPreset("sd3", "", 0, "layer 9 of 24, one of the four best (figures 9, 14, 19)"),
    "sd3_dark": HeadPreset("sd3", "L1H2 L1H10", SD3, "dark (figure 36)"),
    "sd3_bright": HeadPreset("sd3", "L0H15 L1H19", SD3, "bright, white (figure 36)"),
    "sd3_golden_hour": HeadPreset("sd3", "L0H17 L2H3 L18H11", SD3, "warm light, as they joined a search for it (figure 8)"),
    "sd3_spring": HeadPreset("sd3", "L0H2 L5H12 L13H19", SD3, "pink, spring bloom, as they joined a search for it (figure 21)"),
    "sd3_detail": HeadPreset("sd3", "L14H7", SD3, "high resolution, fine detail (figure 34)"),
    "sd3_red": HeadPreset("sd3", "L0H3", SD3, "red (figure 34)"),
    "flux_quality": HeadPreset("flux", "", 0, "the depth of SD3's layer 9; the paper compares no layers of FLUX"),
    "flux_golden_hour": HeadPreset("flux", "L38H18", FLUX, "golden hour (figure 35)"),
    "flux_vintage_film": HeadPreset("flux", "L51H23", FLUX, "vintage film (figure 35)"),
    "flux_warm_red": HeadPreset("flux", "L52H22", FLUX, "warm red palette (figure 35)"),
    "flux_cool": HeadPreset("flux", "L52H6", FLUX, "cool tone (figure 35)"),
    "flux_green": HeadPreset("flux", "L52H12", FLUX, "green filter (figure 35)"),
    "flux_bokeh": HeadPreset("flux", "L34H0", FLUX, "smooth bokeh, detailed (figure 35)"),
}


def preset_heads(name: str, model_sites: tuple[Site, ...], family: str) -> Heads:
    """The heads of a preset.

    Raises:
        ValueError: when there is none of that name, or it is for another model.
    """
    if name not in PRESETS:
        raise ValueError(f"Select Heads: there is no preset “{name}”; choose one of {', '.join(PRESETS)}, or “{OWN}”.")
    preset = PRESETS[name]
    if not fits(preset, model_sites, family):
        mine = [n for n, p in PRESETS.items() if fits(p, model_sites, family)]
        raise ValueError(
            f"Select Heads: the preset “{name}” is for another model ({preset.family}{f', {preset.layers} layers' if preset.layers else ''}); "
            f"this one is {family} with {len(model_sites)} layers. Set preset to {', '.join(mine)}, or “{OWN}”."
        )
    return select(preset.selection, model_sites, family) if preset.selection else default_heads(family, model_sites)


def fits(preset: HeadPreset, model_sites: tuple[Site, ...], family: str) -> bool:
    """Whether a preset is for a model of these sites."""
    return preset.family == family and preset.layers in (0, len(model_sites))
