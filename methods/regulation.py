"""Attention Regulation: the attention of chosen words is raised to where an object can form, with the smallest edit that does it.

Source: "Enhancing Semantic Fidelity in Text-to-Image Synthesis: Attention Regulation in Diffusion Models" (arXiv 2403.06381). Every
head of every picture gets an additive edit ``S`` of its scaled logits on the columns of the target words, the one that minimises
(eq. 8 and 9)

    ``L = mean_t (φ(A'_t) − 0.9)² + α·mean_t (mean_p A'_tp − μ)² + β·‖A' − A‖``,  φ the 90 % quantile over pixels,  μ = min(0.2, 1/T).

The optimum is averaged over the steps and fades as they go by (eq. 14 and 15); the columns of the start and end token keep the
weights that they had.

Nothing here needs more of a map than the target columns: with ``S`` on these alone, ``a'_j = a_j·e^{S_j}/Z``,
``Z = 1 + Σ_T a_j (e^{S_j} − 1)``, and every other column is divided by ``Z``.

Shapes: ``T`` target columns, ``B`` maps (rows × heads, each regulated by itself, as in the released code), ``M = h·w`` pixels. Maps
and edits are ``[T, B, M]``, targets first: so a softmax over them leaves pieces in one block, and no step of the solver copies.

Where the paper and the released code differ:

- mass: the paper's sum over pixels against ``μM`` is the code's mean against ``μ``. The weight ``α = 80`` is the code's, so the mean is
  meant here; in the paper's units it would be ``80/M²``.
- deviation: the paper has ``β·‖A' − A‖₂`` (``β = 0.1``), the code ``0.09·mean θ²`` in its stead. Here it is the paper's, over the target
  columns: what these gain is what all others lose.
- scale: the paper adds ``S`` to ``QKᵀ`` and divides by ``√d``, the code adds it to the scaled logits. So it is here.
- bumps: the paper counts pixels from 1 and has ``r = w/2σ = 8`` bumps along a side (so here), the code counts from 0 and has 7. Its ``σ``
  is a whole number, 0 for maps under 16 pixels; here it is ``w/16`` for every size and for each side.
- average: the paper's is a running one (so here, from the first optimum on), and of maps. The code averages edits ``S`` (so here,
  else what fades would be the map), of this step and the one before, and the first one with its random start.
- best iterate: the code keeps the one with the least sum over all maps; here every map keeps its own, so that a picture does not
  depend on what else is in the batch.

The published optimiser (`published`) is plain gradient descent with huge steps, which bounces about and stalls where a weight is near 0
or 1. `solve` is mirror descent for the same objective: the slope by ``A'`` itself, not through the softmax, in steps of a set size that
get smaller. One such pass does more than two published iterations, so half as many are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHARE = LEVEL = 0.9  # the quantile of a target's map, and what it should be
AREA = 0.2  # of the picture that one target should have
BUMPS = 8  # along a side
RATE = 100.0  # of the published gradient descent, for a single map
FIRST, LAST = 5.0, 0.2  # largest change of an edit in the solver's first and last pass
LIMIT = 60.0  # of an edit: beyond it nothing changes, and its power overflows
FLOOR = 1e-12  # a weight's, so that its logarithm is finite


@dataclass(frozen=True)
class Problem:
    """What is the same for all maps of one size, made once.

    Attributes:
        grid: ``(h, w)``.
        targets: ``T``.
        mass_weight, deviation_weight: ``α`` and ``β``.
        down, across: bumps along the height and the width, ``[h, 8]`` and ``[w, 8]``.
        both_down, both_across: the bumps times their transpose, ``[h, h]`` and ``[w, w]``: what a slope by ``θ`` does to ``S``.
        mean: ``[M, 1]``, turns a map into ``2α/T · mean/M``.
        wanted: ``[1]``, ``−2α/T · μ/M``.
        pair: ``[2, 2]``, turns the two weights next to the quantile into ``2/T · φ`` shared out to them.
        level: ``[2]``, ``−2/T · 0.9`` shared out likewise.
    """

    grid: tuple[int, int]
    targets: int
    mass_weight: float
    deviation_weight: float
    down: Tensor
    across: Tensor
    both_down: Tensor
    both_across: Tensor
    mean: Tensor
    wanted: Tensor
    pair: Tensor
    level: Tensor


def area(targets: int) -> float:
    """``μ``: the mean weight that every target should have."""
    return min(AREA, 1 / targets)


def problem(
    grid: tuple[int, int], targets: int, mass_weight: float = 80.0, deviation_weight: float = 0.1, like: Tensor | None = None
) -> Problem:
    """The constants for maps of ``grid`` with ``targets`` columns, on the device and in the dtype of ``like``."""
    like = torch.empty(0) if like is None else like
    down, across = (bumps(size, like) for size in grid)
    pixels = grid[0] * grid[1]
    shares = like.new_tensor(_shares(pixels))
    return Problem(
        grid,
        targets,
        mass_weight,
        deviation_weight,
        down,
        across,
        down @ down.T,
        across @ across.T,
        like.new_full((pixels, 1), 2 * mass_weight / (targets * pixels**2)),
        like.new_full((1,), -2 * mass_weight * area(targets) / (targets * pixels)),
        2 / targets * shares[:, None] * shares,
        -2 / targets * LEVEL * shares,
    )


def bumps(size: int, like: Tensor) -> Tensor:
    """One side of the Gaussians of eq. 12: ``exp(−(i − 2σp)²/2σ²)`` for pixels ``i = 1..size`` and ``p = 1..8``, ``[size, 8]``.

    The bump of eq. 11 at ``(p, q)`` is the outer product of two columns, so it never has to be formed.
    """
    sigma = size / (2 * BUMPS)
    pixels = torch.arange(1, size + 1, device=like.device, dtype=like.dtype)
    centres = torch.arange(1, BUMPS + 1, device=like.device, dtype=like.dtype) * (2 * sigma)
    return torch.exp(-((pixels[:, None] - centres) ** 2) / (2 * sigma**2))


def additive(theta: Tensor, p: Problem) -> Tensor:
    """Eq. 11: ``S = Σ_pq θ_pq G(2σp, 2σq, σ) = G_h θ G_wᵀ``, ``[..., 8, 8]`` to ``[..., M]``."""
    return (p.down @ theta @ p.across.T).flatten(-2)


def start(targets: int, maps: int, seed: int, like: Tensor) -> Tensor:
    """Where the optimiser begins: ``θ ~ U(0, 1)``, ``[T, maps, 8, 8]``, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(targets, maps, BUMPS, BUMPS, generator=generator).to(like, non_blocking=like.is_cuda)


