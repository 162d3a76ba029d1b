"""Measure the gradient norm once per step, and clip gradients that are too large.

The norm is over all parameters together, `sqrt(sum of squares)`, in float32. It is the same number on every
rank for any sharding: each rank sums the squares of its shards, and the sums are all-reduced over the shard
groups. The norm stays on the device until the end of the step, so no step waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from composer.algorithms.gradient_clipping.gradient_clipping import apply_gradient_clipping
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor
from torch.distributed.tensor import DTensor

# Avoids division by zero; PyTorch's clip_grad_norm_ uses the same value.
EPSILON = 1e-6

ClippingType = Literal["norm", "value", "adaptive"]


class GradientClipping(Algorithm):
    """Measures the gradient norm at each step, logs it as `grad_norm`, and clips if configured.

    Args:
        clipping_type: `norm` scales all gradients so that their norm is at most the threshold; `value` clamps
            every element to [-threshold, threshold]; `adaptive` scales by each unit's own ratio of gradient
            to weight (https://arxiv.org/abs/2102.06171).
        clipping_threshold: None measures only.

    Attributes:
        grad_norm: The norm before clipping, a 0-d float32 tensor on the device; None before the first step.
    """

    def __init__(self, clipping_type: ClippingType = "norm", clipping_threshold: float | None = None) -> None:
        self.clipping_type = clipping_type
        self.clipping_threshold = clipping_threshold
        self.grad_norm: Tensor | None = None

    def __repr__(self) -> str:
        return f"GradientClipping({self.clipping_type!r}, {self.clipping_threshold})"

    def match(self, event: Event, state: State) -> bool:
        """Run after the gradients of a whole batch, and at the end of the batch."""
        return event in (Event.AFTER_TRAIN_BATCH, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Measure and clip; log at the end of the batch, where Composer syncs with the device anyway."""
        if event == Event.AFTER_TRAIN_BATCH:
            self._clip(state)
        elif self.grad_norm is not None:
            logger.log_metrics({"grad_norm": self.grad_norm.item()})

    @torch.no_grad()
    def _clip(self, state: State) -> None:
        threshold = self.clipping_threshold
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        self.grad_norm = global_norm(gradients)
        if threshold is None:
            return
        if self.clipping_type == "norm":
            scale_to_norm(gradients, self.grad_norm, threshold)
        elif self.clipping_type == "value":
            clamp(state.model.parameters(), threshold)
        else:
            apply_gradient_clipping(state.model, "adaptive", threshold, fsdp_enabled=False)


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, 0-d float32; a shard of a DTensor counts once."""
    if not gradients:
        return torch.zeros(())
    groups: dict[tuple, list[Tensor]] = {}
    for gradient in gradients:
        layout = (gradient.device_mesh, tuple(gradient.placements)) if isinstance(gradient, DTensor) else ()
        groups.setdefault(layout, []).append(_local(gradient))
    squares = []
    for layout, shards in groups.items():
        parts = [shard for shard in shards if shard.numel()] or [shards[0].new_zeros(1)]
        square = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32)).square().sum()
        if layout:
            mesh, placements = layout
            for dimension, placement in enumerate(placements):
                if not placement.is_replicate():
                    dist.all_reduce(square, group=mesh.get_group(dimension))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def scale_to_norm(gradients: Sequence[Tensor], norm: Tensor, threshold: float) -> None:
    """Scale gradients, with this norm (0-d), in place by `threshold / norm` where that is below 1."""
    scale = (threshold / (norm + EPSILON)).clamp(max=1.0)
    if scale.device.type == "cpu" and scale == 1:
        return
    torch._foreach_mul_([_local(gradient) for gradient in gradients], scale)


def clamp(parameters: Iterable[Tensor], threshold: float) -> None:
    """Clamp every element of the parameters' gradients to [-threshold, threshold], in place."""
    for parameter in parameters:
        if parameter.grad is not None:
            _local(parameter.grad).clamp_(-threshold, threshold)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
