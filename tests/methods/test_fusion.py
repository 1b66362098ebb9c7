"""Phrase fusion against loops."""

import pytest
import torch

from attune.methods import fusion as maths


def slow_fuse(weights, groups, strength):
    """Of one map ``[M, N]``, weight by weight."""
    out = weights.clone()
    for row in range(len(weights)):
        for group in groups:
            mean = sum(float(weights[row, c]) for c in group) / len(group)
            for c in group:
                out[row, c] = (1 - strength) * float(weights[row, c]) + strength * mean
    return out


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_fusion_against_loops(strength):
    weights = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = ((0, 3), (1, 2, 5))
    fused = maths.fuse(weights, maths.mixing(groups, 6, strength))
    for row, head in ((0, 0), (1, 2)):
        torch.testing.assert_close(fused[row, head], slow_fuse(weights[row, head], groups, strength))
    torch.testing.assert_close(fused.sum(-1), weights.sum(-1))
    torch.testing.assert_close(fused[..., 4], weights[..., 4])
    if strength == 0:
        assert torch.equal(fused, weights)


def test_groups_that_share_a_column_are_one():
    assert maths.joined([(3, 4), (7,), (4, 5), (9, 8)]) == ((3, 4, 5), (8, 9))
    assert maths.joined([(1, 2), (5, 6), (2, 5)]) == ((1, 2, 5, 6),)
    assert maths.joined([(1,), ()]) == ()
