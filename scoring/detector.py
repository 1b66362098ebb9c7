"""Parts of a picture found by their names: open-vocabulary detectors of transformers, from a local folder."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..methods.scores import Box, within
from .folders import DETECTORS, PREPROCESSOR, TOKENIZER, model_folder, network_of_folder, part_of_folder
from .scorers import managed, ready

LEAST = 0.05  # a box below this confidence is no find
MOST = 16  # things of a name that are looked for


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

    def find(self, picture: Tensor, name: str, least: float = LEAST) -> tuple[Box, float] | None:
        """The surest box of ``name`` in ``[h, w, 3]`` and how sure it is, between 0 and 1; None when nothing reaches ``least``."""
        return next(self._boxes(picture, name, least), None)

    def find_all(self, picture: Tensor, name: str, least: float, overlap: float, most: int = MOST) -> list[tuple[Box, float]]:
        """Every box of ``name``, surest first, without those that share ``overlap`` of their union with a surer one."""
        found: list[tuple[Box, float]] = []
        for box, sure in self._boxes(picture, name, least):
            if all(shared(box, other) < overlap for other, _ in found):
                found.append((box, sure))
                if len(found) == most:
                    break
        return found

    @torch.no_grad()
    def _boxes(self, picture: Tensor, name: str, least: float) -> Iterator[tuple[Box, float]]:
        network, device = ready(self.patcher)
        height, width = picture.shape[:2]
        # Grounding DINO reads a text of sentences, the OWLs a list of queries for every picture.
        query = f"{name.lower()}." if "dino" in self.kind else [[f"a photo of a {name.lower()}"]]
        array = (picture[..., :3].float().clamp(0, 1).cpu() * 255).round().to(torch.uint8).numpy()
        inputs = self.processor(images=array, text=query, return_tensors="pt").to(device)
        found = network(**inputs)
        # OWLv2 fills pictures up to a square
        across, down = (max(width, height),) * 2 if self.kind == "owlv2" else (width, height)
        order = found.logits[0].float().sigmoid().amax(dim=-1).sort(descending=True)
        boxes = found.pred_boxes[0].float()[order.indices].tolist()
        for sure, (x, y, w, h) in zip(order.values.tolist(), boxes, strict=True):
            if sure < least:
                return
            corners = ((x - w / 2) * across, (y - h / 2) * down, (x + w / 2) * across, (y + h / 2) * down)
            if (box := within(corners, height, width)) is not None:
                yield box, sure


def shared(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    across, down = (max(0, min(one[k + 2], other[k + 2]) - max(one[k], other[k])) for k in (0, 1))
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return across * down / (sum(areas) - across * down)
