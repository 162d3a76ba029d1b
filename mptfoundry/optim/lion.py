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

With a `momentum_dtype` the momentum is stored as `momentum.py` says, and computed in float32: a step widens
it, and rounds the new one to nearest. The sign comes from the float32 sum, before any rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mptfoundry.optim import momentum as storage
from mptfoundry.optim.gradients import local_part

# A parameter's weights, gradient and momentum on this rank; fourth, the scales of a momentum in 8 bits.
Shard = tuple[Tensor, ...]
# A step makes several passes over as many elements as are updated together. On a GPU the number bounds the
# memory of the signs; on a CPU so many for each thread stay in its cache from one pass to the next.
ELEMENTS_AT_ONCE = {"cuda": 1 << 26, "cpu": 1 << 17}


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
    shrunk = param * shrinkage(lr, initial_lr, weight_decay)
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
        momentum_dtype: The dtype in which the momentum is stored, also if a checkpoint has another one:
            bfloat16 or int8. None: the dtype of the weights.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        momentum_dtype: torch.dtype | None = None,
    ) -> None:
        self.momentum_dtype = momentum_dtype
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters that share options; missing options get the optimizer's defaults."""
        super().add_param_group(param_group)
        # Sharding recreates groups in the middle of a schedule, where `lr` may be 0; `initial_lr` never is.
        assert self.param_groups[-1].setdefault("initial_lr", self.param_groups[-1]["lr"]) > 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Call `closure` if given, update every parameter that has a gradient, and return the loss."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            shards = [self._shard(param, param.grad) for param in group["params"] if param.grad is not None]
            (self.update if self.momentum_dtype is None else self.update_rounded)(shards, group)
        return loss

    def update(self, shards: Sequence[Shard], group: dict[str, Any]) -> None:
        """Update the weights and momenta of a group's shards."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for weights, grads, momenta in _runs(shards):
            directions = torch._foreach_lerp(momenta, grads, 1 - beta1)
            torch._foreach_sign_(directions)
            if group["weight_decay"]:
                torch._foreach_mul_(weights, shrinkage(lr, group["initial_lr"], group["weight_decay"]))
            torch._foreach_add_(weights, directions, alpha=-lr)
            torch._foreach_lerp_(momenta, grads, 1 - beta2)

    def update_rounded(self, shards: Sequence[Shard], group: dict[str, Any]) -> None:
        """As `update`, in the weights' dtype, with momenta that are stored in `momentum_dtype`."""
        for weight, grad, *stored in _pieces(shards):
            momentum = storage.widen(*stored, dtype=weight.dtype)
            DecoupledLionW.update(self, [(weight, grad, momentum)], group)
            storage.store(momentum, *stored)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles have: what PyTorch keeps, and the momentum's dtype."""
        return {**super().__getstate__(), "momentum_dtype": self.momentum_dtype}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. PyTorch casts it to the weights' dtype; here the momentum gets its own."""
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            if "exp_avg" in state:
                storage.convert_state(state, param, self.momentum_dtype or param.dtype)

    def _shard(self, param: Tensor, grad: Tensor) -> Shard:
        """This rank's shard: the update is elementwise, so a shard needs nothing from the others."""
        state, dtype = self.state[param], self.momentum_dtype
        if "exp_avg" not in state:
            state |= (
                {"exp_avg": torch.zeros_like(param)} if dtype is None else storage.new_state(param, dtype)
            )
        return tuple(
            map(local_part, (param, grad, *(state[name] for name in storage.STATE if name in state)))
        )


def shrinkage(lr: float, initial_lr: float, weight_decay: float) -> float:
    """What weight decay multiplies all weights by in a step."""
    return 1 - weight_decay * lr / initial_lr


def _runs(shards: Iterable[Shard]) -> Iterator[Iterable[tuple[Tensor, ...]]]:
    """Shards of one device and dtype, and of bounded size, for PyTorch's foreach kernels."""
    run: list[Shard] = []
    kind, room = None, 0
    for weight, grad, momentum in _pieces(shards):
        if run and (kind != (weight.device, weight.dtype) or weight.numel() > room):
            yield zip(*run, strict=True)
            run = []
        kind = weight.device, weight.dtype
        room = (room if run else _most_elements(weight)) - weight.numel()
        run.append((weight, grad.to(momentum.dtype), momentum))
    if run:
        yield zip(*run, strict=True)


def _pieces(shards: Iterable[Shard]) -> Iterator[Shard]:
    """Cut what is larger than a run, where it is contiguous."""
    for shard in shards:
        most, all_of_it = _most_elements(shard[0]), shard[0].numel()
        if all_of_it <= most or not all(tensor.is_contiguous() for tensor in shard):
            yield shard
        else:  # there are fewer scales than weights
            yield from zip(*(t.view(-1).split(most * t.numel() // all_of_it) for t in shard), strict=True)


def _most_elements(tensor: Tensor) -> int:
    return ELEMENTS_AT_ONCE["cpu"] * torch.get_num_threads() if tensor.is_cpu else ELEMENTS_AT_ONCE["cuda"]
