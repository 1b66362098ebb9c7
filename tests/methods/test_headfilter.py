"""What silenced heads say instead, in float64."""

import pytest
import torch

from attune.methods import headfilter as maths


@pytest.mark.parametrize("others", maths.OTHERS)
def test_silence(others):
    generator = torch.Generator().manual_seed(1)
    out, value = (torch.randn(2, 3, n, 5, generator=generator).half() for n in (6, 4))
    said = maths.silence(out, value, others)
    right = {
        "zero": torch.zeros(2, 3, 1, 5, dtype=torch.float64),
        "mean": out.double().mean(2, keepdim=True),
        "uniform attention": value.double().mean(2, keepdim=True),
    }[others]
    assert said.dtype == torch.float16 and said.shape == out.shape
    torch.testing.assert_close(said.double(), right.expand(2, 3, 6, 5), rtol=1e-3, atol=1e-3)
