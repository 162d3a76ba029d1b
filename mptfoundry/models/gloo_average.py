"""Correct gradient averages for FSDP2 on CPUs.

FSDP2 asks the communication backend to average gradients over ranks. On CPUs that is gloo, whose
reduce-scatter sums without dividing (https://github.com/pytorch/pytorch/issues/162338): gradients come out
multiplied by the number of ranks, without an error. LION and Adam hardly change, but clipping by norm does.
Gloo's all-reduce, which several replicas need, doesn't support averages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives


def average_gradients(model: nn.Module) -> None:
    """Make FSDP2 sum gradients on CPUs and divide them by the number of ranks itself.

    Args:
        model: An already sharded model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _sum_and_divide(module)


def _sum_and_divide(module: Any) -> None:
    """Request sums over the ranks instead of averages, and divide them afterwards."""
    if hasattr(module, "set_force_sum_reduction_for_comms"):
        module.set_force_sum_reduction_for_comms(True)
    else:
        # Before PyTorch 2.8, FSDP2 sums only float16, and only this function decides that. With several
        # replicas it also asserts an event, which CPU streams don't record.
        _fsdp_collectives._get_gradient_divide_factors = _divide_afterwards  # type: ignore[assignment]
        torch.cpu.Stream.record_event = _record_event  # type: ignore[assignment]


def _divide_afterwards(shards: Any, replicas: Any, *_: Any) -> tuple[float, float]:
    """The divisors before and after reduction over shards and replicas; a group may be None."""
    return 1.0, float(shards.size() * (1 if replicas is None else replicas.size()))


def _record_event(stream: Any, event: Any = None) -> Any:
    return event or torch.cpu.Event()
