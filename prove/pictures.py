"""Judges of pictures without a text: how far one is from plain's, and how far many are from a folder of others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..scoring.folders import digest
from ..scoring.scorers import ClipScorer
from .judge import Between, OfMany

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class Distance(Between):
    """One minus the cosine of two pictures' vectors in a CLIP or SigLIP: in place of LPIPS, whose weights are not to be had as safetensors."""

    def __init__(self, name: str, folder: str):
        self.name, self.scorer = name, ClipScorer(folder)
        self.key = f"distance {self.scorer.key}"

    def apart(self, one: Tensor, other: Tensor) -> float:
        both = self.scorer.features(one), self.scorer.features(other)
        return float(1 - (both[0] * both[1]).sum())


class Frechet(OfMany):
    """The Fréchet distance between pictures and those of a folder, on a CLIP's vectors (arXiv 2203.06026), where FID has Inception's.

    Raises:
        ValueError: for a folder that is not there or has fewer than two pictures.
    """

    def __init__(self, name: str, folder: str, pictures: str):
        self.name, self.scorer, place = name, ClipScorer(folder), Path(pictures)
        files = sorted(f for f in place.rglob("*") if f.suffix.lower() in PICTURES) if pictures and place.is_dir() else []
        if len(files) < 2:
            raise ValueError(
                f"“{pictures}” is no folder with pictures; write “frechet: model folder, folder of real pictures”."
            )
        self.key = digest(files, "frechet", self.scorer.key)
        self.files = files
        self.known: tuple[Tensor, Tensor] | None = None

    def of(self, pictures: Iterable[Tensor]) -> float:
        if self.known is None:
            self.known = moments(torch.cat([self.scorer.features(p) for p in _opened(self.files)]))
        return frechet(moments(torch.cat([self.scorer.features(p) for p in pictures])), self.known)


def _opened(files: Iterable[Path]) -> Iterator[Tensor]:
    for path in files:
        with Image.open(path) as picture:
            yield torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)[None]


def moments(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[D]`` and covariance ``[D, D]`` of vectors ``[N, D]``, in float64."""
    wide = vectors.double()
    return wide.mean(0), torch.cov(wide.T).reshape(wide.shape[1], wide.shape[1])


def frechet(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """``|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^{1/2})`` of two normal distributions (arXiv 1706.08500)."""
    (m1, c1), (m2, c2) = one, other
    root = _root(c1)  # (Σ₁Σ₂)^{1/2} has the trace of (Σ₁^{1/2} Σ₂ Σ₁^{1/2})^{1/2}
    middle = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * middle)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
