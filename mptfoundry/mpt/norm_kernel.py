"""The residual stream's sum and its norm in one pass, by two Triton kernels.

Forward adds what a layer contributes and normalises the sum, which it has in registers. Backward reads the
sum and both gradients once: it adds the residual's own gradient to the norm's, and each program sums the
scale's gradient over its rows. As in `F.layer_norm`, everything between is float32.

Letters of the shapes: rows = batch * seq.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

try:  # An exported folder must load without triton, too.
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    raise

# Programs of backward for each multiprocessor, and rows of a program at least: with fewer, the scale's
# gradients, one for each program, would be as large as the rows.
_PROGRAMS, _ROWS = 2, 8

# An exported folder's copy of this file registers its own operators, separate from the installed package's.
_NAMESPACE = re.sub(r"\W", "_", __package__ or "mpt")


@triton.jit
def norm_forward_kernel(
    x, delta, weight, bias, total, out, means, scales, width, eps,
    HAS_DELTA: constexpr, HAS_BIAS: constexpr, CENTRES: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """A row's sum, rounded to its dtype, and the norm of that."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    places = row * width + columns
    dtype = x.dtype.element_ty
    numbers = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        numbers += tl.load(delta + places, mask=inside, other=0.0).to(tl.float32)
        rounded = numbers.to(dtype)
        tl.store(total + places, rounded, mask=inside)
        numbers = rounded.to(tl.float32)
    if CENTRES:
        mean = tl.sum(numbers, 0) / width
        numbers = tl.where(inside, numbers - mean, 0.0)
        tl.store(means + row, mean)
    scale = 1.0 / tl.sqrt(tl.sum(numbers * numbers, 0) / width + eps)
    tl.store(scales + row, scale)
    # Under autocast the plain norm has its weights in the dtype, too.
    result = numbers * scale * tl.load(weight + columns, mask=inside, other=0.0).to(dtype).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(dtype).to(tl.float32)
    tl.store(out + places, result.to(dtype), mask=inside)


