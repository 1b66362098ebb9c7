"""Attention Regulation's objective, gradient and solver against a written-out procedure in float64."""

import math

import pytest
import torch

from attune.methods import regulation as maths

GRIDS = [(16, 16), (8, 8), (6, 10), (5, 3)]


def slow_bumps(height, width):
    """Every bump of eq. 12 in full, ``[64, h, w]``, by the row of θ."""
    out = []
    for p in range(1, 9):
        for q in range(1, 9):
            picture = torch.empty(height, width, dtype=torch.float64)
            for i in range(1, height + 1):
                for j in range(1, width + 1):
                    y, x = (i - p * height / 8) / (height / 16), (j - q * width / 8) / (width / 16)
                    picture[i - 1, j - 1] = math.exp(-(y * y + x * x) / 2)
            out.append(picture)
    return torch.stack(out)


def slow_map(scores, columns, edit):
    """Scores of one map ``[M, N]`` with ``edit [T, M]`` on some columns, softmaxed."""
    raised = scores.clone()
    raised[:, columns] = scores[:, columns] + edit.T
    return raised.softmax(-1)


def slow_loss(new, old, mass_weight=80.0, deviation_weight=0.1):
    """Eq. 8 and 9 for the target columns of one map, ``[T, M]``."""
    wanted = min(1.0, 0.2 * len(new)) / len(new)
    high = sum((torch.quantile(row, 0.9) - 0.9) ** 2 for row in new) / len(new)
    mass = sum((row.mean() - wanted) ** 2 for row in new) / len(new)
    return high + mass_weight * mass + deviation_weight * (new - old).square().sum().sqrt()


def slow_published(scores, columns, theta, iterations=20, mass_weight=80.0, deviation_weight=0.1, grid=(16, 16)):
    """The published procedure under autograd for all maps together: ``scores [B, M, N]``, ``theta [B, T, 64]``; the best losses."""
    basis = slow_bumps(*grid).flatten(1)
    maps = len(scores)
    old = scores.softmax(-1)[:, :, columns].transpose(1, 2)
    best, found = math.inf, None
    for _ in range(iterations):
        theta = theta.detach().requires_grad_()
        new = [slow_map(s, columns, t @ basis)[:, columns].T for s, t in zip(scores, theta, strict=True)]
        each = torch.stack([slow_loss(n, o, mass_weight, deviation_weight) for n, o in zip(new, old, strict=True)])
        if each.mean() < best:
            best, found = float(each.detach().mean()), each.detach()
        (slope,) = torch.autograd.grad(each.mean(), theta)
        theta = theta - 100 * maps * slope
    return found


