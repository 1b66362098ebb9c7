"""Word weights' equations against attention written out, one number at a time."""

import math

import torch

from attune.methods import weights as maths

COLUMNS = [1, 5]


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_weights(row, columns, gains, mode):
    """One row of attention ``[N]`` with gains on some columns; in loops, by what the words say."""
    new = row.clone()
    for column, gain in zip(columns, gains, strict=True):
        new[column] = row[column] * (gain if mode == "value" else max(gain, 0))
    if mode == "value":
        return new
    left = new / sum(float(x) for x in new)
    out = left.clone()
    for column, gain in zip(columns, gains, strict=True):
        if gain < 0:
            out = out - gain * row[column] * left
            out[column] += gain * row[column]
    return out


def test_attention_is_a_softmax_of_moved_logits():
    logits, gain = random(2, 3, 5, 7), random(2, 5, 2).exp()
    moved = logits.clone()
    for row in range(2):
        for pixel in range(5):
            for t, column in enumerate(COLUMNS):
                moved[row, :, pixel, column] += math.log(gain[row, pixel, t])
    plain, right = logits.softmax(-1), moved.softmax(-1)
    new, factor = maths.attention(plain[..., COLUMNS], gain)
    others = [0, 2, 3, 4, 6]
    torch.testing.assert_close(new, right[..., COLUMNS])
    torch.testing.assert_close(plain[..., others] * factor, right[..., others])


def test_nothing_and_less_than_nothing():
    """0: the softmax without the columns. Below: away from what they give, and the row still sums to one."""
    logits = random(1, 1, 4, 7)
    plain, without = logits.softmax(-1), logits.clone()
    without[..., COLUMNS] = -math.inf
    new, factor = maths.attention(plain[..., COLUMNS], torch.zeros(1, 1, 2, dtype=torch.float64))
    assert (new == 0).all()
    torch.testing.assert_close(plain[..., [0, 2, 3, 4, 6]] * factor, without.softmax(-1)[..., [0, 2, 3, 4, 6]])
    gain = torch.tensor([-1.5, 0.5], dtype=torch.float64)
    new, factor = maths.attention(plain[..., COLUMNS], gain[None, None])
    for pixel in range(4):
        right = slow_weights(plain[0, 0, pixel], COLUMNS, gain.tolist(), "attention")
        torch.testing.assert_close(new[0, 0, pixel], right[COLUMNS])
        torch.testing.assert_close(plain[0, 0, pixel, 0] * factor[0, 0, pixel, 0], right[0])
        torch.testing.assert_close(right.sum(), right.new_ones(()))


def test_value_multiplies_what_a_phrase_adds():
    plain, value = random(1, 2, 4, 7).softmax(-1), random(1, 2, 7, 3)
    new, factor = maths.value(plain[..., COLUMNS], torch.tensor([[[-1.0, 2.0]]], dtype=torch.float64))
    assert factor is None
    added = [plain[..., c : c + 1] * value[..., c : c + 1, :] for c in COLUMNS]
    whole = plain.clone()
    whole[..., COLUMNS] = new
    torch.testing.assert_close(whole @ value, plain @ value - 2 * added[0] + added[1])


def test_one_is_nothing():
    plain = random(2, 2, 4, 2).softmax(-1).float()
    ones = torch.ones(1, 1, 2)
    new, factor = maths.attention(plain, ones)
    assert torch.equal(new, plain) and (factor == 1).all() and torch.equal(maths.value(plain, ones)[0], plain)


def test_where_nothing_else_is_looked_at():
    """Rounding is not blown up without end."""
    new, factor = maths.attention(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1), maths.least(torch.bfloat16))
    assert new.item() == 0 and factor.item() == 64
    assert maths.least(torch.float32) == 2**-14


def test_gains_of_masks_and_columns():
    masks = random(2, 3, 6, 9, seed=3)  # two pictures, three phrases; parts outside of [0, 1]
    grid = (2, 3)
    on_grid = maths.placed(masks, grid)
    weights = torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64)
    found = maths.of_columns(maths.gains(weights, on_grid, 0.25), [(0, 1), (1,), (3, 2)], 4)
    assert found.shape == (2, 6, 4)
    for s in range(2):
        for pixel in range(6):
            y, x = divmod(pixel, 3)
            at = [min(max(float(v), 0), 1) for v in masks[s, :, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3].flatten()]
            share = [sum(at[9 * p : 9 * p + 9]) / 9 for p in range(3)]
            gain = [0.25 + share[p] * (float(weights[p]) - 0.25) for p in range(3)]
            right = torch.tensor([gain[0], gain[0] * gain[1], gain[2], gain[2]], dtype=torch.float64)
            torch.testing.assert_close(found[s, pixel], right)
    assert maths.gains(weights).shape == (1, 3, 1) and maths.placed(masks[..., :1, :1], (4, 4)).shape == (2, 3, 16)