@triton.jit
def norm_backward_kernel(
    grad_total, grad, total, weight, means, scales, grad_x, grad_weights, grad_biases, rows, width,
    HAS_BIAS: constexpr, CENTRES: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """The gradient of a program's rows, and its part of the gradients of weight and bias."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    dtype = total.dtype.element_ty
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(dtype).to(tl.float32)
    of_weight = tl.zeros([COLUMNS], tl.float32)
    of_bias = tl.zeros([COLUMNS], tl.float32)
    start = program.to(tl.int64) * width
    for row in range(program, rows, programs):
        places = start + columns
        start += programs * width
        numbers = tl.load(total + places, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row)
        if CENTRES:
            numbers = tl.where(inside, numbers - tl.load(means + row), 0.0)
        numbers = numbers * scale
        of_weight += slope * numbers
        if HAS_BIAS:
            of_bias += slope
        slope = slope * factor
        result = slope - numbers * (tl.sum(slope * numbers, 0) / width)
        if CENTRES:
            result -= tl.sum(slope, 0) / width
        result = result * scale + tl.load(grad_total + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + places, result.to(dtype), mask=inside)
    tl.store(grad_weights + program * width + columns, of_weight, mask=inside)
    if HAS_BIAS:
        tl.store(grad_biases + program * width + columns, of_bias, mask=inside)


@torch.library.custom_op(
    f"{_NAMESPACE}::add_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? delta, Tensor weight, Tensor? bias, float eps, bool centres) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _add_norm(x, delta, weight, bias, eps, centres):  # type: ignore[no-untyped-def]
    """The sum (empty without ``delta``) and its norm like x (rows, width); means and scales, (rows,)."""
    results = total, out, means, scales = _empty_results(x, delta)
    rows, width = x.shape
    if rows:
        with torch.cuda.device_of(x):
            norm_forward_kernel[(rows,)](
                x, x if delta is None else delta, weight, weight if bias is None else bias, total, out, means,
                scales, width, eps, HAS_DELTA=delta is not None, HAS_BIAS=bias is not None, CENTRES=centres,
                **_size(width),
            )  # fmt: skip
    return results


def _empty_results(x: Tensor, delta: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    means, scales = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    return x.new_empty(0) if delta is None else torch.empty_like(x), torch.empty_like(x), means, scales


_add_norm.register_fake(_empty_results)


@torch.library.custom_op(
    f"{_NAMESPACE}::add_norm_backward",
    mutates_args=(),
    schema="(Tensor grad_total, Tensor grad, Tensor total, Tensor weight, Tensor means, Tensor scales, "
    "bool has_bias, bool centres) -> (Tensor, Tensor, Tensor)",
)
def _add_norm_backward(  # type: ignore[no-untyped-def]
    grad_total, grad, total, weight, means, scales, has_bias, centres
):  # fmt: skip
    """The gradient of the sum, (rows, width), and those of weight and bias by program, float32."""
    results = grad_x, grad_weights, grad_biases = _empty_grads(
        grad_total, grad, total, weight, means, scales, has_bias
    )
    rows, width = total.shape
    if not rows:
        return tuple(each.zero_() for each in results)
    with torch.cuda.device_of(total):
        norm_backward_kernel[(len(grad_weights),)](
            grad_total, grad, total, weight, means, scales, grad_x, grad_weights, grad_biases, rows, width,
            HAS_BIAS=has_bias, CENTRES=centres, **_size(width),
        )  # fmt: skip
    return results


def _empty_grads(
    grad_total: Tensor, grad: Tensor, total: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    has_bias, (rows, width) = others[2], total.shape
    processors = 4
    if total.is_cuda:
        processors = torch.cuda.get_device_properties(total.device).multi_processor_count
    programs = max(1, min(_PROGRAMS * processors, -(-rows // _ROWS)))
    grad_weights = total.new_empty((programs, width), dtype=torch.float32)
    return torch.empty_like(total), grad_weights, grad_weights.new_empty((programs * has_bias, width))


_add_norm_backward.register_fake(_empty_grads)


def _size(width: int) -> dict[str, int]:
    columns = max(16, 1 << (width - 1).bit_length())
    # So many that nothing is spilled: `python scripts/compile_kernels.py features=norm,norm+wide+bias`.
    return {"COLUMNS": columns, "num_warps": 32 if columns > 4096 else max(1, columns // 512)}


_operators = getattr(torch.ops, _NAMESPACE)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, delta, weight, bias, eps, centres
    ):  # fmt: skip
        total, out, means, scales = _operators.add_norm(x, delta, weight, bias, eps, centres)
        total = x.view_as(x) if delta is None else total
        ctx.save_for_backward(total, weight, means, scales)
        ctx.has_delta, ctx.centres = delta is not None, centres
        ctx.bias_dtype = None if bias is None else bias.dtype
        return total, out

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, means, scales = ctx.saved_tensors
        grad_x, grad_weights, grad_biases = _operators.add_norm_backward(
            grad_total.contiguous(), grad.contiguous(), total, weight, means, scales,
            ctx.bias_dtype is not None, ctx.centres,
        )  # fmt: skip
        of_bias = None if ctx.bias_dtype is None else grad_biases.sum(0).to(ctx.bias_dtype)
        grad_delta = grad_x if ctx.has_delta else None
        return grad_x, grad_delta, grad_weights.sum(0).to(weight.dtype), of_bias, None, None


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centres: bool
) -> tuple[Tensor, Tensor]:
    """Add ``delta`` to x (..., width), if there is one, and normalise the sum.

    Returns:
        The sum and its norm, layer norm if it ``centres``, or else RMS norm.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    delta = None if delta is None else delta.reshape_as(flat).contiguous()
    total, out = _AddNorm.apply(flat, delta, weight, bias, eps, centres)
    return total.view_as(x), out.view_as(x)
