"""Attention Regulation's objective, gradient and solver against a written-out procedure in float64."""

import math
from functools import cache

import pytest
import torch

from attune.methods import regulation as maths

GRIDS = [(16, 16), (8, 8), (6, 10), (5, 3)]


@cache
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


def slow_loss(new, old, mass_weight=80.0, deviation_weight=0.1, theta=None):
    """Eq. 8 and 9 for the target columns of one map, ``[T, M]``, the deviation per pixel; with ``theta`` the released code's penalty."""
    wanted = min(1.0, 0.2 * len(new)) / len(new)
    high = sum((torch.quantile(row, 0.9) - 0.9) ** 2 for row in new) / len(new)
    mass = sum((row.mean() - wanted) ** 2 for row in new) / len(new)
    deviation = (new - old).square().sum().sqrt() / new.shape[1] ** 0.5 if theta is None else theta.square().mean()
    return high + mass_weight * mass + deviation_weight * deviation


def slow_published(
    scores, columns, theta, iterations=20, mass_weight=80.0, deviation_weight=0.1, grid=(16, 16), released=False
):
    """The published procedure under autograd for all maps together: ``scores [B, M, N]``, ``theta [B, T, 64]``; the best losses and maps."""
    basis = slow_bumps(*grid).flatten(1)
    maps = len(scores)
    old = scores.softmax(-1)[:, :, columns].transpose(1, 2)
    best, found, kept = math.inf, None, None
    for _ in range(iterations):
        theta = theta.detach().requires_grad_()
        new = [slow_map(s, columns, t @ basis)[:, columns].T for s, t in zip(scores, theta, strict=True)]
        penalised = theta if released else [None] * maps
        each = torch.stack(
            [slow_loss(*two, mass_weight, deviation_weight, t) for *two, t in zip(new, old, penalised, strict=True)]
        )
        if each.mean() < best:
            best, found, kept = float(each.detach().mean()), each.detach(), torch.stack(new, 1).detach()
        (slope,) = torch.autograd.grad(each.mean(), theta)
        theta = theta - 100 * maps * slope
    return found, kept


def random_scores(grid, maps, seed=0, start=5.0, tokens=12):
    """Smooth random scores ``[B, M, N]`` in which the first column takes most, as CLIP's start token does."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(maps, tokens, *grid, generator=generator, dtype=torch.float64)
    sides = [torch.exp(-((torch.arange(n)[:, None] - torch.arange(n)) ** 2) / 6.0).double() for n in grid]
    smooth = sides[0] @ noise @ sides[1]
    smooth = 1.5 * smooth / smooth.std()
    smooth[:, 0] += start
    return smooth.flatten(2).transpose(1, 2)


def weights_of(scores, columns):
    """The targets' weights and all others' together, ``[T + 1, B, M]``."""
    return maths.with_others(scores.softmax(-1)[:, None], torch.tensor(columns))[:, :, 0]


def changed(weights, edit):
    """The targets' weights after an edit."""
    return maths.regulated(weights.log(), edit)[:-1]


def thetas(targets, maps, seed=0):
    return maths.start(targets, maps, seed, torch.empty(0, dtype=torch.float64))


@pytest.mark.parametrize("grid", GRIDS)
def test_bumps_and_edit(grid):
    p = maths.problem(grid, 2, like=torch.empty(0, dtype=torch.float64))
    theta = thetas(2, 3)
    right = torch.einsum("tbk,khw->tbhw", theta.flatten(2), slow_bumps(*grid)).flatten(2)
    torch.testing.assert_close(maths.additive(theta, p)[:2], right)
    assert not maths.additive(theta, p)[2].any()


