"""What benchmarks make of their answers, against the numbers written out."""

import math

import pytest

from attune.tools.benchmarks.shared.pictures import interval, paired, shown_change, shown_share


def test_wilsons_interval_solves_its_equation():
    for hits, number in ((0, 10), (3, 10), (250, 500), (10, 10)):
        for bound in interval(hits, number):
            share = hits / number
            assert (share - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / number, abs=1e-12)


def test_paired_differences():
    before, after = [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]
    mean, low, high = paired(before, after)
    spread = math.sqrt(sum((d - 0.25) ** 2 for d in (1, 0, -1, 1)) / 3)
    assert mean == 0.25 and high - mean == pytest.approx(1.96 * spread / 2) and mean - low == pytest.approx(high - mean)


def test_cells_of_tables():
    assert shown_share([True] * 455 + [False] * 45) == "91.0 % (88-93)"
    assert shown_share([]) == "0.0 % (0-100)"
    assert shown_change([0.0, 0.0], [0.0, 1.0]) == "+50.0 (-48.0 to +148.0)"
    assert shown_change([0.5, 0.5], [0.5, 0.5], percent=False) == "+0.000 (+0.000 to +0.000)"
