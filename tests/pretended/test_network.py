"""What the network does on a GPU besides computing: waits, wrong devices, and graphs of compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.pretended.conftest import LOOKS_AT_ALL


@pytest.fixture(scope="module")
def found(start: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    return start("network.py", "all" if LOOKS_AT_ALL else "some")


def test_the_pretended_gpu_notes_what_waits(found: dict[str, dict[str, Any]]) -> None:
    seen = {"copy to the device": 1, "read a number": 1, "count for nonzero": 1}
    assert found["waits"]["three waits"] == seen


def test_a_step_of_no_network_waits_or_leaves_the_gpu(found: dict[str, dict[str, Any]]) -> None:
    steps = {name: step for name, step in found["waits"].items() if name != "three waits"}
    assert {"alibi, plain", "everything, packed", "everything, checkpointed"} <= steps.keys()
    assert {name: step for name, step in steps.items() if step} == {}


def test_compiled_blocks_are_one_graph_for_each_length(found: dict[str, dict[str, Any]]) -> None:
    graphs = found["graphs"]
    assert {"packed, two lengths", "checkpointed and packed"} <= graphs.keys()
    assert {name: graph for name, graph in graphs.items() if graph["breaks"]} == {}
    assert {name: graph for name, graph in graphs.items() if graph["graphs"] not in (1, 2)} == {}
