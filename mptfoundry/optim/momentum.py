"""How LION's momentum is stored when it isn't in the dtype of the weights: in bfloat16, or in 8 bits.

In 8 bits, 64 neighbours in a row of a matrix share a scale in float32, the largest of them divided by 127,
and each is the nearest integer times that scale: 1.06 bytes for each weight. A state has the integers as
`exp_avg` and the scales as `exp_avg_scale`. Where rows can't be cut into such groups, and for vectors such as
those of norms, the momentum is in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mptfoundry.config.optim import MOMENTUM_GROUP as GROUP
from mptfoundry.optim.gradients import local_part

LARGEST = 127
# In the order of the arguments of `widen` and `store`.
STATE = ("exp_avg", "exp_avg_scale")
# Below it a reciprocal isn't finite; all numbers of such a group become 0.
_SMALLEST_SCALE = 2.0**-120


def new_state(param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of a parameter before the first step, sharded as the parameter.

    Args:
        param: The weights, of any shape; a DTensor if they are sharded.
        dtype: That of the momentum.
    """
    state = {"exp_avg": torch.zeros_like(param, dtype=_dtype_of(param, dtype))}
    if _has_scales(param, dtype):
        of_groups = param[..., ::GROUP]
        state["exp_avg_scale"] = torch.zeros_like(of_groups, memory_format=torch.contiguous_format)
    return state


def convert_state(state: dict[str, Tensor], param: Tensor, dtype: torch.dtype) -> None:
    """Bring a loaded state into the form that `new_state` gives.

    PyTorch has cast it to the weights' dtype, which keeps every integer.
    """
    if ("exp_avg_scale" in state) == _has_scales(param, dtype):
        state["exp_avg"] = state["exp_avg"].to(_dtype_of(param, dtype))
        return
    stored = [local_part(state.pop(name)) for name in STATE if name in state]
    ours = new_state(param, dtype)
    store(widen(*stored, dtype=torch.float32), *map(local_part, ours.values()))
    state |= ours


def _has_scales(param: Tensor, dtype: torch.dtype) -> bool:
    return dtype == torch.int8 and param.ndim > 1 and param.shape[-1] % GROUP == 0


def _dtype_of(param: Tensor, dtype: torch.dtype) -> torch.dtype:
    return param.dtype if dtype == torch.int8 and not _has_scales(param, dtype) else dtype


def widen(stored: Tensor, scales: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """A stored momentum as numbers of `dtype`; the same tensor if it is that already."""
    if scales is None:
        return stored.to(dtype)
    return (stored.unflatten(-1, (-1, GROUP)) * scales.unsqueeze(-1)).flatten(-2).to(dtype)


def store(momentum: Tensor, stored: Tensor, scales: Tensor | None = None) -> None:
    """Write a momentum to where it is stored, rounded to nearest."""
    if scales is None:
        stored.copy_(momentum)
        return
    groups = momentum.float().unflatten(-1, (-1, GROUP))
    scales.copy_(groups.abs().amax(-1) * (1 / LARGEST))
    inverse = torch.where(scales > _SMALLEST_SCALE, scales.reciprocal(), 0)
    stored.copy_((groups * inverse.unsqueeze(-1)).round().flatten(-2))
