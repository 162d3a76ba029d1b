"""LION's step in one pass on a CPU: a function that torch.compile turns into C++.

It is compiled once for all shapes and rates, which takes some seconds at the first step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mptfoundry.errors import TrainingError
from mptfoundry.optim.momentum import store, widen


def lion_step(
    weight: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    scales: Tensor | None,
    copy: Tensor | None,
    scale: Tensor | None,
    lr: float,
    shrinkage: float,
    toward_direction: float,
    toward_momentum: float,
) -> None:  # the arguments of the operator for a GPU, in their order
    """Update float32 weights and their momentum in place, both contiguous; the gradient may have any layout.

    Raises:
        TrainingError: PyTorch can't compile here.
    """
    # As a tensor, numbers that change don't make PyTorch compile again.
    numbers = torch.tensor([lr, shrinkage, toward_direction, toward_momentum])
    tensors = weight, gradient.contiguous(), momentum, scales, copy
    flat = [None if tensor is None else _flat(tensor) for tensor in tensors]
    try:
        _compiled()(*flat, scale, numbers)
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(
            f"optimizer.fused: PyTorch can't compile the step on this machine: {reason} Use auto or false."
        ) from error
    torch.autograd.graph.increment_version(weight)


def _flat(tensor: Tensor) -> Tensor:
    """The tensor's memory as one dimension. As a view, it would be compiled for the shape that it views."""
    return tensor.view(-1).data


@functools.cache
def _compiled() -> Callable[..., None]:
    return torch.compile(_step, fullgraph=True, dynamic=True)


def _step(  # type: ignore[no-untyped-def]
    weight, gradient, momentum, scales, copy, scale, numbers
) -> None:  # fmt: skip
    lr, shrinkage, toward_direction, toward_momentum = numbers.unbind()
    gradient = gradient.float() if scale is None else gradient.float() * scale
    before = widen(momentum, scales, dtype=torch.float32)
    direction = before.lerp(gradient, toward_direction).sign()
    weight.copy_(weight * shrinkage - lr * direction)
    if copy is not None:
        copy.copy_(weight)
    store(before.lerp(gradient, toward_momentum), momentum, scales)
