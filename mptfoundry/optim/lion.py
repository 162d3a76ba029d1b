"""LION with decoupled weight decay.

LION (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", https://arxiv.org/abs/2302.06675,
algorithm 2) moves every weight by the learning rate, in the direction of a sign:

    u_t     = sign(beta1 * m_{t-1} + (1 - beta1) * g_t)
    theta_t = (1 - weight_decay * lr_t / lr_0) * theta_{t-1} - lr_t * u_t
    m_t     = beta2 * m_{t-1} + (1 - beta2) * g_t

The paper shrinks the weights by `lr_t * weight_decay`. Here the decay depends only on the schedule,
`lr_t / lr_0`, and not on the size of the learning rate (Loshchilov & Hutter 2019,
https://arxiv.org/abs/1711.05101): a weight decay of 1e-4 removes 1e-4 of every weight per step at full
learning rate, whatever that rate is, so the two can be tuned independently.

The state is one number per weight; Adam needs two. The step never syncs with the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mptfoundry.optim.gradients import local_part

# The signs are a temporary tensor; updates in chunks of at most this many elements keep it small.
ELEMENTS_AT_ONCE = 1 << 26


def lion_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float,
    initial_lr: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """The equations above for one tensor, as a pure function: the reference for `DecoupledLionW`.

    Args:
        param: The weights, of any shape.
        grad: Their gradient, of the same shape.
        exp_avg: The momentum `m`, of the same shape; zeros before the first step.
        lr: The learning rate of this step.
        initial_lr: The peak learning rate of the schedule, `lr_0`.
        weight_decay: Fraction of every weight that a step at full learning rate removes.
        betas: The momentum's coefficients: for the direction, and for the momentum's own update.

    Returns:
        The new weights and the new momentum.
    """
    direction = exp_avg.lerp(grad, 1 - betas[0]).sign()
    shrunk = param * _shrinkage(lr, initial_lr, weight_decay)
    return shrunk.add(direction, alpha=-lr), exp_avg.lerp(grad, 1 - betas[1])


class DecoupledLionW(torch.optim.Optimizer):
    """LION for any parameters, including sharded ones (DTensor); see the equations at the top of this file.

    The state of a parameter is `exp_avg`, and a group has `lr`, `initial_lr`, `betas` and `weight_decay`.
    The names are those of llm-foundry's optimizer, so its checkpoints load.

    Args:
        params: Parameters, or groups of them with their own options.
        lr: The peak learning rate of the schedule. LION needs a tenth to a third of Adam's.
        betas: The momentum's coefficients: for the direction, and for the momentum's own update.
        weight_decay: Fraction of every weight that a step at full learning rate removes.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters that share options; missing options get the optimizer's defaults."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Sharding recreates groups in the middle of a schedule, where `lr` may be 0; `initial_lr` never is.
        assert group.setdefault("initial_lr", group["lr"]) > 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Call `closure` if given, update every parameter that has a gradient, and return the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _runs([p for p in group["params"] if p.grad is not None]):
                self._update(params, group)
        return loss

    def _update(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        for param in params:
            if "exp_avg" not in self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        weights = [local_part(param) for param in params]
        momenta = [local_part(self.state[param]["exp_avg"]) for param in params]
        grads = [
            local_part(param.grad).to(momentum.dtype)  # type: ignore[arg-type]
            for param, momentum in zip(params, momenta, strict=True)
        ]
        lr, (beta1, beta2) = group["lr"], group["betas"]
        directions = torch._foreach_lerp(momenta, grads, 1 - beta1)
        torch._foreach_sign_(directions)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, _shrinkage(lr, group["initial_lr"], group["weight_decay"]))
        torch._foreach_add_(weights, directions, alpha=-lr)
        torch._foreach_lerp_(momenta, grads, 1 - beta2)


def _shrinkage(lr: float, initial_lr: float, weight_decay: float) -> float:
    return 1 - weight_decay * lr / initial_lr


def _runs(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Split into chunks of one device and dtype, for PyTorch's foreach kernels, and of bounded size."""
    run: list[Tensor] = []
    elements = 0
    for param in params:
        kind, size = (param.device, param.dtype), local_part(param).numel()
        if run and (kind != (run[0].device, run[0].dtype) or elements + size > ELEMENTS_AT_ONCE):
            yield run
            run, elements = [], 0
        run.append(param)
        elements += size
    if run:
        yield run
