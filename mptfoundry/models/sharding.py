"""FSDP2 features that Composer doesn't expose: hybrid sharding, explicit prefetch, initialization on a CPU.

Ranks form a mesh of (replicas, shards): each row of the mesh holds one full copy of the weights, in shards.
One replica is full sharding; with more, gradients are summed within a row and then averaged over the rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from composer.utils.parallelism import FSDP2Config
from torch import nn
from torch.distributed.fsdp import FSDPModule


class HybridConfig(FSDP2Config):
    """FSDP2 with several replicas; Composer builds the mesh from the two properties.

    Args:
        replicas: The number of copies of the weights.
        shards: The number of shards per replica; `replicas * shards` is the number of ranks.
        options: Options of `FSDP2Config`.
    """

    def __init__(self, *, replicas: int, shards: int, **options: Any) -> None:
        super().__init__(**options)
        self._replicas, self._shards = replicas, shards

    @property
    def data_parallel_replicate_degree(self) -> int:
        """The number of copies of the weights."""
        return self._replicas

    @property
    def data_parallel_shard_degree(self) -> int:
        """The number of shards per replica."""
        return self._shards


def prefetch(network: Any, *, forward: int, backward: int) -> None:
    """Set explicitly how many blocks ahead FSDP2 gathers weights while a block computes.

    Args:
        network: Sharded by FSDP2, with its blocks in `transformer.blocks`.
        forward: Blocks ahead in forward; 0: FSDP2's default, where the next gather waits for a free queue.
        backward: Blocks ahead in backward; 0: FSDP2's default, one.
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
    """Make parameters on the meta device materialize on the CPU, although Composer requests a GPU."""
    for module in network.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty = partial(_to_empty_on_the_cpu, module)  # type: ignore[method-assign]


def _to_empty_on_the_cpu(module: nn.Module, *, device: torch.device | str, recurse: bool = True) -> nn.Module:
    del module.to_empty
    return module.to_empty(device="cpu", recurse=recurse)
