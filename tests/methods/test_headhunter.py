"""HeadHunter's search against brute force."""

import itertools
import math

import pytest
import torch

from attune.methods import headhunter as maths


def objective(seed, heads=12):
    """A synthetic objective: worth of single heads, of pairs, and noise that depends on the image."""
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(heads, generator=generator, dtype=torch.float64)
    two = torch.randn(heads, heads, generator=generator, dtype=torch.float64) * 0.5
    noise = torch.randn(heads, 8, generator=generator, dtype=torch.float64) * 0.3

    def score(chosen, count):
        total = 0.0
        for i in range(count):
            total += sum(float(one[h] + noise[h, i]) for h in sorted(chosen))
            total += sum(float(two[a, b]) for a, b in itertools.combinations(sorted(chosen), 2))
        return total / count

    return score


def brute_force(score, candidates, rounds, k, images):
    """The greedy search as the paper says it, and nothing clever."""
    chosen = []
    for _ in range(rounds):
        values = {}
        for head in candidates:
            if head not in chosen:
                values[head] = score([*chosen, head], images)
        joined = []
        while len(joined) < k and len(joined) < len(values):
            best = None
            for head in candidates:
                if head in values and head not in joined and (best is None or values[head] > values[best]):
                    best = head
            joined.append(best)
        chosen += joined
    return tuple(chosen)


@pytest.mark.parametrize(("rounds", "k"), [(1, 3), (3, 1), (4, 2), (9, 2)])
def test_search_equals_brute_force(rounds, k):
    for seed in range(5):
        score = objective(seed)
        asked = []

        def evaluate(sets, count, asked=asked, score=score):
            asked.extend((frozenset(s), count) for s in sets)
            return [score(s, count) for s in sets]

        found = maths.hunt(range(12), evaluate, rounds, k, 8)
        assert found.heads == brute_force(score, range(12), rounds, k, 8)
        assert found.plain == 0
        chosen = []
        for r in found.rounds:
            assert set(r.scores) == set(range(12)) - set(chosen)
            assert all(r.scores[h] == score([*chosen, h], 8) for h in r.scores)
            chosen += r.chosen
            assert r.score == score(chosen, 8)
        assert maths.evaluations(12, rounds, k, 8) == 8 * len({s for s, _ in asked})


def test_ties_go_to_the_earlier_candidate():
    found = maths.hunt(["c", "a", "b"], lambda sets, n: [0.0] * len(sets), 2, 1, 1)
    assert found.heads == ("c", "a")


def test_halving_gives_more_images_to_the_promising():
    assert maths.rungs(36, 2, 8, 0) == [(36, 8)]
    assert maths.rungs(36, 2, 8, 2) == [(36, 1), (18, 2), (9, 4), (5, 8)]
    assert maths.rungs(36, 20, 8, 2) == [(36, 8)]
    assert maths.rungs(36, 2, 1, 2) == [(36, 1)]
    score = objective(3)
    most = {}

    def evaluate(sets, count):
        for s in sets:
            most[frozenset(s)] = max(most.get(frozenset(s), 0), count)
        return [score(s, count) for s in sets]

    found = maths.hunt(range(12), evaluate, 2, 1, 8, 2)
    first = found.rounds[0]
    counts = sorted(first.images.values())
    assert counts == [1] * 6 + [2] * 3 + [4] + [8] * 2
    survivors = [h for h, n in first.images.items() if n == 8]
    assert first.chosen[0] == max(survivors, key=lambda h: score([h], 8))
    assert maths.evaluations(12, 2, 1, 8, 2) == sum(most.values()) < 0.5 * maths.evaluations(12, 2, 1, 8)


def test_a_search_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="candidates"):
        maths.hunt([], lambda s, n: [0.0], 1, 1, 1)
    with pytest.raises(ValueError, match="rounds"):
        maths.hunt([1], lambda s, n: [0.0], 0, 1, 1)
    with pytest.raises(ValueError, match="not a number"):
        maths.hunt([1], lambda s, n: [math.nan] * len(s), 1, 1, 1)


def test_only_eligible_heads_join():
    """A round takes fewer where fewer may join, and the search ends where none may; the best of them by brute force."""
    score = objective(5)
    allowed = {1, 4, 7}

    def evaluate(sets, count):
        return [score(s, count) for s in sets]

    def eligible(sets, count):
        return [s[-1] in allowed for s in sets]

    for halving in (0, 2):
        found = maths.hunt(range(12), evaluate, 4, 2, 8, halving, eligible)
        assert set(found.heads) == allowed and [len(r.chosen) for r in found.rounds] == [2, 1]
        assert all(set(r.scores) >= set(range(12)) - set(found.heads) for r in found.rounds)
        values = {h: score([h], 8) for h in allowed}
        assert found.rounds[0].chosen == tuple(sorted(allowed, key=lambda h: -values[h])[:2])
    assert maths.hunt(range(12), evaluate, 4, 2, 8, 0, lambda sets, n: [False] * len(sets)).rounds == ()


def test_harmonic_mean():
    assert maths.harmonic_mean(20.0, 30.0) == pytest.approx(24.0)
    assert maths.harmonic_mean(3.0, 3.0) == 3.0
    assert maths.harmonic_mean(-1.0, 1.0) == maths.harmonic_mean(-2.0, 1.0) == maths.harmonic_mean(0.0, 0.0) == 0
