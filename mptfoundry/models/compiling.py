"""Compile the blocks of a network with `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mptfoundry.errors import ConfigError


def compile_blocks(network: Any, **options: Any) -> None:
    """Compile each block's forward; hooks, such as FSDP's, stay outside of the graph.

    Args:
        network: A network with its blocks in `transformer.blocks`, with activation checkpointing if any.
        options: Arguments of `torch.compile`.

    Raises:
        ConfigError: At the first batch: a block isn't one graph, although `fullgraph` is set.
    """
    for block in network.transformer.blocks:
        block.forward = _explained(torch.compile(block.forward, **options))


def _explained(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        try:
            return forward(*args)
        except Exception as error:
            if type(error).__module__ != "torch._dynamo.exc":
                raise
            raise ConfigError(
                f"compile_config.fullgraph: a block can't be compiled as one graph: {_reason(error)}. Set it "
                "to false, which runs these parts of a block uncompiled, or remove compile_config."
            ) from error

    return run


def _reason(error: Exception) -> str:
    """The first line of the compiler's message; traces of its own follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
