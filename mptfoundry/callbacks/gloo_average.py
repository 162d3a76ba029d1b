"""Sharded training on CPUs with gradients of the right size.

FSDP2 averages gradients over ranks by asking the communication library for an average. On CPUs that is gloo,
whose reduce-scatter adds up and doesn't divide (https://github.com/pytorch/pytorch/issues/162338): gradients
come out multiplied by the number of ranks, without a word. LION and Adam hardly show it; clipping by norm
does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class AverageGradients(Callback):
    """Divides the gradients of modules that FSDP2 shards by the number of shards, where gloo doesn't."""

    def after_load(self, state: State, logger: Logger) -> None:
        """Try what gloo does, and mend it; the model has been sharded by now."""
        modules = [module for module in state.model.modules() if isinstance(module, FSDPModule)]
        if modules and state.device.name == "cpu" and not gloo_averages():
            for module in modules:
                module.set_all_reduce_hook(_divide_by(number_of_shards(module)))


def gloo_averages() -> bool:
    """Whether a reduce-scatter that is asked for an average gives one; all ranks have to call this."""
    ones = torch.ones(dist.get_world_size())
    average = torch.zeros(1)
    dist.reduce_scatter_tensor(average, ones, op=dist.ReduceOp.AVG)
    return average.item() == 1


def number_of_shards(module: torch.nn.Module) -> int:
    """Into how many parts FSDP2 has cut the parameters of `module`."""
    parameter = next(parameter for parameter in module.parameters() if isinstance(parameter, DTensor))
    mesh, placements = parameter.device_mesh, parameter.placements
    return math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_shard())


def _divide_by(shards: int) -> Callable[[torch.Tensor], None]:
    def divide(gradient: torch.Tensor) -> None:
        gradient.div_(shards)

    return divide
