"""Composer's DecoupledAdamW with a step in one pass, by PyTorch's fused kernel.

It has the name, options and state of Composer's, so checkpoints are the same. The numbers are equal within
rounding, but not bit for bit. Composer's own step waits for a GPU once for each parameter; this one never.
"""

from __future__ import annotations

from typing import Any

import torch
from composer import optim
from torch import Tensor

from mptfoundry.optim.gradients import local_part


class DecoupledAdamW(optim.DecoupledAdamW):
    """AdamW as Composer's, with PyTorch's fused kernel."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the kernel needs the number of steps on the parameter's device."""
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(param.device, torch.float32)

    @staticmethod
    def adamw(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
        *,
        lr: float,
        initial_lr: float,
        weight_decay: float,
        **options: Any,
    ) -> None:
        """Update the parameters of a group, as Composer's function of this name.

        PyTorch's kernel shrinks weights by `lr * weight_decay`, Composer's optimizer by
        `lr / initial_lr * weight_decay`, and by `weight_decay` if both rates are 0.
        """
        lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        local = [[local_part(tensor) for tensor in tensors] for tensors in lists]
        if not initial_lr:
            torch._foreach_mul_(local[0], 1 - weight_decay)
        decay = weight_decay / initial_lr if initial_lr else 0.0
        torch._fused_adamw_(*local, lr=lr, weight_decay=decay, maximize=False, **options)
