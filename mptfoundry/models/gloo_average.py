"""Sharded training on CPUs with gradients of the right size.

FSDP2 averages gradients over ranks by asking the communication library for an average. On CPUs that is gloo,
whose reduce-scatter sums and doesn't divide (https://github.com/pytorch/pytorch/issues/162338): gradients
come out multiplied by the number of ranks, without an error. LION and Adam hardly show it; clipping by norm
does. Its all-reduce, which several replicas need, refuses to average.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives


def average_gradients(model: nn.Module) -> None:
    """Have FSDP2 sum gradients on CPUs and divide them itself by the number of ranks.

    Args:
        model: It has been sharded already.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _sum_and_divide(module)


def _sum_and_divide(module: Any) -> None:
    """Ask for sums over the ranks in place of averages, and divide them afterwards."""
    if hasattr(module, "set_force_sum_reduction_for_comms"):
        module.set_force_sum_reduction_for_comms(True)
    else:
        # Before PyTorch 2.8 sums are for float16 alone, and nothing but this function says so; and a step
        # over several replicas asserts an event, which the CPU's streams don't record.
        _fsdp_collectives._get_gradient_divide_factors = _divide_afterwards  # type: ignore[assignment]
        torch.cpu.Stream.record_event = _record_event  # type: ignore[assignment]


def _divide_afterwards(shards: Any, replicas: Any, *_: Any) -> tuple[float, float]:
    """What to divide by before and after adding up over the two groups of ranks; None: no group."""
    return 1.0, float(shards.size() * (1 if replicas is None else replicas.size()))


def _record_event(stream: Any, event: Any = None) -> Any:
    return event or torch.cpu.Event()