@pytest.mark.parametrize("columns", [[3], [2, 5, 6]])
def test_edited_map_objective_and_gradient(columns):
    for seed, grid in enumerate(GRIDS):
        count, scores = len(columns), random_scores(grid, 3, seed)
        p = maths.problem(grid, count, 60.0, 0.2, scores)
        theta = (3 * thetas(count, 3, seed) - 1).requires_grad_()
        weights = weights_of(scores, columns)
        old = weights[:-1]
        edit = maths.additive(theta, p)
        whole = [slow_map(s, columns, edit[:-1, i]) for i, s in enumerate(scores)]
        right = torch.stack([slow_loss(w[:, columns].T, o, 60.0, 0.2) for w, o in zip(whole, old.unbind(1), strict=True)])
        (slope,) = torch.autograd.grad(right.sum(), theta)

        new = maths.regulated(weights.log(), edit.detach())
        new, factor = new[:-1], new[-1] / weights[-1]
        for i, one in enumerate(whole):
            torch.testing.assert_close(new[:, i].T, one[:, columns].detach())
            others = [n for n in range(scores.shape[-1]) if n not in columns]
            torch.testing.assert_close(scores[i].softmax(-1)[:, others] * factor[i][:, None], one[:, others].detach())
        torch.testing.assert_close(maths.objective(new, old, p), right.detach())
        torch.testing.assert_close(maths.gradient_theta(new, old, theta.detach(), p), slope)

        free = new.clone().requires_grad_()
        loss = sum(slow_loss(free[:, i], old[:, i], 60.0, 0.2) for i in range(3))
        torch.testing.assert_close(maths.gradient(new, old, p), torch.autograd.grad(loss, free)[0])
        torch.testing.assert_close(old, scores.softmax(-1)[:, :, columns].permute(2, 0, 1), atol=1e-10, rtol=1e-6)


