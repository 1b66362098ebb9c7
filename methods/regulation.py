"""Attention Regulation: the attention of chosen words is raised to where an object can form, with the smallest edit that does it.

Source: "Enhancing Semantic Fidelity in Text-to-Image Synthesis: Attention Regulation in Diffusion Models" (arXiv 2403.06381). Every
head of every picture gets an additive edit ``S`` of its scaled logits on the columns of the target words, the one that minimises
(eq. 8 and 9)

    ``L = mean_t (φ(A'_t) − 0.9)² + α·mean_t (mean_p A'_tp − μ)² + β·‖A' − A‖₂/√M``,  φ the 90 % quantile over pixels,  μ = min(0.2, 1/T).

The optimum is averaged over the steps and fades as they go by (eq. 14 and 15); the columns of the start and end token keep the
weights that they had.

Nothing here needs more of a map than the target columns: all others together are one more, whose logit stays (eq. 10 is a softmax over
these ``T + 1``), and every other column is divided by the same.

Shapes: ``T`` target columns, ``B`` maps (rows × heads, each regulated by itself, as in the released code), ``M = h·w`` pixels. Maps
are ``[T, B, M]``, targets first: so a softmax over them leaves pieces in one block, and no step of the solver copies. Weights, logits
and edits of a whole map are ``[T + 1, B, M]``; the last row is that of all other columns, and its edit is 0.

Where the paper and the released code differ:

- mass: the paper's sum over pixels against ``μM`` is the code's mean against ``μ``. The weight ``α = 80`` is the code's, so the mean is
  meant here; in the paper's units it would be ``80/M²``.
- deviation: the paper has ``β·‖A' − A‖₂`` (``β = 0.1``), which grows with the pixels, so that on large maps next to nothing is edited; the
  code has ``0.09·mean θ²`` in its stead. Here it is the paper's per pixel, so that ``β`` means the same at every size, over the target columns:
  what these gain is what all others lose. The code's is ``released``, with its optimiser.
- scale: the paper adds ``S`` to ``QKᵀ`` and divides by ``√d``, the code adds it to the scaled logits. So it is here.
- bumps: the paper counts pixels from 1 and has ``r = w/2σ = 8`` bumps along a side (so here), the code counts from 0 and has 7. Its ``σ``
  is a whole number, 0 for maps under 16 pixels; here it is ``w/16`` for every size and for each side.
- average: the paper's is a running one (so here, from the first optimum on), and of maps. The code averages edits ``S`` (so here,
  else what fades would be the map), of this step and the one before, and the first one with its random start.
- best iterate: the code keeps the one with the least sum over all maps; `published` keeps every map's own, so that a picture does not
  depend on what else is in the batch.

The published optimiser (`published`) is plain gradient descent with huge steps, which bounces about and stalls where a weight is near 0
or 1. `solve` is mirror descent: the slope by ``A'`` itself, not through the softmax, in steps of a set size that get smaller. Three such
passes do more than five published iterations, and the last needs no comparison with those before. Maps change little from step to step: from
the second step on, one pass from the running average reaches nearly what a search from the start does, at a fifth of its launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHARE = LEVEL = 0.9  # the quantile of a target's map, and what it should be
AREA = 0.2  # of the picture that one target should have
BUMPS = 8  # along a side
RATE = 100.0  # of the published gradient descent, for a single map
FIRST, LAST = 8.0, 0.2  # largest change of an edit in the solver's first and last pass
AGAIN = 1.5, 0.5  # likewise where it goes on from the step before
ITERATIONS = 20  # of the paper; `solve` makes three passes for five of them, and one for all where it goes on
FLOOR = 1e-12  # a weight's, so that its logarithm is finite
TINY = 1e-6  # change of a weight, so that a map that does not change has a direction


@dataclass(frozen=True)
class Problem:
    """What is the same for all maps of one size, made once.

    Attributes:
        grid: ``(h, w)``.
        targets: ``T``.
        mass_weight, deviation_weight: ``α`` and ``β``.
        released: the deviation is ``β·mean θ²``, as in the released code (there ``β = 0.09``).
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
    released: bool
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
    grid: tuple[int, int],
    targets: int,
    mass_weight: float = 80.0,
    deviation_weight: float = 0.1,
    like: Tensor | None = None,
    released: bool = False,
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
        released,
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
    """Eq. 11: ``S = Σ_pq θ_pq G(2σp, 2σq, σ) = G_h θ G_wᵀ``, ``[T, B, 8, 8]`` to ``[T + 1, B, M]``."""
    return torch.constant_pad_nd((p.down @ theta @ p.across.T).flatten(-2), (0, 0, 0, 0, 0, 1))


