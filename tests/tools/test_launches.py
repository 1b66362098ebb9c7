"""What our nodes wait for in a step, and the counter of it."""

import pytest
import torch

from attune.tools.benchmarks import launches
from attune.tools.robustness import stack

OTHERS = [name for name in stack.OURS if name != launches.SCORES]


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_all_nodes_together_wait_once_a_step(family):
    """In a part of sampling each has to know the noise level, which is read once for all."""
    _, added, waits = launches.beside(family, OTHERS, **launches.PART)
    assert added > 0 and sum(waits.values()) <= 1, waits


def test_the_gate_waits_only_where_it_scores():
    _, _, each = launches.beside("sd15", [launches.SCORES])
    _, _, never = launches.beside("sd15", [launches.SCORES], every=100)
    assert sum(never.values()) <= 1 < sum(each.values()), (never, each)


def test_the_counter():
    x = torch.randn(4)
    with launches.Counted() as counted:
        x.exp_()
        x[:2]  # a view starts nothing
        torch.cat([x, x])
    assert (counted.launches, counted.waits.total()) == (2, 0)
    with launches.Counted() as counted:
        float(x[0]), bool(x.any()), x.tolist(), x.cpu(), x[x > 0], torch.equal(x, x), x.nonzero(), x.sum().item()
        float(torch.tensor([1.0, 2.0]).sum())  # of Python's numbers alone
    assert counted.waits.total() == 8, counted.waits
    with torch.inference_mode(), launches.Counted() as counted:
        float(x.sum())
    assert counted.waits.total() == 1
