"""Sharded training on CPUs with gradients of the right size.

FSDP2 averages gradients over ranks by asking the communication library for an average. On CPUs that is gloo,
whose reduce-scatter adds up and doesn't divide (https://github.com/pytorch/pytorch/issues/162338): gradients
come out multiplied by the number of ranks, without a word. LION and Adam hardly show it; clipping by norm
does. Its all-reduce, which several copies of the shards need, refuses to average.
"""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives


class AverageGradients(Callback):
    """Has FSDP2 add gradients up on CPUs and divide them itself by the number of ranks."""

    def after_load(self, state: State, logger: Logger) -> None:
        """The model has been sharded by now."""
        if state.device.name != "cpu":
            return
        for module in state.model.modules():
            if isinstance(module, FSDPModule):
                add_up_and_divide(module)


def add_up_and_divide(module: Any) -> None:
    """Ask for sums over the ranks in place of averages, and divide them afterwards."""
    if hasattr(module, "set_force_sum_reduction_for_comms"):
        module.set_force_sum_reduction_for_comms(True)
    else:
        # Before PyTorch 2.8 sums are for float16 alone, and nothing but this function says so; and a step
        # over several copies asserts an event, which the CPU's streams don't record.
        _fsdp_collectives._get_gradient_divide_factors = _divide_afterwards  # type: ignore[assignment]
        torch.cpu.Stream.record_event = _record_event  # type: ignore[assignment]


def _divide_afterwards(shards: Any, copies: Any, *_: Any) -> tuple[float, float]:
    """What to divide by before and after adding up over the two groups of ranks; None is no group."""
    return 1.0, float(shards.size() * (1 if copies is None else copies.size()))


def _record_event(stream: Any, event: Any = None) -> Any:
    return event or torch.cpu.Event()
