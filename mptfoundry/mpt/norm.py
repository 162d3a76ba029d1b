"""The norms of an MPT: layer norm and RMS norm, each also in low precision.

A low-precision norm computes in the compute dtype under autocast, where PyTorch would compute in float32.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .config import MPTConfig


class LayerNorm(nn.Module):
    """Layer norm over the last dimension (https://arxiv.org/abs/1607.06450)."""

    def __init__(
        self, width: int, *, eps: float, bias: bool, low_precision: bool, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.low_precision = low_precision
        self.weight = nn.Parameter(torch.empty(width, device=device))
        self.bias = nn.Parameter(torch.empty(width, device=device)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., width)."""
        dtype = compute_dtype(x) if self.low_precision else None
        if dtype is None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (https://arxiv.org/abs/1910.07467)."""

    def __init__(
        self, width: int, *, eps: float, low_precision: bool, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.low_precision = low_precision
        self.weight = nn.Parameter(torch.empty(width, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., width)."""
        dtype = compute_dtype(x) if self.low_precision else None
        if dtype is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)


def make_norm(width: int, config: MPTConfig, device: torch.device | str | None) -> LayerNorm | RMSNorm:
    """The norm of ``config.norm_type`` over ``width`` features; its weights are not initialised."""
    low_precision = config.norm_type.startswith("low_precision_")
    if config.norm_type.endswith("layernorm"):
        return LayerNorm(
            width, eps=config.norm_eps, bias=not config.no_bias, low_precision=low_precision, device=device
        )
    return RMSNorm(width, eps=config.norm_eps, low_precision=low_precision, device=device)


def compute_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in on ``x``'s device, or None where autocast is off."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
