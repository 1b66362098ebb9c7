"""SoftPAG's two equations."""

import torch

from attune.methods.softpag import guide, soften
from attune.tests.methods.test_attention import tensor


def test_soften():
    out, value = tensor(2, 3, 5, 4, seed=1) * 1e6, tensor(2, 3, 5, 4, seed=2) * 1e-6
    out, value = out.float(), value.float()
    assert torch.equal(soften(out, value, 0.0), out) and torch.equal(soften(out, value, 1.0), value)
    u = torch.tensor([0.0, 0.25, 1.0]).reshape(3, 1, 1)
    mixed = soften(out, value, u)
    assert torch.equal(mixed[:, 0], out[:, 0]) and torch.equal(mixed[:, 2], value[:, 2])
    torch.testing.assert_close(mixed[:, 1], 0.75 * out[:, 1] + 0.25 * value[:, 1])
    torch.testing.assert_close(soften(out, value, 0.25), 0.75 * out + 0.25 * value)


def test_guide():
    cfg, cond, pert = (tensor(2, 4, 3, 3, seed=s) for s in (1, 2, 3))
    assert guide(cfg, cond, pert, 0, 0.5) is cfg
    torch.testing.assert_close(guide(cfg, cond, pert, 3.0), cfg + 3 * (cond - pert))
    ours = guide(cfg, cond, pert, 3.0, 0.4)
    for i in range(2):
        term = 3 * (cond[i] - pert[i])
        factor = 0.4 * cond[i].std() / (cfg[i] + term).std() + 0.6
        torch.testing.assert_close(ours[i], cfg[i] + factor * term)
