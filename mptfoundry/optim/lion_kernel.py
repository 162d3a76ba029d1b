"""LION's step as one Triton kernel: it reads weights, gradient and momentum once, and writes weights and
momentum, 20 bytes per parameter in float32, and as many with a gradient and a copy of the weights in
bfloat16; 4 less with a momentum in bfloat16, 5.9 less in 8 bits. The passes of `lion.py` move 52.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

# Elements of a program, which has eight warps: two loads of 16 bytes for each thread and tensor.
BLOCK = 2048
WARPS = 8
# As in momentum.py, whose Python numbers a kernel can't read.
_GROUP = constexpr(64)
_ONE_127TH = constexpr(1 / 127)
_SMALLEST_SCALE = constexpr(2.0**-120)
# Added and taken away again, it leaves the nearest integer of a float32 up to 2^22, ties to even.
_TO_INTEGER = constexpr(1.5 * 2.0**23)


@triton.jit
def _lerp(start, end, weight):
    """As torch.lerp, which measures from the nearer end."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - difference * (1.0 - weight))


@triton.jit
def _as_integers(momentum, GROUPS: constexpr):
    """A momentum as integers in float32, and the scales of its groups."""
    groups = tl.reshape(momentum, (GROUPS, _GROUP))
    scales = tl.max(tl.abs(groups), 1) * _ONE_127TH
    inverse = tl.where(scales > _SMALLEST_SCALE, 1.0 / tl.maximum(scales, _SMALLEST_SCALE), 0.0)
    integers = (groups * inverse[:, None] + _TO_INTEGER) - _TO_INTEGER
    return tl.reshape(integers, (GROUPS * _GROUP,)), scales


@triton.jit
def lion_kernel(weights, gradients, momenta, scales, copies, scale, numbers, lr, shrinkage, toward_direction,
                toward_momentum, HAS_SCALES: constexpr, HAS_COPY: constexpr, HAS_SCALE: constexpr,
                ELEMENTS: constexpr):  # fmt: skip
    """The equations of `lion.py`, in float32; with a scale, of the gradient times that.

    With copies, the new weights are also written there, in their dtype. The momenta may be bfloat16, or with
    scales integers.
    """
    GROUPS: constexpr = ELEMENTS // _GROUP
    offsets = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = offsets < numbers
    weight = tl.load(weights + offsets, mask=inside)
    gradient = tl.load(gradients + offsets, mask=inside).to(tl.float32)
    momentum = tl.load(momenta + offsets, mask=inside).to(tl.float32)
    if HAS_SCALES:
        groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        has_numbers = groups * _GROUP < numbers
        factors = tl.load(scales + groups, mask=has_numbers)
        momentum = tl.reshape(tl.reshape(momentum, (GROUPS, _GROUP)) * factors[:, None], (ELEMENTS,))
    if HAS_SCALE:
        gradient = gradient * tl.load(scale)
    direction = _lerp(momentum, gradient, toward_direction)
    step = tl.where(direction > 0, lr, 0.0) - tl.where(direction < 0, lr, 0.0)
    weight = weight * shrinkage - step
    tl.store(weights + offsets, weight, mask=inside)
    if HAS_COPY:
        tl.store(copies + offsets, weight.to(copies.dtype.element_ty), mask=inside)
    momentum = _lerp(momentum, gradient, toward_momentum)
    if HAS_SCALES:
        momentum, factors = _as_integers(momentum, GROUPS)
        tl.store(scales + groups, factors, mask=has_numbers)
    tl.store(momenta + offsets, momentum.to(momenta.dtype.element_ty), mask=inside)
