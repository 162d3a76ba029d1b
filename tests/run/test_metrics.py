from __future__ import annotations

import math

import pytest

from mptfoundry.run.metrics import mean_at_the_end, smooth


@pytest.mark.parametrize("count", [1, 3, 60, 1000])
def test_smoothing_leaves_a_curve_that_falls_evenly_where_it_is(count: int) -> None:
    losses = [10 - 5 * step / count for step in range(count)]
    means = smooth(losses)
    missing = round(count / 40)
    assert means[: count - missing] == pytest.approx(losses[: count - missing])
    assert all(map(math.isnan, means[count - missing :]))


def test_smoothing_neither_trails_a_falling_loss_nor_lies_above_it() -> None:
    losses = [2 + 8 * math.exp(-step / 15) for step in range(60)]
    means = smooth(losses)[:-2]
    losses = losses[:-2]
    assert max(mean - loss for mean, loss in zip(means, losses, strict=True)) < 0.05
    assert means[0] == losses[0] and means[-1] == pytest.approx(losses[-1], abs=0.02)


def test_one_odd_batch_at_the_end_does_not_bend_the_curve() -> None:
    assert max(smooth([2.0] * 399 + [3.0])[:-10]) < 2.1


def test_smoothing_takes_away_noise_in_long_runs_and_little_in_short_ones() -> None:
    def spread(count: int) -> float:
        means = smooth([float(step % 2) for step in range(count)])
        middle = means[count // 3 : -count // 3]
        return max(middle) - min(middle)

    assert spread(4000) < 0.02 and spread(60) < 0.3 and spread(12) == 1


def test_holes_are_passed_over() -> None:
    assert smooth([4.0, math.nan, 4.0])[::2] == [4.0, 4.0]
    assert smooth([4.0] * 50 + [math.nan] + [4.0] * 50)[:-3] == [4.0] * 98


def test_the_end_is_the_mean_of_a_twentieth() -> None:
    assert mean_at_the_end([9.0] * 57 + [1.0, 2.0, 3.0]) == 2
    assert mean_at_the_end([9.0, 1.0]) == 1
    assert mean_at_the_end([math.nan]) is None and mean_at_the_end([]) is None
