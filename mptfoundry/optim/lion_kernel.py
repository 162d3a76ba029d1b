"""LION's step as one Triton kernel: it reads weights, gradient and momentum once, and writes weights and
momentum, 20 bytes per parameter in float32, and as many with a gradient and a copy of the weights in
bfloat16; 4 less with a momentum in bfloat16. The passes of `lion.py` move 52.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

# Elements of a program, which has eight warps: two loads of 16 bytes for each thread and tensor.
BLOCK = 2048
WARPS = 8


@triton.jit
def _lerp(start, end, weight):
    """As torch.lerp, which measures from the nearer end."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - difference * (1.0 - weight))


@triton.jit
def lion_kernel(weights, gradients, momenta, copies, scale, numbers, lr, shrinkage, toward_direction,
                toward_momentum, HAS_COPY: constexpr, HAS_SCALE: constexpr, ELEMENTS: constexpr):  # fmt: skip
    """The equations of `lion.py`, in float32; with a scale, of the gradient times that.

    With copies, the new weights are also written there, in their dtype. The momenta may be bfloat16.
    """
    offsets = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = offsets < numbers
    weight = tl.load(weights + offsets, mask=inside)
    gradient = tl.load(gradients + offsets, mask=inside).to(tl.float32)
    momentum = tl.load(momenta + offsets, mask=inside).to(tl.float32)
    if HAS_SCALE:
        gradient = gradient * tl.load(scale)
    direction = _lerp(momentum, gradient, toward_direction)
    step = tl.where(direction > 0, lr, 0.0) - tl.where(direction < 0, lr, 0.0)
    weight = weight * shrinkage - step
    tl.store(weights + offsets, weight, mask=inside)
    if HAS_COPY:
        tl.store(copies + offsets, weight.to(copies.dtype.element_ty), mask=inside)
    momentum = _lerp(momentum, gradient, toward_momentum)
    tl.store(momenta + offsets, momentum.to(momenta.dtype.element_ty), mask=inside)
