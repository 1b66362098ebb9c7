"""Parts of a picture found by their names: open-vocabulary detectors of transformers, from a local folder."""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods.scores import Box, within
from .folders import DETECTORS, PREPROCESSOR, TOKENIZER, model_folder, network_of_folder, part_of_folder
from .scorers import managed, ready

LEAST = 0.05  # a box below this confidence is no find


class Detector:
    """OWL-ViT, OWLv2, Grounding DINO and their kin.

    Raises:
        ValueError: when the folder is missing, unsafe, incomplete or something else.
    """

    def __init__(self, name: str):
        from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor, AutoTokenizer

        who, path = "SCB Score", model_folder(DETECTORS, name)
        config = part_of_folder(who, AutoConfig, path, "config.json")
        self.kind = str(config.model_type)
        part_of_folder(who, AutoTokenizer, path, "tokenizer", TOKENIZER)
        self.processor = part_of_folder(who, AutoProcessor, path, "preprocessor", PREPROCESSOR)
        network = network_of_folder(who, AutoModelForZeroShotObjectDetection, path, config, "an open-vocabulary detector")
        self.patcher = managed(network.float())

    @torch.no_grad()
    def find(self, picture: Tensor, name: str, least: float = LEAST) -> tuple[Box, float] | None:
        """The surest box of ``name`` in ``[h, w, 3]`` and how sure it is, between 0 and 1; None when nothing reaches ``least``."""
        network, device = ready(self.patcher)
        height, width = picture.shape[:2]
        # Grounding DINO reads a text of sentences, the OWLs a list of queries for every picture.
        query = f"{name.lower()}." if "dino" in self.kind else [[f"a photo of a {name.lower()}"]]
        array = (picture[..., :3].float().clamp(0, 1).cpu() * 255).round().to(torch.uint8).numpy()
        inputs = self.processor(images=array, text=query, return_tensors="pt").to(device)
        found = network(**inputs)
        sure, best = found.logits[0].float().sigmoid().amax(dim=-1).max(dim=0)
        if sure < least:
            return None
        x, y, w, h = found.pred_boxes[0, best].float().tolist()
        across, down = (
            (max(width, height),) * 2 if self.kind == "owlv2" else (width, height)
        )  # OWLv2 fills pictures up to a square
        box = within(((x - w / 2) * across, (y - h / 2) * down, (x + w / 2) * across, (y + h / 2) * down), height, width)
        return None if box is None else (box, float(sure))
