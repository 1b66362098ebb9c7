"""S-CFG's maps, regions and ratios against loops in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attune.methods import scfg as maths


def slow_smooth(picture, sigma, released=False):
    """3×3 Gaussian of a ``[h, w]`` array, mirrored at the border."""
    h, w = picture.shape
    spread = 4 * sigma**2 if released else 2 * sigma**2
    kernel = np.array([[np.exp(-(i * i + j * j) / spread) for j in (-1, 0, 1)] for i in (-1, 0, 1)])
    kernel /= kernel.sum()
    padded = np.pad(picture, 1, mode="reflect")
    return np.array([[(padded[y : y + 3, x : x + 3] * kernel).sum() for x in range(w)] for y in range(h)])


def slow_layer(cross, self_map, grid, size, powers, sigma, released=False):
    """One layer of one picture: ``cross [M, N]``, ``self_map [M, M]`` to ``[N, *size]``."""
    if not released:
        cross = cross / cross.mean(axis=0)
    if released:
        completed = (self_map + 3 * self_map @ self_map) / 4 @ cross
    else:
        completed = sum(np.linalg.matrix_power(self_map, r) for r in range(1, powers + 1)) / powers @ cross
    out = []
    for column in completed.T:
        one = torch.from_numpy(column.reshape(1, 1, *grid))
        one = F.interpolate(one, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
        one = slow_smooth(one, sigma, released)
        out.append(one / one.mean() if released else one)
    return np.stack(out)


def slow_ratios(delta, owner, reference, low, high, limit, sigma, released=False):
    """Of one picture, all ``[H, W]``."""
    ratio = np.ones_like(delta)
    if reference.any():
        eta_reference = delta[reference].mean()
        for i in np.unique(owner):
            ratio[owner == i] = eta_reference / delta[owner == i].mean()
    return slow_smooth(np.minimum(np.clip(ratio, low, high), limit), sigma, released)


def random_maps(rng, tokens, keys, batch=2):
    return torch.from_numpy(rng.dirichlet(np.full(keys, 0.3), size=(batch, tokens)))


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(("grid", "size"), [((4, 6), (4, 6)), ((3, 5), (6, 9))])
def test_layer_maps(released, grid, size):
    rng = np.random.default_rng(1)
    cross, self_map = random_maps(rng, grid[0] * grid[1], 5), random_maps(rng, grid[0] * grid[1], grid[0] * grid[1])
    ours = maths.layer_maps(cross, self_map, grid, size, 4, 0.5, released)
    for picture in range(2):
        right = slow_layer(cross[picture].numpy(), self_map[picture].numpy(), grid, size, 4, 0.5, released)
        np.testing.assert_allclose(ours[picture].numpy(), right, rtol=1e-6)


@pytest.mark.parametrize("powers", [1, 2, 3, 5])
def test_completion_is_the_mean_of_powers(powers):
    rng = np.random.default_rng(2)
    cross, self_map = random_maps(rng, 12, 4), random_maps(rng, 12, 12)
    right = sum(torch.linalg.matrix_power(self_map, r) for r in range(1, powers + 1)) / powers @ cross
    torch.testing.assert_close(maths.complete(self_map, cross, powers), right)
    assert maths.complete(self_map, cross, 0) is cross


@pytest.mark.parametrize("released", [False, True])
def test_ratios(released):
    rng = np.random.default_rng(3)
    delta, owner = torch.from_numpy(rng.random((3, 7, 5)) + 0.1), torch.from_numpy(rng.integers(0, 4, (3, 7, 5)))
    delta[owner == 2] *= 9
    reference = torch.from_numpy(rng.random((3, 7, 5)) > 0.5)
    reference[2] = False
    ours = maths.ratios(delta, owner, reference, 0.8, 3.0, 1.9, 0.5, released=released)
    for i in range(3):
        right = slow_ratios(*(t[i].numpy() for t in (delta, owner, reference)), 0.8, 3.0, 1.9, 0.5, released)
        np.testing.assert_allclose(ours[i].numpy(), right, rtol=1e-5)
    assert torch.equal(maths.ratios(delta, owner, reference, 1, 1), torch.ones_like(delta))
    bounds = (0.8, 3.0, 1.9, 0.5)
    counted, found = maths.ratios(delta, owner, reference, *bounds, count=9), maths.ratios(delta, owner, reference, *bounds)
    torch.testing.assert_close(counted, found)


def test_regions_partition_and_foreground_is_what_the_start_token_loses():
    maps = torch.rand(2, 6, 5, 4, dtype=torch.float64)
    owner = maths.regions(maps)
    masks = torch.stack([owner == i for i in range(6)])
    assert (masks.sum(0) == 1).all()
    assert all((maps[:, i] <= maps.gather(1, owner[:, None])[:, 0]).all() for i in range(6))

    cross = random_maps(np.random.default_rng(4), 20, 6)
    pair = maths.against_start(cross)
    front = maths.regions(maths.layer_maps(pair, None, (5, 4), (5, 4), 0, 0))
    for b in range(2):
        start, others = cross[b, :, 0], cross[b, :, 1:].sum(-1)
        right = others / others.mean() > start / start.mean()
        assert torch.equal(front[b].flatten() == 1, right)


def test_enlarge_keeps_labels():
    labels = torch.arange(6).view(1, 2, 3) + 16_000_000 // 3
    assert torch.equal(maths.enlarge(labels, (4, 6)), labels.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert maths.enlarge(labels > 5_333_335, (5, 7)).dtype == torch.bool
