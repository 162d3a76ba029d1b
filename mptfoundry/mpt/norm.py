"""The norms of an MPT: layer norm and RMS norm, each also in low precision.

Under autocast, a low-precision norm computes in the autocast dtype; the others compute in float32, as
PyTorch's do on a GPU.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .config import MPTConfig

# What a program of the kernel keeps in registers.
_WIDEST = 8192


class Norm(nn.Module):
    """The norm of ``config.norm_type`` over the last dimension, with a trainable scale.

    Layer norm (https://arxiv.org/abs/1607.06450), or RMS norm (https://arxiv.org/abs/1910.07467), which
    does not center and has no bias.
    """

    def __init__(self, width: int, config: MPTConfig, device: torch.device | str | None) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.low_precision = config.norm_type.startswith("low_precision_")
        self.centres = config.norm_type.endswith("layernorm")
        self.weight = nn.Parameter(torch.ones(width, device=device))
        has_bias = self.centres and not config.no_bias
        self.bias = nn.Parameter(torch.zeros(width, device=device)) if has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., width)."""
        dtype = compute_dtype(x)
        if dtype is None:
            return self._normalise(x, self.weight, self.bias)
        dtype = dtype if self.low_precision else torch.float32
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self._normalise(x.to(dtype), self.weight.to(dtype), bias)

    def fuses(self, x: torch.Tensor) -> bool:
        """Whether `add` by the kernel computes what forward computes of ``x``, within rounding."""
        dtype = compute_dtype(x)
        # Not recomputed in backward, and not offloaded.
        is_own = type(self) is Norm and not self._forward_hooks and self.weight.device == x.device
        is_same = dtype is None or (self.low_precision and dtype == x.dtype)
        return is_own and is_same and x.shape[-1] <= _WIDEST

    def add(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Add ``delta``, if any, to x (..., width), and normalise the sum: both, by a kernel for GPUs."""
        from .norm_kernel import add_norm

        if delta is not None and delta.dtype != x.dtype:
            return x + delta, self(x + delta)
        return add_norm(x, delta, self.weight, self.bias, self.eps, self.centres)

    def _normalise(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.centres:
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


def compute_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The autocast dtype on ``x``'s device, or None if autocast is off."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