# --- the edited map ---------------------------------------------------------------------------------------------------


def regulated(old: Tensor, edit: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 10 on the target columns only: ``A' = softmax(logits + S)``.

    Args:
        old: weights ``a`` of the target columns, ``[T, ..., M]``.
        edit: ``S``, broadcastable to it.

    Returns:
        ``a' = a·e^S/Z`` and the factor ``1/Z [..., M]`` on every other column: rows sum to one as before.
    """
    raised = old * edit.clamp(-LIMIT, LIMIT).exp_()
    others = (1 - old.sum(dim=0)).clamp_min_(FLOOR)
    factor = (raised.sum(dim=0) + others).reciprocal_()
    return raised * factor, factor


def logits(old: Tensor) -> Tensor:
    """Logarithms of the target columns' weights and of all others' together: ``[T, B, M]`` to ``[T + 1, B, M]``.

    A softmax over them gives the weights back, and after ``S`` is added to the first ``T``, the regulated ones.
    """
    rest = 1 - old.sum(dim=0, keepdim=True)
    return torch.cat([old, rest]).clamp_min_(FLOOR).log_()


# --- the objective ----------------------------------------------------------------------------------------------------


def _shares(pixels: int) -> tuple[float, ...]:
    """How the quantile is shared between the sorted weights above and below it, in that order."""
    place = SHARE * (pixels - 1)
    above = place - int(place)
    return (above, 1 - above) if pixels > 1 else (0.5, 0.5)


def _around(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The weights next to the quantile, above and below, ``[..., 2]``, and their pixels. (A map of one pixel has that one twice.)"""
    pixels = maps.shape[-1]
    values, places = maps.topk(pixels - int(SHARE * (pixels - 1)), dim=-1)
    if pixels == 1:
        return values.expand(*values.shape[:-1], 2), places.expand(*places.shape[:-1], 2)
    return values[..., -2:], places[..., -2:]


def quantile(maps: Tensor) -> Tensor:
    """``φ``: the 90 % quantile over pixels, linear between the two weights next to it; ``[..., M]`` to ``[...]``."""
    values, _ = _around(maps)
    return torch.lerp(values[..., 1], values[..., 0], _shares(maps.shape[-1])[0])


def objective(new: Tensor, old: Tensor, p: Problem) -> Tensor:
    """``L`` of every map (eq. 8 and 9): ``new [..., T, B, M]`` and ``old [T, B, M]`` to ``[..., B]``."""
    short, mass = quantile(new) - LEVEL, new.mean(dim=-1) - area(new.shape[-3])
    missed = torch.addcmul(short * short, mass, mass, value=p.mass_weight).mean(dim=-2)
    return torch.add(missed, torch.linalg.vector_norm(new - old, dim=(-3, -1)), alpha=p.deviation_weight)


def gradient(new: Tensor, old: Tensor, p: Problem) -> Tensor:
    """``∂L/∂A'`` of every map, ``[T, B, M]``: constant over a target's pixels, but for the deviation and the two at the quantile."""
    changed = new - old
    size = torch.linalg.vector_norm(changed, dim=(0, 2), keepdim=True).clamp_min_(FLOOR)
    mass = torch.addmm(p.wanted, new.flatten(0, 1), p.mean).view(*new.shape[:2], 1)
    slope = torch.addcdiv(mass, changed, size, value=p.deviation_weight)
    values, places = _around(new)
    return slope.scatter_add_(-1, places, torch.addmm(p.level, values.flatten(0, 1), p.pair).view(places.shape))


def gradient_theta(new: Tensor, old: Tensor, p: Problem) -> Tensor:
    """``∂L/∂θ [T, B, 8, 8]``: through the softmax, ``∂L/∂S_t = A'_t (g_t − Σ_u A'_u g_u)``, and the bumps, ``G_hᵀ (∂L/∂S) G_w``."""
    weighted = new * gradient(new, old, p)
    slope = weighted - new * weighted.sum(dim=0)
    return p.down.T @ slope.unflatten(-1, p.grid) @ p.across


# --- the optimisers ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def solve(old: Tensor, theta: Tensor, p: Problem, iterations: int = 20) -> Tensor:
    """The edit ``S [T, B, M]`` of every map that lowers its objective most.

    Mirror descent: the logits of a softmax follow the slope by its weights, ``S ← S − η·GGᵀ ∂L/∂A'``, where the bumps keep the edit
    smooth; each target's largest change is set, and gets smaller from pass to pass.

    Args:
        old: ``[T, B, M]``.
        theta: the start ``[T, B, 8, 8]``.
        iterations: of the published procedure; half as many passes are made (see the top of this file).
    """
    targets, maps, _ = old.shape
    height, width = p.grid
    passes = -(-iterations // 2)
    before = logits(old)
    trail = torch.empty((passes + 1, *before.shape), device=old.device, dtype=old.dtype)  # every pass's logits
    trail[:, targets] = before[targets]
    torch.add(before[:targets], additive(theta, p), out=trail[0, :targets])
    down = p.both_down.expand(targets * maps, height, height)
    for n in range(passes):
        step = FIRST * (LAST / FIRST) ** (n / max(passes - 1, 1))
        slope = gradient(trail[n].softmax(dim=0)[:targets], old, p)
        slope = down @ (slope.view(-1, width) @ p.both_across).view(-1, height, width)
        slope = slope.view(old.shape)
        largest = torch.linalg.vector_norm(slope, torch.inf, dim=-1, keepdim=True)
        torch.addcdiv(trail[n, :targets], slope, largest, value=-step, out=trail[n + 1, :targets])
    best = objective(trail.softmax(dim=1)[:, :targets], old, p).argmin(dim=0)
    return torch.take_along_dim(trail[:, :targets], best[None, None, :, None], dim=0)[0] - before[:targets]


def published(old: Tensor, theta: Tensor, p: Problem, iterations: int = 20) -> Tensor:
    """The same by the published procedure (eq. 13): plain gradient descent on ``θ``, and the best iterate. For comparison.

    The released rate is 100 × maps for the mean over maps, which is 100 for each.
    """
    least = torch.full(old.shape[1:2], torch.inf, device=old.device, dtype=old.dtype)
    best = torch.zeros_like(old)
    for _ in range(iterations):
        edit = additive(theta, p)
        new, _ = regulated(old, edit)
        loss = objective(new, old, p)
        best = torch.where((loss < least)[:, None], edit, best)
        least = torch.minimum(loss, least)
        theta = theta - RATE * gradient_theta(new, old, p)
    return best


# --- over the steps ---------------------------------------------------------------------------------------------------


def average(before: Tensor | None, best: Tensor, kappa: float) -> Tensor:
    """Eq. 14, on edits: ``S_EMA ← κ·S_EMA + (1 − κ)·S*``; the first optimum is its own average."""
    return best if before is None else best.lerp(before, kappa)


def fading(step: int, rate: float) -> float:
    """Eq. 15: ``λ^t`` for sampling step ``t``, the first is 0."""
    return rate**step


def shape(weights: Tensor, targets: Tensor) -> Tensor:
    """The target columns ``[T]`` of attention weights ``[R, H, M, columns]`` as ``[T, R, H, M]``, in one block."""
    return weights.index_select(-1, targets).permute(3, 0, 1, 2).contiguous()
