"""One block: attention and a feed-forward network, each after a norm and added to the residual stream."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from . import attention_triton
from .attention import Attention
from .config import MPTConfig
from .ffn import FFN
from .norm import Norm
from .position import AttentionContext


class Block(nn.Module):
    """A pre-norm transformer block, the unit of sharding and of activation checkpointing."""

    def __init__(self, config: MPTConfig, layer: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.dropout = config.resid_pdrop
        self.norm_1 = Norm(config.d_model, config, device)
        self.attn = Attention(config, layer, device)
        self.norm_2 = Norm(config.d_model, config, device)
        self.ffn = FFN(config, device)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Map (batch, seq, d_model) to (batch, seq, d_model)."""
        if x.is_cuda and context.made("backend") is attention_triton and self._fuses_norms(x):
            return self._forward_fused(x, context)
        x = x + F.dropout(self.attn(self.norm_1(x), context), self.dropout, self.training)
        return x + F.dropout(self.ffn(self.norm_2(x)), self.dropout, self.training)

    def _fuses_norms(self, x: torch.Tensor) -> bool:
        return self.norm_1.fuses(x) and self.norm_2.fuses(x)

    def _forward_fused(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """The same, where one kernel adds to the residual stream and normalises it; see norm_kernel.py."""
        x, normed = self.norm_1.add(x, None)
        x, normed = self.norm_2.add(x, F.dropout(self.attn(normed, context), self.dropout, self.training))
        return x + F.dropout(self.ffn(normed), self.dropout, self.training)
