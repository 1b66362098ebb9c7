"""Refined attention against loops, pixel by pixel."""

import math

import pytest
import torch

from attune.methods import refine as maths


def slow_smooth(picture, sigma):
    """Of a ``[h, w]`` map, pixel by pixel."""
    if sigma == 0:
        return picture
    reach = math.ceil(3 * sigma)
    height, width = picture.shape
    bell = [math.exp(-(k * k) / (2 * sigma * sigma)) for k in range(-reach, reach + 1)]
    out = torch.zeros_like(picture)
    for y in range(height):
        for x in range(width):
            for i, a in enumerate(bell):
                for j, b in enumerate(bell):
                    row, column = min(max(y + i - reach, 0), height - 1), min(max(x + j - reach, 0), width - 1)
                    out[y, x] += a * b / sum(bell) ** 2 * picture[row, column]
    return out


def slow_refine(weights, targets, grid, rounds, keep, sigma):
    """All of one map ``[M, N]``, whose rows sum to one."""
    for _ in range(rounds):
        weights = weights.clone()
        for column in targets:
            own = weights[:, column].clone()
            peak = max(float(w) for w in own)
            own[own < keep * peak] = 0
            weights[:, column] = slow_smooth(own.view(*grid), sigma).flatten()
        weights = weights / weights.sum(1, keepdim=True)
    return weights


def random_map(pixels, tokens, maps=3, seed=0):
    """Softmaxed ``[maps, M, N]``."""
    return (2 * torch.randn(maps, pixels, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(
        -1
    )


@pytest.mark.parametrize("grid", [(6, 5), (3, 8), (2, 2), (1, 7), (1, 1)])
@pytest.mark.parametrize(
    ("rounds", "keep", "sigma"), [(1, 0.7, 0.8), (3, 0.5, 1.3), (2, 0.9, 0.0), (2, 0.0, 0.8), (1, 1.0, 0.8)]
)
def test_refinement_against_loops(grid, rounds, keep, sigma):
    weights = random_map(grid[0] * grid[1], 6)
    targets = [1, 4, 5]
    picked = weights[..., targets]
    new, factor = maths.refine(picked.transpose(1, 2), 1 - picked.sum(-1), grid, rounds, keep, sigma)
    for i, whole in enumerate(weights):
        right = slow_refine(whole, targets, grid, rounds, keep, sigma)
        torch.testing.assert_close(new[i].T, right[:, targets], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(whole[:, [0, 2, 3]] * factor[i][:, None], right[:, [0, 2, 3]], rtol=1e-9, atol=1e-12)


def test_blocks_give_the_same(monkeypatch):
    weights = random_map(20, 5, maps=7).transpose(1, 2)
    whole = maths.refine(weights, weights[:, 0] * 0, (4, 5), 2, 0.7, 0.8)
    sizes = []
    true = maths._refine
    monkeypatch.setattr(maths, "_refine", lambda m, *rest: sizes.append(len(m)) or true(m, *rest))
    monkeypatch.setattr(maths, "BLOCK_ELEMENTS", 250)
    parts = maths.refine(weights, weights[:, 0] * 0, (4, 5), 2, 0.7, 0.8)
    assert sizes == [2, 2, 2, 1]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_a_pixel_of_which_nothing_is_left_stays_finite():
    weights = torch.tensor([[[1.0, 0.1], [0.9, 0.0]]]).transpose(1, 2)  # one token, four tokens' worth of nothing else
    new, factor = maths.refine(weights, torch.zeros(1, 2), (1, 2), 3, 0.7, 0.0)
    assert new.isfinite().all() and factor.isfinite().all()
    gone, factor = maths.refine(torch.tensor([[[1.0, 0.1]]]), torch.zeros(1, 2), (1, 2), 3, 0.7, 0.0)
    assert gone.tolist() == [[[1.0, 0.0]]] and factor[0, 1] == 1