def start(targets: int, maps: int, seed: int, like: Tensor) -> Tensor:
    """Where the optimiser begins: ``θ ~ U(0, 1)``, ``[T, maps, 8, 8]``, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(targets, maps, BUMPS, BUMPS, generator=generator).to(like, non_blocking=like.is_cuda)


# --- the edited map ---------------------------------------------------------------------------------------------------


def with_others(weights: Tensor, targets: Tensor) -> Tensor:
    """Attention weights ``[R, H, M, columns]`` as ``[T + 1, R, H, M]``: those of the targets' columns ``[T]``, and of all others together.

    None is 0, so that logarithms are finite.
    """
    old = weights.permute(3, 0, 1, 2).index_select(0, targets)
    return torch.cat([old, 1 - old.sum(dim=0, keepdim=True)]).clamp_min_(FLOOR)


def regulated(before: Tensor, edit: Tensor, scale: float = 1.0) -> Tensor:
    """Eq. 10: ``A' = softmax(logits + scale·S)``, all ``[T + 1, ..., M]``, ``before`` the logarithms of the weights.

    What the last row has become, over what it was, is the factor on every other column: rows sum to one as before.
    """
    return torch.add(before, edit, alpha=scale).softmax(dim=0)


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


def objective(new: Tensor, old: Tensor, p: Problem, theta: Tensor | None = None) -> Tensor:
    """``L`` of every map (eq. 8 and 9): ``new``, ``old [T, B, M]`` to ``[B]``; ``released`` needs ``theta [T, B, 8, 8]``."""
    short, mass = quantile(new) - LEVEL, new.mean(dim=-1) - area(len(new))
    missed = torch.addcmul(short * short, mass, mass, value=p.mass_weight).mean(dim=0)
    if p.released:
        assert theta is not None
        return torch.add(missed, theta.square().mean(dim=(0, 2, 3)), alpha=p.deviation_weight)
    deviation = torch.linalg.vector_norm(new - old, dim=(0, 2))
    return torch.add(missed, deviation, alpha=p.deviation_weight / new.shape[-1] ** 0.5)


def gradient(new: Tensor, old: Tensor, p: Problem) -> Tensor:
    """``∂L/∂A'`` of every map, ``[T, B, M]``: constant over a target's pixels, but for the deviation and the two at the quantile.

    Args:
        new, old: ``[T, B, M]``; a map of which nothing has changed has no direction.
    """
    slope = torch.addmm(p.wanted, new.flatten(0, 1), p.mean).view(*new.shape[:2], 1)
    if p.released:
        slope = slope.expand_as(new).contiguous()
    else:
        changed = new - old
        size = torch.linalg.vector_norm(changed, dim=(0, 2), keepdim=True)
        slope = torch.addcdiv(slope, changed, size, value=p.deviation_weight / new.shape[-1] ** 0.5)
    values, places = _around(new)
    return slope.scatter_add_(-1, places, torch.addmm(p.level, values.flatten(0, 1), p.pair).view(places.shape))


def gradient_theta(new: Tensor, old: Tensor, theta: Tensor, p: Problem) -> Tensor:
    """``∂L/∂θ [T, B, 8, 8]``: through the softmax, ``∂L/∂S_t = A'_t (g_t − Σ_u A'_u g_u)``, and the bumps, ``G_hᵀ (∂L/∂S) G_w``."""
    weighted = new * gradient(new, old, p)
    slope = weighted - new * weighted.sum(dim=0)
    out = p.down.T @ slope.unflatten(-1, p.grid) @ p.across
    if p.released:
        out = torch.add(out, theta, alpha=2 * p.deviation_weight / (len(theta) * BUMPS**2))
    return out


# --- the optimisers ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def solve(weights: Tensor, start: Tensor, p: Problem, iterations: int = ITERATIONS, again: bool = False) -> Tensor:
    """An edit ``S [T + 1, B, M]`` that lowers every map's objective.

    Mirror descent: the logits of a softmax follow the slope by its weights, ``S ← S − η·GGᵀ ∂L/∂A'``, where the bumps keep the edit
    smooth; each target's largest change is set, and gets smaller from pass to pass.

    Args:
        weights: ``[T + 1, B, M]`` (`with_others`).
        start: the edit to begin with.
        iterations: of the published procedure; three passes do what five of them do.
        again: go on from the step before, with one pass for twenty of them.
    """
    targets, (height, width) = len(weights) - 1, p.grid
    passes = max(1, iterations // ITERATIONS) if again else -(-3 * iterations // 5)
    first, last = AGAIN if again else (FIRST, LAST)
    before = weights.log()
    moved = before + start
    known = weights[:targets] - TINY
    down = p.both_down.expand(targets * weights.shape[1], height, height)
    for n in range(passes):
        step = first * (last / first) ** (n / max(passes - 1, 1))
        slope = gradient(moved.softmax(dim=0)[:targets], known, p)
        slope = (down @ (slope.view(-1, width) @ p.both_across).view(-1, height, width)).view(known.shape)
        largest = torch.linalg.vector_norm(slope, torch.inf, dim=-1, keepdim=True)
        moved[:targets].addcdiv_(slope, largest, value=-step)
    return moved.sub_(before)


@torch.no_grad()
def published(weights: Tensor, theta: Tensor, p: Problem, iterations: int = ITERATIONS) -> Tensor:
    """The same by the published procedure (eq. 13): plain gradient descent on ``θ``, and the best iterate.

    The released rate is 100 × maps for the mean over maps, which is 100 for each.
    """
    before, old = weights.log(), weights[:-1]
    least = torch.full(weights.shape[1:2], torch.inf, device=weights.device, dtype=weights.dtype)
    best = torch.zeros_like(weights)
    for _ in range(iterations):
        edit = additive(theta, p)
        new = regulated(before, edit)[:-1]
        loss = objective(new, old, p, theta)
        best = torch.where((loss < least)[:, None], edit, best)
        least = torch.minimum(loss, least)
        theta = theta - RATE * gradient_theta(new, old, theta, p)
    return best


# --- over the steps ---------------------------------------------------------------------------------------------------


def average(before: Tensor | None, best: Tensor, kappa: float) -> Tensor:
    """Eq. 14, on edits: ``S_EMA ← κ·S_EMA + (1 − κ)·S*``; the first optimum is its own average."""
    return best if before is None else best.lerp(before, kappa)


def fading(step: int, rate: float) -> float:
    """Eq. 15: ``λ^t`` for sampling step ``t``, the first is 0."""
    return rate**step
