"""The feed-forward network of a block: two matrices, or three in the gated form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .config import ActivationConfig, MPTConfig
from .linear import Linear


class FFN(nn.Module):
    """``down_proj(act(up_proj(x)))``, or gated: ``down_proj(act(gate_proj(x)) * up_proj(x))``.

    The gated form is from https://arxiv.org/abs/2002.05202.
    """

    def __init__(self, config: MPTConfig, device: torch.device | str | None) -> None:
        super().__init__()
        linear = partial(Linear, bias=not config.no_bias, device=device)
        self.act = make_activation(config.ffn_config.ffn_act_fn)
        self.up_proj = linear(config.d_model, config.d_ffn)
        self.down_proj = linear(config.d_ffn, config.d_model)
        gated = config.ffn_config.ffn_type == "mptglu"
        self.gate_proj = linear(config.d_model, config.d_ffn) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, seq, d_model) to (batch, seq, d_model)."""
        hidden = self.up_proj(x)  # (batch, seq, d_ffn)
        hidden = self.act(hidden) if self.gate_proj is None else self.act(self.gate_proj(x)) * hidden
        return self.down_proj(hidden)


def make_activation(config: ActivationConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The elementwise function that ``config`` names."""
    if config.name == "gelu":
        return partial(F.gelu, approximate=config.approximate)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "quick_gelu": _quick_gelu,
        "relu": F.relu,
        "silu": F.silu,
    }
    return functions[config.name]


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU's sigmoid approximation, section 2 of https://arxiv.org/abs/1606.08415."""
    return x * torch.sigmoid(1.702 * x)
