"""Cross entropy as one Triton kernel: each token's loss, and its gradient written over the logits.

A program has one row of logits. It reads the row once for the maximum and the sum of exponentials, in
float32, and again, largely from the cache, to write the gradient. No other tensor of that size exists.

Letters of the shapes: rows = tokens.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import re

import torch

from .attention_kernels import _tanh

try:  # An exported folder must load without triton, too.
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    raise

# Logits that a program of 16 warps has in registers: a load of 16 bytes for each thread in bfloat16.
BLOCK = 4096
WARPS = 16

# An exported folder's copy of this file registers its own operator, separate from the installed package's.
_NAMESPACE = re.sub(r"\W", "_", __package__ or "mpt")


@triton.jit
def _capped(logits, softcap, HAS_SOFTCAP: constexpr):
    return softcap * _tanh(logits / softcap) if HAS_SOFTCAP else logits


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, stride, vocab, ignored, softcap, HAS_SOFTCAP: constexpr, COLUMNS: constexpr
):  # fmt: skip
    """Write a row's loss, and softmax minus one-hot over its logits, times softcap's derivative."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    target = tl.load(targets + row)
    columns = tl.arange(0, COLUMNS)
    if target == ignored:
        nothing = tl.zeros([COLUMNS], logits.dtype.element_ty)
        for begin in range(0, vocab, COLUMNS):
            tl.store(start + begin + columns, nothing, mask=begin + columns < vocab)
        tl.store(losses + row, 0.0)
    else:
        is_token = (target >= 0) & (target < vocab)
        of_target = tl.load(start + target, mask=is_token, other=float("nan")).to(tl.float32)
        of_target = _capped(of_target, softcap, HAS_SOFTCAP)
        maximum = of_target
        total = tl.zeros([COLUMNS], tl.float32)
        for begin in range(0, vocab, COLUMNS):
            inside = begin + columns < vocab
            x = tl.load(start + begin + columns, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, _capped(x, softcap, HAS_SOFTCAP), float("-inf"))
            higher = tl.maximum(maximum, tl.max(x, 0))
            total = total * tl.exp(maximum - higher) + tl.exp(x - higher)
            maximum = higher
        whole = tl.sum(total, 0)
        tl.store(losses + row, maximum - of_target + tl.log(whole))
        inverse = 1.0 / whole
        for begin in range(0, vocab, COLUMNS):
            inside = begin + columns < vocab
            x = tl.load(start + begin + columns, mask=inside, other=0.0).to(tl.float32)
            x = _capped(x, softcap, HAS_SOFTCAP)
            gradient = tl.exp(x - maximum) * inverse
            gradient = tl.where(begin + columns == target, gradient - 1.0, gradient)
            if HAS_SOFTCAP:
                gradient *= 1.0 - (x / softcap) * (x / softcap)
            tl.store(start + begin + columns, gradient.to(logits.dtype.element_ty), mask=inside)


@torch.library.custom_op(
    f"{_NAMESPACE}::cross_entropy",
    mutates_args=("logits",),
    schema="(Tensor(a!) logits, Tensor targets, int ignored, float softcap) -> Tensor",
)
def cross_entropy(logits, targets, ignored, softcap):  # type: ignore[no-untyped-def]
    """Write the gradient of the rows' summed losses over (rows, vocab) logits.

    Targets (rows,) are int64. Rows with the target ``ignored`` have zeros; those with another target outside
    the vocabulary have NaN. A ``softcap`` of 0 means none.

    Returns:
        The losses, (rows,) float32.
    """
    assert logits.stride(1) == 1
    losses = _empty_losses(logits)
    if logits.shape[0]:
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[(logits.shape[0],)](
                logits, targets.contiguous(), losses, logits.stride(0), logits.shape[1], ignored, softcap,
                HAS_SOFTCAP=softcap > 0, COLUMNS=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return losses


def _empty_losses(logits: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


cross_entropy.register_fake(lambda logits, *_: _empty_losses(logits))
