"""What a step of the optimizer moves in a GPU's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_lion_in_one_pass_moves_20_bytes_per_parameter_in_one_operator(start: Callable[..., Any]) -> None:
    found = start("optimizer.py")
    assert found["plain"]["bytes"] == 52
    assert found["fused"] == found["fused, clipped"] == {"bytes": 20, "operators": 1}