def random_scores(grid, maps, seed=0, start=5.0, tokens=12):
    """Smooth random scores ``[B, M, N]`` in which the first column takes most, as CLIP's start token does."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(maps, tokens, *grid, generator=generator, dtype=torch.float64)
    sides = [torch.exp(-((torch.arange(n)[:, None] - torch.arange(n)) ** 2) / 6.0).double() for n in grid]
    smooth = sides[0] @ noise @ sides[1]
    smooth = 1.5 * smooth / smooth.std()
    smooth[:, 0] += start
    return smooth.flatten(2).transpose(1, 2)


def targets_of(scores, columns):
    """``[T, B, M]``."""
    return scores.softmax(-1)[:, :, columns].permute(2, 0, 1).contiguous()


def thetas(targets, maps, seed=0):
    return maths.start(targets, maps, seed, torch.empty(0, dtype=torch.float64))


@pytest.mark.parametrize("grid", GRIDS)
def test_bumps_and_edit(grid):
    p = maths.problem(grid, 2, like=torch.empty(0, dtype=torch.float64))
    theta = thetas(2, 3)
    right = torch.einsum("tbk,khw->tbhw", theta.flatten(2), slow_bumps(*grid)).flatten(2)
    torch.testing.assert_close(maths.additive(theta, p), right)


@pytest.mark.parametrize("columns", [[3], [2, 5, 6]])
def test_edited_map_objective_and_gradient(columns):
    for seed, grid in enumerate(GRIDS):
        count, scores = len(columns), random_scores(grid, 3, seed)
        p = maths.problem(grid, count, 60.0, 0.2, scores)
        theta = (3 * thetas(count, 3, seed) - 1).requires_grad_()
        old = targets_of(scores, columns)
        edit = maths.additive(theta, p)
        whole = [slow_map(s, columns, edit[:, i]) for i, s in enumerate(scores)]
        right = torch.stack([slow_loss(w[:, columns].T, o, 60.0, 0.2) for w, o in zip(whole, old.unbind(1), strict=True)])
        (slope,) = torch.autograd.grad(right.sum(), theta)

        new, factor = maths.regulated(old, edit.detach())
        for i, one in enumerate(whole):
            torch.testing.assert_close(new[:, i].T, one[:, columns].detach())
            others = [n for n in range(scores.shape[-1]) if n not in columns]
            torch.testing.assert_close(scores[i].softmax(-1)[:, others] * factor[i][:, None], one[:, others].detach())
        torch.testing.assert_close(maths.objective(new, old, p), right.detach())
        torch.testing.assert_close(maths.gradient_theta(new, old, p), slope)

        free = new.clone().requires_grad_()
        loss = sum(slow_loss(free[:, i], old[:, i], 60.0, 0.2) for i in range(3))
        torch.testing.assert_close(maths.gradient(new, old, p), torch.autograd.grad(loss, free)[0])
        torch.testing.assert_close(maths.logits(old).softmax(0)[:count], old, atol=1e-10, rtol=1e-6)


def test_quantile_is_torchs():
    for pixels in (1, 2, 10, 11, 21, 64, 100):
        maps = torch.rand(2, 3, pixels, dtype=torch.float64)
        torch.testing.assert_close(maths.quantile(maps), maps.quantile(0.9, dim=-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_edits_and_weights_stay_finite(dtype):
    old = torch.tensor([[[0.0, 1.0, 1e-30, 0.5]]], dtype=dtype)
    for size in (-1e4, 0.0, 50.0, 1e4):
        new, factor = maths.regulated(old, torch.full_like(old, size))
        assert new.isfinite().all() and factor.isfinite().all()
    p = maths.problem((2, 2), 1, like=old)
    assert maths.solve(old, maths.start(1, 1, 0, old), p).isfinite().all()
    for flat in (torch.zeros_like(old), torch.ones_like(old)):
        assert maths.solve(flat, maths.start(1, 1, 0, old), p).isfinite().all()


def test_published_procedure_is_the_one_under_autograd():
    """Ours keeps the best iterate of every map, which is no worse than the one with the least sum."""
    scores, columns = random_scores((16, 16), 3), [2, 4]
    p, old, theta = maths.problem((16, 16), 2, like=scores), targets_of(scores, columns), thetas(2, 3)
    for iterations in (1, 2, 5):
        edit = maths.published(old, theta, p, iterations)
        ours = maths.objective(maths.regulated(old, edit)[0], old, p)
        right = slow_published(scores, columns, theta.transpose(0, 1).flatten(2), iterations)
        assert (ours <= right + 1e-9).all()
        if iterations == 1:
            torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("start", [0.0, 3.0, 7.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_solver_is_no_worse_than_the_published_procedure(count, start):
    """Same inputs, start and settings: 20 published iterations under autograd in float64, ours in float32 in half as many passes."""
    columns = [2, 3, 5, 7][:count]
    for grid in ((16, 16), (8, 12)):
        scores = random_scores(grid, 8, count, start, tokens=20)
        right = slow_published(scores, columns, thetas(count, 8).transpose(0, 1).flatten(2), grid=grid)
        old = targets_of(scores, columns)
        p = maths.problem(grid, count, like=old.float())
        edit = maths.solve(old.float(), thetas(count, 8).float(), p)
        exact = maths.problem(grid, count, like=old)
        ours = maths.objective(maths.regulated(old, edit.double())[0], old, exact)
        theirs = maths.published(old, thetas(count, 8), exact)
        assert (
            ours.mean() <= right.mean() and ours.mean() <= maths.objective(maths.regulated(old, theirs)[0], old, exact).mean()
        )
        assert (ours <= right + 0.02).all(), (ours - right).max()
        assert (ours < maths.objective(old, old, exact)).all()


def test_more_iterations_are_no_worse_and_one_is_enough_to_run():
    scores = random_scores((8, 8), 4)
    old = targets_of(scores, [1, 3])
    p, theta = maths.problem((8, 8), 2, like=old), thetas(2, 4)
    losses = [maths.objective(maths.regulated(old, maths.solve(old, theta, p, n))[0], old, p).mean() for n in (1, 10, 40)]
    assert losses[0] > losses[1] > losses[2]


def test_the_optimum_hardly_answers_to_rounding():
    """So a picture is the same alone, in a batch and on another device, but for rare ties."""
    old = targets_of(random_scores((16, 16), 16, 3), [1, 2, 4]).float()
    p, theta = maths.problem((16, 16), 3, like=old), maths.start(3, 16, 0, old)
    noise = 1 + 1e-7 * torch.randn(old.shape, generator=torch.Generator().manual_seed(0))
    new, other = (maths.regulated(o, maths.solve(o, theta, p))[0] for o in (old, old * noise))
    assert ((new - other).abs().amax((0, 2)) < 1e-3).float().mean() > 0.9


def test_average_and_fading():
    a, b = torch.rand(2, 3), torch.rand(2, 3)
    assert maths.average(None, a, 0.25) is a
    torch.testing.assert_close(maths.average(a, b, 0.25), 0.25 * a + 0.75 * b)
    assert maths.fading(0, 0.9) == 1 and maths.fading(3, 0.9) == pytest.approx(0.9**3)
