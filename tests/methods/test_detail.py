"""Detail++'s masks, accumulation and losses against loops in float64."""

import math

import numpy as np
import pytest
import torch

from attune.methods import detail as maths


def slow_binary(m, threshold):
    return (m - m.min()) / (m.max() - m.min()) > threshold


def slow_blend(z, masks):
    """``z [n+1, c, H, W]`` of one picture, ``masks [n][H, W]`` (None: everywhere)."""
    out = [z[0]]
    for i in range(1, len(z)):
        b = np.ones(z.shape[-2:]) if masks[i - 1] is None else masks[i - 1].astype(float)
        out.append(out[-1] + b * (z[i] - out[-1]))
    return np.stack(out)


def slow_centroid(m):
    h, w = m.shape
    x = sum(j * m[i, j] for i in range(h) for j in range(w)) / m.sum()
    return x, sum(i * m[i, j] for i in range(h) for j in range(w)) / m.sum()


def slow_brightest(m):
    kernel = np.array([[np.exp(-(i * i + j * j) / 2) for j in range(-2, 3)] for i in range(-2, 3)])
    padded = np.pad(m, 2, mode="reflect")
    h, w = m.shape
    smooth = np.array([[(padded[y : y + 5, x : x + 5] * kernel).sum() for x in range(w)] for y in range(h)])
    y, x = np.unravel_index(smooth.argmax(), smooth.shape)
    return x, y


def slow_loss(maps, align, weight):
    """``maps [S, h, w]`` of one picture."""
    total = 0.0
    for m in maps:
        p = m / m.sum()
        total -= weight * sum(v * np.log(v) for v in p.flatten() if v > 0)
        if align:
            (cx, cy), (bx, by) = slow_centroid(m), slow_brightest(m)
            total += (cx - bx) ** 2 + (cy - by) ** 2
    return total


def test_masks_and_accumulation():
    rng = np.random.default_rng(1)
    maps, z = rng.random((3, 2, 5, 7)), rng.normal(size=(4, 2, 3, 5, 7))
    ours = maths.subject_masks(torch.from_numpy(maps), 0.6)
    right = np.stack([[slow_binary(m, 0.6) for m in pair] for pair in maps])
    assert torch.equal(ours, torch.from_numpy(right))
    blended = maths.accumulate(torch.from_numpy(z), ours[:, :, None])
    for b in range(2):
        np.testing.assert_allclose(blended[:, b].numpy(), slow_blend(z[:, b], right[:, b]), atol=1e-12)
    assert torch.equal(maths.accumulate(blended, ours[:, :, None]), blended)
    ones = torch.ones(3, 2, 1, 5, 7, dtype=torch.bool)
    assert torch.equal(maths.accumulate(torch.from_numpy(z), ones), torch.from_numpy(z))
    assert not maths.subject_masks(torch.full((4, 4), 0.3), 0.5).any()  # a map without a peak is nobody's place


def test_losses():
    maps = np.random.default_rng(2).random((2, 3, 9, 7)) ** 4
    given = torch.from_numpy(maps)
    for b in range(2):
        for s in range(3):
            np.testing.assert_allclose(maths.centroid(given)[b, s].numpy(), slow_centroid(maps[b, s]), rtol=1e-6)
            assert tuple(maths.brightest(given)[b, s].int().tolist()) == slow_brightest(maps[b, s])
        for align in (False, True):
            ours = maths.objective(given, align, 0.7)[b].item()
            np.testing.assert_allclose(ours, slow_loss(maps[b], align, 0.7), rtol=1e-5)
        distances = np.mean([slow_loss(m[None], True, 0) for m in maps[b]])
        right = 0.05 * distances + slow_loss(maps[b], False, 2.0)
        np.testing.assert_allclose(maths.objective(given, released=True)[b].item(), right, rtol=1e-5)
    point = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    point[..., 3, 2] = 1
    assert maths.objective(point).item() == pytest.approx(0, abs=1e-6)
    assert maths.entropy(torch.ones(6, 6, dtype=torch.float64)).item() == pytest.approx(math.log(36))
    assert maths.brightest(torch.eye(2)[None]).shape == (1, 2)  # too small to smooth
    leaf = (given + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: maths.objective(m), (leaf,))


def test_step_lengths_fall():
    lengths = [maths.step_length(i, 4, 2.0, 4 * 128 * 128) for i in range(4)]
    assert lengths == pytest.approx([3500, 3500 * 0.75**0.5, 3500 * 0.5**0.5, 1750])
