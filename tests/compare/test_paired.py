"""The statistics agree with scipy's, and with what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from mptfoundry.compare.paired import interval, mcnemar, resampled_means

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(
    ("wins", "losses"), [(0, 0), (1, 0), (3, 9), (12, 6), (40, 40), (250, 310), (9000, 9300)]
)
def test_mcnemar_is_an_exact_binomial_test(wins: int, losses: int) -> None:
    flips = wins + losses
    expected = scipy_stats.binomtest(wins, flips).pvalue if flips else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["answers", "likelihoods"])
def test_the_interval_is_scipys_paired_bootstrap(kind: str) -> None:
    random = np.random.default_rng(5)
    before = random.normal(size=300)
    after = before + random.normal(0.1, 0.6, size=300)
    if kind == "answers":
        before, after = (before > 0.2).astype(float), (after > 0.2).astype(float)

    def difference(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
        return other.mean(axis) - one.mean(axis)

    found = scipy_stats.bootstrap(
        (before, after), difference, paired=True, n_resamples=10_000, method="percentile", rng=random
    ).confidence_interval
    low, high = interval(resampled_means(after - before, seed=1))
    width = found.high - found.low
    assert low == pytest.approx(found.low, abs=0.06 * width)
    assert high == pytest.approx(found.high, abs=0.06 * width)


def test_an_interval_holds_the_true_difference_nineteen_times_out_of_twenty() -> None:
    """Of documents where the second model wins 30 % and loses 20 %, the true difference is 0.1."""
    random = np.random.default_rng(3)
    inside = 0
    for seed in range(300):
        low, high = interval(
            resampled_means(random.choice([1, -1, 0], p=[0.3, 0.2, 0.5], size=120), seed)[:2000]
        )
        inside += low <= 0.1 <= high
    assert 0.91 < inside / 300 < 0.98


def test_the_same_seed_draws_the_same_documents() -> None:
    differences = [1.0, 0.0, -1.0, 0.0, 1.0]
    assert np.array_equal(resampled_means(differences, 7), resampled_means(differences, 7))
    assert not np.array_equal(resampled_means(differences, 7), resampled_means(differences, 8))
    assert interval(resampled_means([0.0] * 50, 7)) == (0.0, 0.0)
