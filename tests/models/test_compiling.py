"""Compiled blocks; their graphs on a GPU are held by tests/pretended/test_network.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mptfoundry.errors import ConfigError
from mptfoundry.models.compiling import compile_blocks
from mptfoundry.mpt.network import MPT
from tests.conftest import TINY


class Unsupported(RuntimeError):
    """Stands for the compiler's own."""

    __module__ = "torch._dynamo.exc"


def test_why_a_block_is_not_one_graph_is_said_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compile(forward: Any, **options: Any) -> Any:
        asked.append(options)

        def run(*args: Any) -> Any:
            raise Unsupported("Call to `print`\n  Explanation: and more lines")

        return run

    monkeypatch.setattr(torch, "compile", compile)
    network, ids = MPT(TINY, seed=0), torch.zeros(1, 8, dtype=torch.int64)
    compile_blocks(network, fullgraph=True)
    with pytest.raises(
        ConfigError, match=r"compile_config.fullgraph: .* one graph: Call to `print`\. Set it to"
    ):
        network(ids)
    assert asked == [{"fullgraph": True}] * TINY.n_layers


def test_other_errors_of_a_compiled_block_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(torch, "compile", lambda forward, **options: fail)
    network = MPT(TINY, seed=0)
    compile_blocks(network)
    with pytest.raises(MemoryError):
        network(torch.zeros(1, 8, dtype=torch.int64))