def test_quantile_is_torchs():
    for pixels in (1, 2, 10, 11, 21, 64, 100):
        maps = torch.rand(2, 3, pixels, dtype=torch.float64)
        torch.testing.assert_close(maths.quantile(maps), maps.quantile(0.9, dim=-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_edits_and_weights_stay_finite(dtype):
    one = torch.tensor([0])
    old = torch.tensor([0.0, 1.0, 1e-30, 0.5], dtype=dtype).view(1, 1, 4, 1)
    weights = maths.with_others(old, one)[:, 0]
    for size in (-1e4, 0.0, 50.0, 1e4):
        new = maths.regulated(weights.log(), torch.tensor([size, 0.0], dtype=dtype).view(2, 1, 1))
        assert new.isfinite().all() and (new[-1] / weights[-1]).isfinite().all()
    p = maths.problem((2, 2), 1, like=old)
    begin = maths.additive(maths.start(1, 1, 0, old), p)
    for flat in (old, torch.zeros_like(old), torch.ones_like(old)):
        weights = maths.with_others(flat, one)[:, 0]
        assert maths.solve(weights, begin, p).isfinite().all()
        assert maths.solve(weights, torch.zeros_like(begin), p, again=True).isfinite().all()


def test_published_procedure_is_the_one_under_autograd():
    """Ours keeps the best iterate of every map, which is no worse than the one with the least sum."""
    scores, columns = random_scores((16, 16), 3), [2, 4]
    weights, theta = weights_of(scores, columns), thetas(2, 3)
    for released, weight in ((False, 0.1), (True, 0.09)):
        p = maths.problem((16, 16), 2, 80.0, weight, scores, released)
        for iterations in (1, 2, 5):
            new = changed(weights, maths.published(weights, theta, p, iterations))
            given = {"deviation_weight": weight, "released": released}
            right, maps = slow_published(scores, columns, theta.transpose(0, 1).flatten(2), iterations, **given)
            if not released:
                ours = maths.objective(new, weights[:-1], p)
                assert (ours <= right + 1e-9).all()
            if iterations == 1:
                torch.testing.assert_close(new, maps)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_words_reach_the_level_on_maps_of_every_size(size):
    """The 90 % quantile of two words by default, and by the released code's procedure, written out and ours."""
    scores = random_scores((size, size), 4, 1)
    spread = torch.nn.functional.interpolate(
        random_scores((16, 16), 4, 1).transpose(1, 2).unflatten(-1, (16, 16)), (size, size), mode="bilinear"
    )
    scores = spread.flatten(2).transpose(1, 2)
    weights, theta = weights_of(scores, [2, 4]), thetas(2, 4)
    p = maths.problem((size, size), 2, like=weights)
    ours = maths.quantile(changed(weights, maths.solve(weights, maths.additive(theta, p), p))).mean()
    assert maths.quantile(weights[:-1]).mean() < 0.2 and ours > 0.75
    p = maths.problem((size, size), 2, 80.0, 0.09, weights, released=True)
    released = maths.quantile(changed(weights, maths.published(weights, theta, p))).mean()
    assert 0.7 < released < 0.9
    if size == 16:
        _, maps = slow_published(scores, [2, 4], theta.transpose(0, 1).flatten(2), deviation_weight=0.09, released=True)
        assert abs(maths.quantile(maps).mean() - released) < 0.02


@pytest.mark.parametrize("start", [0.0, 3.0, 7.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_solver_is_no_worse_than_the_published_procedure(count, start):
    """Same inputs, start and settings: 20 published iterations under autograd in float64, ours in float32 in fewer passes."""
    columns = [2, 3, 5, 7][:count]
    for grid in ((16, 16), (8, 12)):
        scores = random_scores(grid, 8, count, start, tokens=20)
        right, _ = slow_published(scores, columns, thetas(count, 8).transpose(0, 1).flatten(2), grid=grid)
        weights = weights_of(scores, columns)
        old, short = weights[:-1], weights.float()
        p = maths.problem(grid, count, like=short)
        edit = maths.solve(short, maths.additive(thetas(count, 8).float(), p), p)
        exact = maths.problem(grid, count, like=old)
        ours = maths.objective(changed(weights, edit.double()), old, exact)
        theirs = maths.objective(changed(weights, maths.published(weights, thetas(count, 8), exact)), old, exact)
        assert ours.mean() <= right.mean() and ours.mean() <= theirs.mean()
        assert (ours <= right + 0.02).all(), (ours - right).max()
        assert (ours < maths.objective(old, old, exact)).all()


def test_more_iterations_are_no_worse_and_one_is_enough_to_run():
    weights = weights_of(random_scores((8, 8), 4), [1, 3])
    p = maths.problem((8, 8), 2, like=weights)
    begin = maths.additive(thetas(2, 4), p)
    edits = [maths.solve(weights, begin, p, n) for n in (1, 10, 40)]
    losses = [maths.objective(changed(weights, edit), weights[:-1], p).mean() for edit in edits]
    assert losses[0] > losses[1] > losses[2]


def test_going_on_from_the_last_step_reaches_nearly_what_a_search_from_the_start_does():
    """Maps that turn into others over ten steps: one pass a step, against ten."""
    one, two = (random_scores((16, 16), 6, seed) for seed in (1, 2))
    theta, again = thetas(2, 6), None
    p = maths.problem((16, 16), 2, like=one)
    reached, anew = [], []
    for step in range(10):
        angle = 0.1 * step
        weights = weights_of(math.cos(angle) * one + math.sin(angle) * two, [2, 4])
        cold = maths.solve(weights, maths.additive(theta, p), p)
        again = cold if again is None else maths.average(again, maths.solve(weights, again, p, again=True), 0.25)
        for losses, edit in ((reached, again), (anew, cold)):
            losses.append(maths.quantile(changed(weights, edit)).mean())
    assert torch.stack(reached).mean() > torch.stack(anew).mean() - 0.05


def test_the_optimum_hardly_answers_to_rounding():
    """So a picture is the same alone, in a batch and on another device, but for rare ties."""
    weights = weights_of(random_scores((16, 16), 16, 3), [1, 2, 4]).float()
    p = maths.problem((16, 16), 3, like=weights)
    begin = maths.additive(maths.start(3, 16, 0, weights), p)
    noise = 1 + 1e-7 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    new, other = (changed(w, maths.solve(w, begin, p)) for w in (weights, weights * noise))
    assert ((new - other).abs().amax((0, 2)) < 1e-3).float().mean() > 0.9


def test_average_and_fading():
    a, b = torch.rand(2, 3), torch.rand(2, 3)
    assert maths.average(None, a, 0.25) is a
    torch.testing.assert_close(maths.average(a, b, 0.25), 0.25 * a + 0.75 * b)
    assert maths.fading(0, 0.9) == 1 and maths.fading(3, 0.9) == pytest.approx(0.9**3)
