"""Curves of a run, such as its losses: what is shown of them in reports and cards. Holes are NaN."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import isnan, nan

import numpy as np

# Shorter curves aren't smoothed.
FEWEST_POINTS = 20


def smooth(values: Sequence[float]) -> list[float]:
    """Centred means over a fortieth of the points on each side, and fewer towards the start.

    Each side has as many points as the other, so that a curve that falls evenly stays where it is. At the
    end, where one side is short, a line through the points takes the place of their mean.
    """
    sums = [0.0, *accumulate(0.0 if isnan(value) else value for value in values)]
    counts = [0, *accumulate(int(not isnan(value)) for value in values)]
    means = []
    for place in range(len(values)):
        side = min(round(len(values) / 2 / FEWEST_POINTS), place)
        first, end = place - side, place + side + 1
        if end > len(values):
            means.append(_on_a_line(values[first:], side))
        else:
            count = counts[end] - counts[first]
            means.append((sums[end] - sums[first]) / count if count else nan)
    return means


def mean_at_the_end(values: Sequence[float]) -> float | None:
    """The mean over the last twentieth of the points, at least one; None where that has no number."""
    last = [value for value in values[-max(1, round(len(values) / 20)) :] if not isnan(value)]
    return sum(last) / len(last) if last else None


def _on_a_line(values: Sequence[float], place: int) -> float:
    """What a line through the points, least squares, is at one place."""
    x, y = np.arange(len(values)) - float(place), np.asarray(values, float)
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    if len(y) < 2:
        return float(y[0]) if len(y) else nan
    slope = ((x - x.mean()) * (y - y.mean())).sum() / np.square(x - x.mean()).sum()
    return float(y.mean() - slope * x.mean())
