"""Moments of a benchmark: on a GPU events in its queue, so that Python's own time does not count."""

from __future__ import annotations

import time
from typing import Any

import torch


def stamp(device: str) -> Any:
    """This moment, on `cpu` or `cuda`."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds from one moment to another."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
