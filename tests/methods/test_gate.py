"""The semantic gate's equations, one number at a time."""

import math

import torch

from attune.methods import gate as maths


def slow_gate(score, threshold=0.3, softness=0.1, floor=0.2):
    return floor + (1 - floor) / (1 + math.exp(-(score - threshold) / softness))


# --- mathematics ---


def test_gates_and_columns():
    scores = torch.tensor([[-0.5, 0.3, 2.0]], dtype=torch.float64)
    right = [slow_gate(s) for s in (-0.5, 0.3, 2.0)]
    found = maths.gates(scores, 0.3, 0.1, 0.2)
    torch.testing.assert_close(found, torch.tensor([right], dtype=torch.float64))
    assert maths.gates(scores, 0.3, 0.0, 0.2).tolist() == [[0.2, 1.0, 1.0]]
    assert torch.equal(maths.gates(scores, 0.3, 0.1, 1.0), torch.ones_like(scores))
    columns = maths.of_columns(found, [(0, 1), (1,), (3, 2)], 4)
    torch.testing.assert_close(columns, torch.tensor([[right[0], right[1], right[2], right[2]]], dtype=torch.float64))


def test_scaling_is_a_softmax_of_moved_logits():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    gain = torch.rand(2, 2, generator=generator, dtype=torch.float64) * 2 + 0.1
    moved = logits.clone()
    for b in range(2):
        moved[b, :, :, 1] += math.log(gain[b, 0])
        moved[b, :, :, 5] += math.log(gain[b, 1])
    plain, right = logits.softmax(-1), moved.softmax(-1)
    new, factor = maths.scaled(plain[..., [1, 5]], gain)
    torch.testing.assert_close(new, right[..., [1, 5]])
    torch.testing.assert_close(plain[..., [0, 2, 3, 4, 6]] * factor, right[..., [0, 2, 3, 4, 6]])
