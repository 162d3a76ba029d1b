"""The lines of a run's `metrics.jsonl`: read, cut where a run starts again, and smoothed for pictures.

A disk may have damaged them, or a kill cut them short: what can't be read is left out, and stops nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np

from mptfoundry.files import whole_or_absent

Row = dict[str, Any]

NAME = "metrics.jsonl"
# Of a batch's row: None where it isn't known, such as `mfu` on a CPU.
MEASURED = (
    "grad_norm",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "mfu",
    "mfu_causal",
    "peak_memory_bytes",
    "eta_seconds",
)
# A number as large as this one was not measured, and nothing can be drawn with it.
_TOO_LARGE = 1e100


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a metrics file in their order; lines that a kill or a bad disk has damaged are left out.

    Every row has a `batch`; one with a `loss` is a batch's and has `tokens`, one with an `eval` is an
    evaluation's. What is measured is a number or None.

    Args:
        path: A `metrics.jsonl`, also one that is being written.
    """
    with Path(path).open("rb") as file:
        for line in file:
            row = _parse(line)
            if row is not None and _is_complete(row):
                yield row


def cut_rows(path: str | Path, *, last_batch: int) -> None:
    """Drop the rows past `last_batch` and damaged lines; with 0, the start of a run, all rows are dropped.

    The file is replaced as a whole, so a kill leaves either the old one or the new one.
    """
    path = Path(path)
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _belongs(line, last_batch)]
    if len(kept) == len(lines):
        return
    with whole_or_absent(path, overwrite=True) as temporary:
        temporary.write_bytes(b"".join(kept))


def _belongs(line: bytes, last_batch: int) -> bool:
    row = _parse(line)
    return row is not None and last_batch > 0 and row["batch"] <= last_batch


def _parse(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and type(row.get("batch")) is int and row["batch"] >= 0
    return row if is_row else None


def _is_complete(row: Row) -> bool:
    measured = [name for name in ("tokens", "loss", "lr", "seconds", *MEASURED) if name in row]
    if not all(_is_number(row[name]) or row[name] is None for name in measured):
        return False
    if "loss" in row:
        return row["batch"] > 0 and _is_number(row.get("tokens"))
    if "eval" not in row:
        return True
    results = row["eval"].values() if isinstance(row["eval"], dict) else [None]
    return all(_is_result(result) for result in results)


def _is_result(result: Any) -> bool:
    """Whether it is what an evaluation of one label gives: numbers by name."""
    return isinstance(result, dict) and all(_is_number(each) or each is None for each in result.values())


def _is_number(value: Any) -> bool:
    """Whether it is one that a picture can show."""
    return type(value) in (int, float) and abs(value) < _TOO_LARGE


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
