"""A linear layer that is also fast for the few rows of a generation step.

Letters of the shapes: rows = batch * seq.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .norm import compute_dtype

# Up to this many rows, a CPU is faster at (W @ x.T).T: it reads the matrix once, row by row.
# `python scripts/bench_generate.py` measures the gain.
_ROWS = range(8, 33)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """PyTorch's `linear`, from (..., in_features) to (..., out_features), faster for few rows."""
    if not _is_faster_from_the_left(x, weight):
        return F.linear(x, weight, bias)
    out = torch.mm(weight, x.flatten(0, -2).t()).t().contiguous()  # (rows, out_features)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """`torch.nn.Linear` that computes with `linear`.

    Attributes:
        compute_weight: The weight in autocast's dtype, (out_features, in_features), which forward then uses;
            None: autocast casts the weight in each forward pass. It is not part of the state dict.
    """

    compute_weight: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if self.compute_weight is not None and compute_dtype(input) == self.compute_weight.dtype:
            return F.linear(input, self.compute_weight, self.bias)
        return linear(input, self.weight, self.bias)


def _is_faster_from_the_left(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether these are few rows of plain float32 on a CPU, outside training and tracing."""
    if torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    is_plain = type(weight) in (torch.Tensor, nn.Parameter)  # not quantized or sharded
    is_float32 = is_plain and x.is_cpu and x.dtype == weight.dtype == torch.float32
    return is_float32 and x.dim() > 1 and x.shape[:-1].numel() in _ROWS
