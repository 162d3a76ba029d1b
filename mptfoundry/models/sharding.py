"""What FSDP2 can do and Composer doesn't ask of it: hybrid sharding, explicit prefetch, starting on a CPU.

Ranks form a mesh of (replicas, shards): each row of it holds the weights once, cut into shards. One replica
is full sharding; with more, gradients are summed within a row and then averaged over the rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from composer.utils.parallelism import FSDP2Config
from torch import nn
from torch.distributed.fsdp import FSDPModule


class HybridConfig(FSDP2Config):
    """FSDP2 with several replicas; Composer makes the mesh from the two properties.

    Args:
        replicas: How often the weights exist.
        shards: Into how many shards each replica is cut; `replicas * shards` is the number of ranks.
        options: As for `FSDP2Config`.
    """

    def __init__(self, *, replicas: int, shards: int, **options: Any) -> None:
        super().__init__(**options)
        self._replicas, self._shards = replicas, shards

    @property
    def data_parallel_replicate_degree(self) -> int:
        """How often the weights exist."""
        return self._replicas

    @property
    def data_parallel_shard_degree(self) -> int:
        """Into how many shards each replica is cut."""
        return self._shards


def prefetch(network: Any, *, forward: int, backward: int) -> None:
    """Gather weights of the next blocks while one is being computed, instead of leaving it to FSDP2.

    Args:
        network: Sharded by FSDP2, with its blocks in `transformer.blocks`.
        forward: How many blocks ahead; 0 leaves it to FSDP2, which has the next gather wait for a free queue.
        backward: The same in backward; 0 leaves it to FSDP2, which gathers one ahead.
    """
    blocks = list(network.transformer.blocks)
    assert isinstance(network, FSDPModule)
    for i, block in enumerate([network, *blocks]):
        if forward:
            block.set_modules_to_forward_prefetch(blocks[i : i + forward])
    for i, block in enumerate([network, *reversed(blocks)]):
        if backward:
            block.set_modules_to_backward_prefetch(blocks[::-1][i : i + backward])


def start_on_the_cpu(network: nn.Module) -> None:
    """Allocate shards of parameters on the meta device on the CPU, where Composer asks for a GPU."""
    for module in network.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty = partial(_to_empty_on_the_cpu, module)  # type: ignore[method-assign]


def _to_empty_on_the_cpu(module: nn.Module, *, device: torch.device | str, recurse: bool = True) -> nn.Module:
    del module.to_empty
    return module.to_empty(device="cpu", recurse=recurse)
