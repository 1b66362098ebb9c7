"""The nodes: schema, tooltips and one call each."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .decompose import AttuneDecompose
from .demo import AttuneDemoModel
from .detail import AttuneDetailSampler, AttuneEncodeBranches
from .heads import AttuneHeads
from .maps import AttuneAttentionMaps, AttuneSegmentation, AttuneShowMaps
from .regulation import AttuneRegulation
from .scb import AttuneSCBPrompts
from .scfg import AttuneSemanticCFG
from .softpag import AttuneSoftPAG
from .words import AttuneWords


class Attune(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            AttuneAttentionMaps,
            AttuneDecompose,
            AttuneDemoModel,
            AttuneDetailSampler,
            AttuneEncodeBranches,
            AttuneHeads,
            AttuneRegulation,
            AttuneSCBPrompts,
            AttuneSegmentation,
            AttuneSemanticCFG,
            AttuneShowMaps,
            AttuneSoftPAG,
            AttuneWords,
        ]
