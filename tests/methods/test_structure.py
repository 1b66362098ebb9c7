"""Structure-aware refinement: the CRF in loops in float64, the minimum of its energy, its edges and its memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attune.methods import structure as maths


def random_latent(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_weights(guides, spatial_sigma, feature_sigma):
    """``w_ij`` of one picture's ``[f, h, w]``, pair by pair: ``[P, P]``."""
    _, height, width = guides.shape
    reach = math.ceil(10 * spatial_sigma)
    offsets = [(a, b) for a in range(-reach, reach + 1) for b in range(-reach, reach + 1) if (a, b) != (0, 0)]
    scale = sum(math.exp(-(a * a + b * b) / (2 * spatial_sigma**2)) for a, b in offsets)
    pixels = [(y, x) for y in range(height) for x in range(width)]
    out = torch.zeros(len(pixels), len(pixels), dtype=torch.float64)
    for i, (y, x) in enumerate(pixels):
        for j, (v, u) in enumerate(pixels):
            if i != j:
                place = ((y - v) ** 2 + (x - u) ** 2) / (2 * spatial_sigma**2)
                feature = sum(float(g[y, x] - g[v, u]) ** 2 for g in guides) / (2 * feature_sigma**2)
                out[i, j] = math.exp(-place - feature) / scale
    return out


def slow_mean_field(latent, weights, strength, iterations):
    """One picture ``[c, h, w]``."""
    own = latent.flatten(1).T
    z = own.clone()
    for _ in range(iterations):
        new = z.clone()
        for i in range(len(z)):
            total, precision = own[i].clone(), 1.0
            for j in range(len(z)):
                total += strength * weights[i, j] * z[j]
                precision += strength * float(weights[i, j])
            new[i] = total / precision
        z = new
    return z.T.reshape(latent.shape)


@pytest.mark.parametrize("size", [(5, 7), (1, 6), (4, 4)])
@pytest.mark.parametrize(("strength", "spatial", "feature"), [(0.5, 2.0, 0.3), (3.0, 0.7, 1.0)])
def test_mean_field_against_loops(size, strength, spatial, feature):
    latent, guides = random_latent(2, 3, *size), random_latent(2, 2, *size, seed=1).sigmoid()
    ours = maths.refine(latent, guides, strength, 3, spatial, feature)
    for i in range(2):
        right = slow_mean_field(latent[i], slow_weights(guides[i], spatial, feature), strength, 3)
        torch.testing.assert_close(ours[i], right, rtol=1e-9, atol=1e-12)


def test_the_fixed_point_is_the_minimum_of_the_energy():
    latent, guides = random_latent(1, 4, 5, 6), random_latent(1, 2, 5, 6, seed=1).sigmoid()
    z = maths.refine(latent, guides, 2.0, 200, 1.5, 0.3)[0].flatten(1).T.requires_grad_()
    weights = slow_weights(guides[0], 1.5, 0.3)
    own = latent[0].flatten(1).T

    def energy(z):
        pairs = sum(weights[i, j] * (z[i] - z[j]).square().sum() for i in range(len(z)) for j in range(i))
        return 0.5 * (z - own).square().sum() + 0.5 * 2.0 * pairs

    (slope,) = torch.autograd.grad(energy(z), z)
    assert slope.abs().max() < 1e-9
    assert energy(z) < energy(own)


@pytest.mark.parametrize("block", [1, 37, 400, 1 << 24])
def test_blocks_and_rows_out_of_reach(block, monkeypatch):
    """The size of blocks does not matter, and rows beyond reach have weight 0: tall latents are cut into parts."""
    latent, guides = random_latent(1, 3, 24, 4), random_latent(1, 2, 24, 4, seed=1).sigmoid()
    monkeypatch.setattr(maths, "BLOCK_ELEMENTS", block)
    ours = maths.refine(latent.float(), guides.float(), 1.0, 2, 0.5, 0.4)  # a reach of 8 rows
    right = slow_mean_field(latent[0], slow_weights(guides[0], 0.5, 0.4), 1.0, 2)
    torch.testing.assert_close(ours[0].double(), right, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize(("size", "sigma"), [((40, 40), 2.0), ((128, 12), 0.5), ((12, 128), 8.0)])
def test_memory_is_bounded(size, sigma, monkeypatch):
    """No tensor is much larger than a block, where all pairs would be a hundred times that."""
    monkeypatch.setattr(maths, "BLOCK_ELEMENTS", 1 << 14)
    latent, guides = random_latent(1, 4, *size).float(), random_latent(1, 2, *size).float()
    with Largest() as seen:
        maths.refine(latent, guides, 1.0, 1, sigma, 0.5)
    assert 0 < seen.elements <= 3 * maths.BLOCK_ELEMENTS < (size[0] * size[1]) ** 2 / 20


def test_structure_is_the_principal_component():
    plane = random_latent(2, 1, 6, 9)
    latent = torch.cat([3 * plane, -plane, 0.01 * random_latent(2, 2, 6, 9, seed=1)], dim=1) + 5
    found = maths.structure(latent)
    assert found.shape == (2, 1, 6, 9)
    for i in range(2):
        right = (plane[i] - plane[i].min()) / (plane[i].max() - plane[i].min())
        torch.testing.assert_close(found[i], right, rtol=0, atol=0.02)
        torch.testing.assert_close(maths.structure(latent[i : i + 1]), found[i : i + 1])
    assert not maths.structure(torch.full((1, 4, 5, 5), 2.0)).any()


def test_edges_are_where_the_step_is():
    step = torch.zeros(1, 1, 12, 12)
    step[..., 6:] = 1
    found = maths.edges(step, 0.3, 0.8)[0, 0]
    assert set(found.nonzero()[:, 1].tolist()) <= {5, 6} and found[:, 5:7].sum() == 12
    assert not maths.edges(0.2 * step, 0.3, 0.8).any() and not maths.edges(torch.zeros(1, 1, 2, 2), 0.3, 0.8).any()
