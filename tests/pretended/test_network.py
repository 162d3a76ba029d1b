"""What the network does on a GPU besides computing: waits, wrong devices, and graphs of compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def steps(start: Callable[..., Any]) -> dict[str, dict[str, int]]:
    """What was found in a step of each network, by its name and the kind of its rows."""
    return start("network.py", "waits", "alibi", "torch attention", "everything")


def test_the_pretended_gpu_notes_what_waits(steps: dict[str, dict[str, int]]) -> None:
    assert steps["three waits"] == {"copy to the device": 1, "read a number": 1, "count for nonzero": 1}


@pytest.mark.parametrize("kind", ["plain", "packed", "checkpointed"])
@pytest.mark.parametrize("network", ["alibi", "torch attention", "everything"])
def test_a_step_never_waits_and_stays_on_the_gpu(
    network: str, kind: str, steps: dict[str, dict[str, int]]
) -> None:
    assert steps[f"{network}, {kind}"] == {}


def test_compiled_blocks_are_one_graph_each(start: Callable[..., Any]) -> None:
    found = start("network.py", "graphs", "packed, two lengths", "checkpointed and packed", "everything")
    assert len(found) == 3
    assert {name: result["breaks"] for name, result in found.items()} == dict.fromkeys(found, 0)
    assert {name: result["graphs"] for name, result in found.items() if result["graphs"] not in (1, 2)} == {}
