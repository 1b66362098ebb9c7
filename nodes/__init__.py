"""The nodes: schema, tooltips and one call each."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .demo import AttuneDemoModel
from .heads import AttuneHeads
from .softpag import AttuneSoftPAG


class Attune(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [AttuneDemoModel, AttuneHeads, AttuneSoftPAG]
