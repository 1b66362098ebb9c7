"""Normalised attention guidance against loops over tokens in float64."""

import pytest
import torch

from attune.methods.negative import away


def outputs(seed, scale=1.0, shape=(2, 3, 5, 4), dtype=torch.float64):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow(positive, negative, scale, tau, alpha):
    """Token by token, as the paper's pseudocode has it."""
    out = positive.clone()
    rows, heads, tokens, width = positive.shape
    for row in range(rows):
        for token in range(tokens):
            plus = [float(positive[row, h, token, i]) for h in range(heads) for i in range(width)]
            minus = [float(negative[row, h, token, i]) for h in range(heads) for i in range(width)]
            phi = scale - 1
            beyond = [p + phi * (p - m) for p, m in zip(plus, minus, strict=True)]
            before, after = sum(map(abs, plus)), sum(map(abs, beyond))
            ratio = after / before
            bounded = [b / ratio * min(ratio, tau) for b in beyond]
            mixed = [alpha * b + (1 - alpha) * p for b, p in zip(bounded, plus, strict=True)]
            out[row, :, token] = torch.tensor(mixed, dtype=out.dtype).view(heads, width)
    return out


@pytest.mark.parametrize(("scale", "tau", "alpha"), [(5.0, 2.5, 0.25), (3.0, 2.5, 0.5), (11.0, 3.5, 1.0), (1.5, 1e9, 0.7)])
def test_equals_the_loop(scale, tau, alpha):
    positive, negative = outputs(1), outputs(2)
    torch.testing.assert_close(away(positive, negative, scale, tau, alpha), slow(positive, negative, scale, tau, alpha))
    single = away(positive.float(), negative.float(), scale, tau, alpha)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), slow(positive, negative, scale, tau, alpha), rtol=1e-5, atol=1e-5)


def test_limits():
    positive, negative = outputs(1), outputs(2)
    torch.testing.assert_close(away(positive, negative, 1.0, 2.5, 0.5), positive)  # no extrapolation
    assert torch.equal(away(positive, negative, 7.0, 2.5, 0.0), positive)  # nothing of it taken
    torch.testing.assert_close(away(positive, positive, 7.0, 2.5, 0.5), positive)  # nothing to go away from
    far = away(positive, 100 * negative, 5.0, 2.5, 1.0)
    torch.testing.assert_close(far.abs().sum(dim=(1, 3)), 2.5 * positive.abs().sum(dim=(1, 3)))  # the bound is reached
    assert away(torch.zeros_like(positive), negative, 5.0, 2.5, 0.5).isfinite().all()


def test_half_precision_is_computed_in_single():
    positive, negative = outputs(1, 50.0).half(), outputs(2, 50.0).half()
    ours = away(positive, negative, 11.0, 3.5, 0.5)
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours.double(), slow(positive.double(), negative.double(), 11.0, 3.5, 0.5), rtol=2e-3, atol=0.1)
