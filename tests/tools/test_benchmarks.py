"""What benchmarks make of their answers, against the numbers written out."""

import math

import pytest

from attune.prove.statistics import interval, paired, shown_change, shown_share


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


def test_a_table_of_prove_says_what_was_gained_and_lost():
    from attune.tools.benchmarks import prove

    def drawn(method, item, *answers):
        parts = ("present", "colours", "patterns", "all")
        return [[method, item, item, "reader", part, float(a)] for part, a in zip(parts, answers, strict=True)]

    rows = [*drawn("plain", 0, 1, 1, 1, 1), *drawn("plain", 1, 1, 0, 1, 0), *drawn("plain", 2, 0, 0, 0, 0)]
    rows += [*drawn("ours", 0, 1, 1, 1, 1), *drawn("ours", 1, 1, 1, 1, 1), *drawn("ours", 2, 1, 0, 1, 0)]
    rows += [["ours", i, i, "change of pixels", "all", change] for i, change in enumerate((0.0, 0.1, 0.2))]
    result = {"rows": rows, "sampling": {"cfg": 5.0}, "methods": [["plain", []], ["ours", []]], "prompts": [["", ""]] * 3}
    plain, ours = prove.rows(result)
    assert plain["all bound"] == "33.3 % (6-79)" and plain["bound, against plain"] == plain["change of pixels"] == ""
    assert ours["objects present"] == "100.0 % (44-100)" and ours["present, against plain"].startswith("+33.3 (")
    assert ours["gained / lost"] == "1 / 0" and ours["change of pixels"] == "0.100" and ours["cfg"] == "5"
    assert "CLIP-T" not in ours
