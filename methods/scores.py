"""Scores of pictures from vectors of a dual encoder: CLIP-T, CLIP-IQA, preference, diversity, and the style composition score.

Every score is a plain number as its paper prints it: CLIP-T is the cosine itself (0.3, not 30).

Sources: CLIP, arXiv 2103.00020; CLIP-IQA, arXiv 2207.12396; PickScore, arXiv 2305.01569; ImageReward, arXiv 2304.05977; style
composition benchmark, arXiv 2507.17853.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PAIR = ("Good photo.", "Bad photo.")  # CLIP-IQA's, for quality
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


def cosines(pictures: Tensor, texts: Tensor) -> Tensor:
    """Cosines of unit vectors ``[B, D]`` and ``[T, D]``: ``[B, T]``."""
    return pictures @ texts.T


def clip_iqa(found: Tensor, scale: float) -> Tensor:
    """The share of the first of two antonyms: cosines ``[B, 2]`` to ``softmax(scale · cosines)[:, 0]``, ``[B]`` in (0, 1)."""
    return (scale * found).softmax(dim=-1)[:, 0]


def preference(pictures: Tensor, texts: Tensor, scale: float) -> Tensor:
    """PickScore: ``scale · cosine`` of unit vectors, ``[B, D]`` and ``[T, D]`` to ``[B, T]``."""
    return scale * cosines(pictures, texts)


def diversity(pictures: Tensor) -> float:
    """The mean of ``1 − cosine`` over all pairs of unit vectors ``[B, D]``, B of 2 or more.

    The sum over all pairs is that of the whole Gram matrix without its diagonal, ``‖Σ v‖² − B``.
    """
    count = len(pictures)
    if count < 2:
        raise ValueError("Diversity compares pictures with each other: give it two or more, with different seeds.")
    vectors = pictures.double()
    together = vectors.sum(dim=0).square().sum() - vectors.square().sum()
    return float(1 - together / (count * (count - 1)))


@dataclass(frozen=True)
class Head:
    """Linear layers from vectors to one number, as ImageReward and the LAION aesthetic predictor have them on top.

    Attributes:
        layers: weights ``[out, in]`` and biases ``[out]``, in order.
        activation: between layers; theirs is none.
        mean, std: what rewards are centred and divided by.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    activation: str = "none"
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Head:
        """From tensors named ``…layers.<n>.weight`` and ``.bias``, and metadata ``activation``, ``mean`` and ``std``.

        Raises:
            ValueError: when they are no chain of layers down to one number.
        """
        numbered: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            match = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(weight|bias)", name)
            if match is None:
                raise ValueError(f"it has a tensor “{name}”, and only layers.<number>.weight and .bias are known")
            numbered.setdefault(int(match[1]), {})[match[2]] = tensor
        parts = [numbered[n] for n in sorted(numbered)]
        if not parts or any(set(p) != {"weight", "bias"} or p["weight"].ndim != 2 for p in parts):
            raise ValueError("every layer needs a weight and a bias")
        layers = tuple((p["weight"], p["bias"]) for p in parts)
        if any(a[0].shape[0] != b[0].shape[1] for a, b in itertools.pairwise(layers)) or len(layers[-1][0]) != 1:
            raise ValueError("the layers do not lead from one to the next, down to one number")
        activation = metadata.get("activation", "none")
        if activation not in ACTIVATIONS:
            raise ValueError(f"its activation “{activation}” is none of {', '.join(ACTIVATIONS)}")
        return cls(layers, activation, float(metadata.get("mean", 0)), float(metadata.get("std", 1)))

    def rewards(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """Unit vectors ``[B, D]`` and ``[T, D]`` to ``[B, T]``; a head on pictures alone gives every text the same.

        Raises:
            ValueError: when the head is for vectors of another size.
        """
        width, size = self.layers[0][0].shape[1], pictures.shape[1]
        if width == 2 * size:
            both = (len(pictures), len(texts), size)
            x = torch.cat([pictures[:, None].expand(both), texts[None].expand(both)], dim=-1)
        elif width == size:
            x = pictures[:, None]
        else:
            raise ValueError(
                f"The head takes vectors of {width}, and this encoder's have {size}: it belongs to another encoder."
            )
        for n, (weight, bias) in enumerate(self.layers):
            x = F.linear(x if n == 0 else ACTIVATIONS[self.activation](x), weight, bias)
        return ((x[..., 0] - self.mean) / self.std).expand(len(pictures), len(texts))


Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, the last two outside


def around(mask: Tensor, level: float = 0.5) -> Box | None:
    """The smallest box around what is above ``level`` in a mask ``[h, w]``; None where nothing is."""
    rows, columns = (mask > level).nonzero(as_tuple=True)
    if not len(rows):
        return None
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def within(box: Sequence[float], height: int, width: int) -> Box | None:
    """A box in whole pixels inside the picture; None when less than two pixels a side are left."""
    left, top = max(int(box[0]), 0), max(int(box[1]), 0)
    right, bottom = min(int(-(-box[2] // 1)), width), min(int(-(-box[3] // 1)), height)
    return (left, top, right, bottom) if right - left >= 2 and bottom - top >= 2 else None


def crop(picture: Tensor, box: Box | None) -> Tensor:
    """The part of ``[h, w, C]`` in a box; all of it without one."""
    if box is None:
        return picture
    left, top, right, bottom = box
    return picture[top:bottom, left:right]
