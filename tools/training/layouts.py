"""What is where, as a help in training: it makes a net look words up early."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...demo import world


class LayoutReading(nn.Module):
    """What is where, read from the denoiser's own features: a help in training that does not ship.

    Two linear maps, from 8x8 and from 16x16 features, name the noun, colour and pattern at each latent pixel. They make
    the denoiser look words up early; its own objective alone finds that out ten times more slowly.
    """

    CLASSES = (len(world.NOUNS) + 1, len(world.COLOURS) + len(world.BACKGROUNDS), len(world.PATTERNS))

    def __init__(self, coarse: int = 128, fine: int = 64):
        super().__init__()
        self.coarse, self.fine = nn.Conv2d(coarse, 4 * sum(self.CLASSES), 1), nn.Conv2d(fine, sum(self.CLASSES), 1)

    def forward(self, coarse: Tensor, fine: Tensor, truth: Tensor) -> Tensor:
        """Mean cross-entropy against ``truth [B, 3, 16, 16]`` (class numbers, -100 where a cell is mixed)."""
        losses = [
            F.cross_entropy(part.float(), truth[:, i], ignore_index=-100)
            for read in (F.pixel_shuffle(self.coarse(coarse), 2), self.fine(fine))
            for i, part in enumerate(read.split(self.CLASSES, dim=1))
        ]
        return torch.stack(losses).mean()

    @staticmethod
    def truth(scenes: list[world.Scene]) -> tuple[Tensor, Tensor]:
        """Layouts ``int8 [N, 16, 16]`` and, for background and things, their classes ``int16 [N, 5, 3]`` (last: mixed)."""
        layouts = torch.from_numpy(np.stack([world.layout(s) for s in scenes]))
        colours, patterns = [*world.COLOURS, *world.BACKGROUNDS], world.PATTERNS
        table = torch.full((len(scenes), 5, 3), -100, dtype=torch.int16)
        for row, s in zip(table, scenes, strict=True):
            named = [(len(world.NOUNS), colours.index(s.background), patterns.index(s.background_pattern))]
            named += [(world.NOUNS.index(t.noun), colours.index(t.colour), patterns.index(t.pattern)) for t in s.things]
            row[: len(named)] = torch.tensor(named)
        return layouts, table
