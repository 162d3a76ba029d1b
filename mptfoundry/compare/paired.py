"""Statistics of paired answers: the same documents, answered by two models.

Documents are what varies: an interval says how far a difference would move if other documents of the same
kind were drawn. Both models answer each drawn document, so what makes a document hard for both cancels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
_QUANTILES = (0.025, 0.975)
_FEW_VALUES = 16
# Documents that are drawn at once.
_BLOCK = 4_000_000


def resampled_means(differences: Sequence[float] | np.ndarray, seed: int) -> np.ndarray:
    """Means of as many documents as there are, drawn with replacement.

    Args:
        differences: (documents,) the second model's value minus the first one's.
        seed: Seed of the draws.

    Returns:
        (RESAMPLES,) float64.
    """
    each = np.asarray(differences, dtype=np.float64)
    total, random = len(each), np.random.default_rng(seed)
    values, counts = np.unique(each, return_counts=True)
    if len(values) <= _FEW_VALUES:
        # Documents with equal differences are interchangeable: draw how often each value occurs.
        return random.multinomial(total, counts / total, size=RESAMPLES) @ values / total
    rows = max(1, _BLOCK // total)
    sizes = [min(rows, RESAMPLES - first) for first in range(0, RESAMPLES, rows)]
    drawn = [each[random.integers(total, size=(size, total), dtype=np.int32)].mean(1) for size in sizes]
    return np.concatenate(drawn)


def interval(means: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of resampled means."""
    low, high = np.quantile(means, _QUANTILES)
    return float(low), float(high)


def mcnemar(wins: int, losses: int) -> float:
    """McNemar's exact test, two-sided: how often chance alone splits `wins + losses` at least as unevenly."""
    flips = wins + losses
    term = total = 1
    for place in range(1, min(wins, losses) + 1):
        term = term * (flips - place + 1) // place
        total += term
    return min(1.0, 2 * total / 2**flips)
