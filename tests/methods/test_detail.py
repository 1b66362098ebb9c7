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
    row = [1, 4, 6, 4, 1]
    padded = np.pad(m, 2, mode="reflect")
    h, w = m.shape
    smooth = np.array(
        [[sum(padded[y + i, x + j] * row[i] * row[j] for i in range(5) for j in range(5)) for x in range(w)] for y in range(h)]
    )
    y, x = np.unravel_index(smooth.argmax(), smooth.shape)
    return x, y


def slow_bilinear(m, height, width):
    """Centres of pixels to centres of pixels; beyond the outermost centres their values."""
    h, w = m.shape
    out = np.empty((height, width))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            top, left = int(y), int(x)
            below, right = min(top + 1, h - 1), min(left + 1, w - 1)
            b, a = y - top, x - left
            out[i, j] = (1 - b) * ((1 - a) * m[top, left] + a * m[top, right]) + b * (
                (1 - a) * m[below, left] + a * m[below, right]
            )
    return out


def slow_subject_maps(attention, subjects):
    """The released normalisation of one picture's ``attention [h, w, N]`` of the prompt's own tokens."""
    h, w, n = attention.shape
    tokens = np.empty_like(attention)
    for i in range(h):
        for j in range(w):
            e = [math.exp(attention[i, j, k] / 0.5) for k in range(n)]
            tokens[i, j] = [v / sum(e) for v in e]
    out = []
    for own in subjects:
        m = sum(tokens[..., k] for k in own) / len(own)
        m = (m - m.min()) / (m.max() - m.min())
        out.append(m / m.sum())
    return np.stack(out)


def slow_loss(maps, align):
    """The released loss of one picture's normalised ``maps [S, h, w]``."""
    total, off = 0.0, 0.0
    for m in maps:
        total -= 2 * sum(v * math.log(v + 1e-5) for v in m.flatten())
        (cx, cy), (bx, by) = slow_centroid(m), slow_brightest(m)
        off += 0.05 * ((cx - bx) ** 2 + (cy - by) ** 2) / 2
    return total + (off / len(maps) if align else 0)


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


def test_masks_are_made_at_the_latents_size():
    """Enlarged first: a threshold at the maps' own size gives other masks."""
    maps = np.random.default_rng(3).random((2, 3, 5, 4))
    ours = maths.subject_masks(torch.from_numpy(maps), 0.6, (20, 15))
    right = np.stack([[slow_binary(slow_bilinear(m, 20, 15), 0.6) for m in each] for each in maps])
    assert torch.equal(ours, torch.from_numpy(right))
    small = maths.subject_masks(torch.from_numpy(maps), 0.6)
    assert not torch.equal(torch.nn.functional.interpolate(small.float(), size=(20, 15), mode="nearest") > 0.5, ours)
    assert torch.equal(maths.subject_masks(torch.from_numpy(maps), 0.6, (5, 4)), small)


@pytest.mark.parametrize("size", [None, (12, 9)])
def test_exclusive_masks(size):
    maps = np.random.default_rng(4).random((2, 3, 6, 5)) ** 2
    ours = maths.exclusive_masks(torch.from_numpy(maps), 0.3, size).numpy()
    height, width = size or (6, 5)
    for b in range(2):
        large = [slow_bilinear(m, height, width) for m in maps[b]]
        above = [slow_binary(m, 0.3) for m in large]
        for i in range(height):
            for j in range(width):
                best = max(range(3), key=lambda s: large[s][i, j])
                assert [bool(ours[b, s, i, j]) for s in range(3)] == [s == best and bool(above[s][i, j]) for s in range(3)]
    assert (ours.sum(1) <= 1).all() and 0 < ours.mean() < 1
    alone = torch.from_numpy(maps[:, :1])
    assert torch.equal(maths.exclusive_masks(alone, 0.3, size), maths.subject_masks(alone, 0.3, size))  # nobody to compete with


def test_subject_maps_are_normalised_as_released():
    attention = np.random.default_rng(5).dirichlet(np.ones(6), size=(2, 7, 5))  # of six tokens
    subjects = [(1, 2), (4,), (5,)]
    ours = maths.subject_maps(torch.from_numpy(attention), subjects)
    for b in range(2):
        np.testing.assert_allclose(ours[b].numpy(), slow_subject_maps(attention[b], subjects), rtol=1e-9)
    assert ours.sum(dim=(-2, -1)).allclose(torch.ones(2, 3, dtype=torch.float64))
    assert maths.subject_maps(torch.full((1, 4, 4, 3), 0.2), [(0,)]).eq(0).all()  # a flat map is nowhere
    leaf = torch.from_numpy(attention).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: maths.objective(maths.subject_maps(a, subjects)), (leaf,))


def test_losses():
    attention = np.random.default_rng(2).dirichlet(np.full(5, 0.3), size=(2, 9, 7))
    subjects = [(0,), (1, 3), (4,)]
    given = maths.subject_maps(torch.from_numpy(attention), subjects)
    for b in range(2):
        maps = slow_subject_maps(attention[b], subjects)
        for s in range(3):
            np.testing.assert_allclose(maths.centroid(given)[b, s].numpy(), slow_centroid(maps[s]), rtol=1e-6)
            assert tuple(maths.brightest(given)[b, s].int().tolist()) == slow_brightest(maps[s])
        for align in (False, True):
            np.testing.assert_allclose(maths.objective(given, align)[b].item(), slow_loss(maps, align), rtol=1e-6)
    point = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    point[..., 3, 2] = 1
    assert maths.objective(point).item() == pytest.approx(0, abs=3e-5)
    assert maths.entropy(torch.ones(6, 6, dtype=torch.float64)).item() == pytest.approx(-math.log(1 / 36 + 1e-5))
    assert maths.brightest(torch.eye(2)[None]).shape == (1, 2)  # too small to smooth


def test_updates_are_repeated_as_released():
    assert [maths.threshold_at(i) for i in range(8)] == [26, 25, 24, 23, 22.5, 22, 22, 22]
    assert [maths.most_updates(early) for early in (True, False)] == [6, 3]


def test_step_lengths_fall():
    lengths = [maths.step_length(i, 4, 2.0, 4 * 128 * 128) for i in range(4)]
    assert lengths == pytest.approx([3500, 3500 * 0.75**0.5, 3500 * 0.5**0.5, 1750])
    assert maths.step_length(5, 20, 1.0, 4 * 128 * 128) == pytest.approx(1750 * 0.75**0.5)  # over all steps
