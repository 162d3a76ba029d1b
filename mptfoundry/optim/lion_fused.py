"""LION with a step in one pass: by our Triton kernel, or on a CPU by a function that torch.compile makes.

It has the name, options and state of the plain one, so checkpoints are the same. The numbers are equal within
rounding, but not bit for bit: a fused multiply-add rounds once. So a run keeps the step that it began with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mptfoundry.mpt.backends import is_interpreted
from mptfoundry.optim import lion, lion_compiled

if TYPE_CHECKING:
    from mptfoundry.optim.bf16_weights import Copy


class DecoupledLionW(lion.DecoupledLionW):
    """LION with a step that reads weights, gradient and momentum once.

    Weights have to be float32; the momentum may be stored as the plain one stores it.

    Attributes:
        gradient_scale: What the next step multiplies all gradients by, on their device; None is 1.
        bf16_copies: Copies of weights in bfloat16, which a step also writes.
    """

    gradient_scale: Tensor | None = None
    bf16_copies: Mapping[Tensor, Copy] = MappingProxyType({})

    def update(self, shards: Sequence[lion.Shard], group: dict[str, Any]) -> None:
        """Update the weights and momenta of a group's shards."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        shrinkage = lion.shrinkage(lr, group["initial_lr"], group["weight_decay"])
        for weight, gradient, momentum, *scales in shards:
            if not weight.numel():
                continue
            copy = self.bf16_copies.get(weight)
            step = lion_compiled.lion_step if weight.is_cpu and not is_interpreted() else _lion_step
            step(
                weight, gradient, momentum, scales[0] if scales else None, copy.tensor if copy else None,
                self.gradient_scale, lr, shrinkage, 1 - beta1, 1 - beta2,
            )  # fmt: skip
            if copy:
                copy.version = weight._version

    update_rounded = update  # the kernel itself reads and writes the momentum in its dtype


@torch.library.custom_op(
    "mptfoundry_optim::lion_step",
    mutates_args=("weight", "momentum", "scales", "copy"),
    schema="(Tensor(a!) weight, Tensor gradient, Tensor(b!) momentum, Tensor(c!)? scales, Tensor(d!)? copy, "
    "Tensor? scale, float lr, float shrinkage, float toward_direction, float toward_momentum) -> ()",
)
def _lion_step(  # type: ignore[no-untyped-def]
    weight, gradient, momentum, scales, copy, scale, lr, shrinkage, toward_direction, toward_momentum
) -> None:  # fmt: skip
    """Update float32 weights and their momentum in place; the gradient may have any dtype and layout.

    The gradient is multiplied by `scale`, and the weights are also written to `copy`, in its dtype, if there
    is one. A momentum in int8 has `scales`.
    """
    from mptfoundry.optim.lion_kernel import BLOCK, WARPS, lion_kernel

    assert weight.dtype == torch.float32 and weight.is_contiguous() and momentum.is_contiguous()
    assert (momentum.dtype == torch.int8) == (scales is not None)
    numbers = weight.numel()
    with torch.cuda.device_of(weight):
        lion_kernel[(-(-numbers // BLOCK),)](
            weight, gradient.contiguous(), momentum, weight if scales is None else scales,
            weight if copy is None else copy, weight if scale is None else scale, numbers, lr, shrinkage,
            toward_direction, toward_momentum, HAS_SCALES=scales is not None, HAS_COPY=copy is not None,
            HAS_SCALE=scale is not None, ELEMENTS=BLOCK, num_warps=WARPS,
        )  # fmt: skip


_lion_step.register_fake(lambda *_: None)
