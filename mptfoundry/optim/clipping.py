"""Measure the gradient norm once per step, and clip gradients that are too large.

The norm is over all parameters together, `sqrt(sum of squares)`, in float32. It is the same number on every
rank for any sharding: each rank sums the squares of its shards, and the sums are all-reduced over the shard
groups. The norm stays on the device, where the step guard reads it together with the loss.

A fused LION clips by norm in its own pass over the gradients, which stay as they are.
"""

from __future__ import annotations

from typing import Literal

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor

from mptfoundry.optim.gradients import clamp, global_norm, scale_for_norm, scale_to_norm

ClippingType = Literal["norm", "value", "adaptive"]


class GradientClipping(Algorithm):
    """Measures the gradient norm at each step, logs it as `grad_norm`, and clips if configured.

    Args:
        clipping_type: `norm` scales all gradients so that their norm is at most the threshold; `value` clamps
            every element to [-threshold, threshold]; `adaptive` scales by each unit's own ratio of gradient
            to weight (https://arxiv.org/abs/2102.06171).
        clipping_threshold: None measures only.

    Attributes:
        grad_norm: The norm before clipping, a 0-d float32 tensor on the device; a number once the step guard
            has read it; None before the first step.
    """

    def __init__(self, clipping_type: ClippingType = "norm", clipping_threshold: float | None = None) -> None:
        self.clipping_type = clipping_type
        self.clipping_threshold = clipping_threshold
        self.grad_norm: Tensor | float | None = None

    def __repr__(self) -> str:
        return f"GradientClipping({self.clipping_type!r}, {self.clipping_threshold})"

    def match(self, event: Event, state: State) -> bool:
        """Run after the gradients of a whole batch, and at the end of the batch."""
        return event in (Event.AFTER_TRAIN_BATCH, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Measure and clip; log at the end of the batch."""
        if event == Event.AFTER_TRAIN_BATCH:
            self._clip(state)
        elif self.grad_norm is not None:
            logger.log_metrics({"grad_norm": float(self.grad_norm)})

    @torch.no_grad()
    def _clip(self, state: State) -> None:
        threshold = self.clipping_threshold
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        self.grad_norm = norm = global_norm(gradients)
        if threshold is None:
            return
        fused = next((each for each in state.optimizers if hasattr(each, "gradient_scale")), None)
        if self.clipping_type == "norm" and fused is not None:
            fused.gradient_scale = scale_for_norm(norm, threshold)
        elif self.clipping_type == "norm":
            scale_to_norm(gradients, norm, threshold)
        elif self.clipping_type == "value":
            clamp(state.model.parameters(), threshold)
        else:
            _clip_adaptively(state.model, threshold)


def _clip_adaptively(model: torch.nn.Module, threshold: float) -> None:
    # Composer's package of algorithms is only imported where it is used.
    from composer.algorithms.gradient_clipping.gradient_clipping import apply_gradient_clipping

    apply_gradient_clipping(model, "adaptive", threshold, fsdp_enabled=False)
