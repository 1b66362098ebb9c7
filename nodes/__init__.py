"""The nodes: schema, tooltips and one call each."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .compare import AttuneGrid, AttuneNumbers
from .decompose import AttuneDecompose
from .demo import AttuneDemoModel
from .detail import AttuneDetailSampler, AttuneEncodeBranches
from .fix import AttuneFix
from .fusion import AttunePhraseFusion
from .gate import AttuneSemanticGate
from .headfilter import AttuneHeadFilter
from .headhunter import AttuneHeadHunter, AttunePromptList
from .heads import AttuneHeads, AttuneLoadHeads, AttuneSaveHeads
from .maps import AttuneAttentionMaps, AttuneSegmentation, AttuneShowMaps
from .negative import AttuneNegative
from .refine import AttuneRefineMaps
from .regulation import AttuneRegulation
from .scb import AttuneSCBPrompts
from .scfg import AttuneSemanticCFG
from .score import AttuneDiversity, AttuneSCBScore, AttuneScore
from .scorers import AttuneClipScorer, AttuneDemoScorer, AttunePreferenceScorer
from .softpag import AttuneSoftPAG
from .structure import AttuneStructureRefine
from .weights import AttuneWordWeights
from .words import AttuneWords


class Attune(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            AttuneAttentionMaps,
            AttuneClipScorer,
            AttuneDecompose,
            AttuneDemoModel,
            AttuneDemoScorer,
            AttuneDetailSampler,
            AttuneDiversity,
            AttuneEncodeBranches,
            AttuneFix,
            AttuneGrid,
            AttuneHeadFilter,
            AttuneHeadHunter,
            AttuneHeads,
            AttuneLoadHeads,
            AttuneNegative,
            AttuneNumbers,
            AttunePhraseFusion,
            AttunePreferenceScorer,
            AttunePromptList,
            AttuneRefineMaps,
            AttuneRegulation,
            AttuneSCBPrompts,
            AttuneSCBScore,
            AttuneSaveHeads,
            AttuneScore,
            AttuneSegmentation,
            AttuneSemanticCFG,
            AttuneSemanticGate,
            AttuneShowMaps,
            AttuneSoftPAG,
            AttuneStructureRefine,
            AttuneWordWeights,
            AttuneWords,
        ]
