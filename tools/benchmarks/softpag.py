"""What a SoftPAG step costs, as a ratio to a plain CFG step of the same SD1.5-shaped UNet, in one process."""

from __future__ import annotations

import comfy.model_patcher
from comfy_extras.nodes_pag import PerturbedAttentionGuidance

from ...patches import softpag
from ...patches.hook.install import model_sites
from ...patches.hook.sites import select
from .shared import speed
from .shared.records import recorded
from .shared.speed import PLAIN

LIMITS = {"SoftPAG, middle block": 1.38, "SoftPAG, last block": 1.10, "SoftPAG, outside its span": 1.0}


def variants(plain: comfy.model_patcher.ModelPatcher) -> dict[str, comfy.model_patcher.ModelPatcher]:
    """The plain model, and everything that is compared with it."""
    family, sites = model_sites(plain)
    last = select(sites[-1].name, sites, family)
    return {
        PLAIN: plain,
        "SoftPAG, middle block": softpag.apply(plain, 3.0, 1.0, 0.0, 1.0, 0.0),
        "SoftPAG, last block": softpag.apply(plain, 3.0, 1.0, 0.0, 1.0, 0.0, last),
        "SoftPAG, outside its span": softpag.apply(plain, 3.0, 1.0, 1.0, 1.0, 0.0),
        "ComfyUI's own PAG node": PerturbedAttentionGuidance.execute(plain, 3.0).args[0],
    }


@recorded
def main(argv: list[str]) -> int:
    """Print the table."""
    return speed.main("softpag", __doc__, variants, LIMITS, argv)
