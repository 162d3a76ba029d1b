"""The lines of a run's `metrics.jsonl`: read, cut when a run resumes, and smoothed for plots.

A bad disk may damage lines, or a kill may cut them short: unreadable lines are skipped, without an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import isnan, nan
from pathlib import Path
from typing import Any

from mptfoundry.files import whole_or_absent

Row = dict[str, Any]

NAME = "metrics.jsonl"
# Fields of a batch's row: None if not known, such as `mfu` on a CPU.
MEASURED = (
    "grad_norm",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "mfu",
    "mfu_causal",
    "peak_memory_bytes",
    "eta_seconds",
)
# Numbers this large are not measurements, and can't be plotted.
_TOO_LARGE = 1e100


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows of a metrics file in order; lines damaged by a kill or a bad disk are skipped.

    Every row has a `batch`; a row with a `loss` is for a batch and has `tokens`, a row with an `eval` is for
    an evaluation. Measured values are numbers or None. The file may still be growing.
    """
    with Path(path).open("rb") as file:
        yield from (row for row in map(_parse, file) if row is not None and _is_complete(row))


def cut_rows(path: str | Path, *, last_batch: int) -> None:
    """Drop the rows past `last_batch` and damaged lines; with 0, the start of a run, drop all rows.

    The file is replaced in one step, so a kill leaves either the old or the new one.
    """
    path = Path(path)
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
    """Whether this is the result of an evaluation of one label: numbers by name."""
    return isinstance(result, dict) and all(_is_number(each) or each is None for each in result.values())


def _is_number(value: Any) -> bool:
    """Whether this is a number that can be plotted."""
    return type(value) in (int, float) and abs(value) < _TOO_LARGE


# Shorter curves aren't smoothed.
FEWEST_POINTS = 20


def smooth(values: Sequence[float]) -> list[float]:
    """Return centred means over a fortieth of the points on each side, and over fewer at the start.

    Both sides have the same number of points, so that a curve that falls evenly stays where it is. The last
    points, which lack the right side, have no mean (nan): the curve ends a little before the run does.
    """
    sums = [0.0, *accumulate(0.0 if isnan(value) else value for value in values)]
    counts = [0, *accumulate(int(not isnan(value)) for value in values)]
    widest = round(len(values) / 2 / FEWEST_POINTS)
    means = []
    for place in range(len(values)):
        side = min(widest, place)
        first, end = place - side, place + side + 1
        count = counts[end] - counts[first] if end <= len(values) else 0
        means.append((sums[end] - sums[first]) / count if count else nan)
    return means


def mean_at_the_end(values: Sequence[float]) -> float | None:
    """Return the mean over the last twentieth of the points, at least one; None if there is no number."""
    last = [value for value in values[-max(1, round(len(values) / 20)) :] if not isnan(value)]
    return sum(last) / len(last) if last else None
