"""Scores: the mathematics against loops in float64."""

import itertools
import math

import pytest
import torch

from attune.methods import scores as maths


def unit(count, size, seed=0):
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def test_cosines_and_preference_are_dot_products():
    a, b = unit(4, 7), unit(3, 7, 1)
    for i, j in itertools.product(range(4), range(3)):
        slow = sum(float(a[i, k]) * float(b[j, k]) for k in range(7))
        assert math.isclose(float(maths.cosines(a, b)[i, j]), slow, abs_tol=1e-12)
        assert math.isclose(float(maths.preference(a, b, 42.0)[i, j]), 42 * slow, abs_tol=1e-10)


def test_clip_iqa_is_the_share_of_the_first_opposite():
    found = unit(5, 2)
    for (good, bad), share in zip(found.tolist(), maths.clip_iqa(found, 20.0).tolist(), strict=True):
        assert math.isclose(share, math.exp(20 * good) / (math.exp(20 * good) + math.exp(20 * bad)), rel_tol=1e-9)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_diversity_is_the_mean_over_all_pairs(count):
    a = unit(count, 6, count)
    pairs = [1 - float(a[i] @ a[j]) for i in range(count) for j in range(count) if i < j]
    assert math.isclose(maths.diversity(a), sum(pairs) / len(pairs), abs_tol=1e-12)


def test_equal_pictures_have_no_diversity_and_one_has_none_to_measure():
    assert maths.diversity(unit(1, 6).repeat(4, 1)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="two or more"):
        maths.diversity(unit(1, 6))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_a_head_is_its_layers_one_after_the_other(both, activation):
    torch.manual_seed(1)
    sizes = [12 if both else 6, 5, 3, 1]
    state = {}
    for n, (i, o) in enumerate(itertools.pairwise(sizes)):  # numbers with gaps, as where a dropout is between
        state |= {f"layers.{2 * n}.weight": torch.randn(o, i).double(), f"layers.{2 * n}.bias": torch.randn(o).double()}
    head = maths.Head.of(state, {"activation": activation, "mean": "0.5", "std": "2"})
    a, b = unit(3, 6), unit(2, 6, 1)
    bend = {"none": lambda x: x, "relu": lambda x: max(x, 0), "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))}
    got = head.rewards(a, b)
    assert got.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        x = [*a[i].tolist(), *(b[j].tolist() if both else [])]
        for n in range(3):
            weight, bias = state[f"layers.{2 * n}.weight"].tolist(), state[f"layers.{2 * n}.bias"].tolist()
            x = [bend[activation](v) for v in x] if n else x
            x = [sum(w * v for w, v in zip(row, x, strict=True)) + c for row, c in zip(weight, bias, strict=True)]
        assert math.isclose(float(got[i, j]), (x[0] - 0.5) / 2, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize(
    "state, metadata",
    [
        ({}, {}),
        ({"layers.0.weight": torch.ones(1, 4)}, {}),
        ({"layers.0.weight": torch.ones(2, 4), "layers.0.bias": torch.ones(2)}, {}),
        ({"conv.weight": torch.ones(1, 4), "conv.bias": torch.ones(1)}, {}),
        ({"layers.0.weight": torch.ones(1, 4), "layers.0.bias": torch.ones(1)}, {"activation": "tanh"}),
    ],
)
def test_what_is_no_head_is_refused(state, metadata):
    with pytest.raises(ValueError):
        maths.Head.of(state, metadata)


def test_a_head_of_another_encoder_is_refused():
    head = maths.Head.of({"layers.0.weight": torch.ones(1, 5), "layers.0.bias": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="another encoder"):
        head.rewards(unit(1, 6).float(), unit(1, 6).float())


def test_a_box_holds_the_mask_and_nothing_more():
    mask = torch.zeros(9, 12)
    mask[2:5, 3:11] = 1
    mask[3, 3] = 0.4
    assert maths.around(mask) == (3, 2, 11, 5)
    assert maths.around(torch.zeros(4, 4)) is None
    assert maths.crop(torch.arange(12.0)[None, :, None].expand(9, 12, 3), (3, 2, 11, 5)).shape == (3, 8, 3)
    assert maths.within((-3.2, 1.4, 99, 5.1), 9, 12) == (0, 1, 12, 6)
    assert maths.within((5, 5, 5.5, 5.5), 9, 12) is None
