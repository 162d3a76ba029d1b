"""Attention by the plain formula, which keeps its weights: for whoever wants to look at them.

It stands in for a backend (attention.py) in a pass that is asked for attentions. Memory is quadratic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .attention_chunks import hidden_keys
from .position import AttentionContext


class WeightsKept:
    """A backend that notes the weights of each layer that it computes.

    Attributes:
        weights: Of each layer so far, (batch, n_heads, seq, keys) in the queries' dtype, after dropout.
    """

    def __init__(self) -> None:
        self.weights: list[Any] = []

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Attend from (batch, seq, n_heads, head_dim) to (batch, keys, kv_heads, head_dim)."""
        weights = attention_weights(query, key, context)
        weights = F.dropout(weights, context.dropout).to(query.dtype)
        self.weights.append(weights)
        group = query.shape[2] // key.shape[2]
        values = value.repeat_interleave(group, 2).transpose(1, 2)  # (batch, n_heads, keys, head_dim)
        return (weights @ values).transpose(1, 2)


def attention_weights(query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> torch.Tensor:
    """Softmax of the scores that AttentionContext describes, 0 for what a query does not see.

    Args:
        query: (batch, seq, n_heads, head_dim), the last of the keys' tokens.
        key: (batch, keys, kv_heads, head_dim).
        context: Scale, bias and what is visible.

    Returns:
        (batch, n_heads, seq, keys), float32 or wider. Padding's rows mean nothing.
    """
    seq, keys = query.shape[1], key.shape[1]
    past = keys - seq
    group = query.shape[2] // key.shape[2]
    repeated = key.repeat_interleave(group, 2).transpose(1, 2)  # (batch, n_heads, keys, head_dim)
    scores = context.scale * query.transpose(1, 2) @ repeated.mT  # (batch, n_heads, seq, keys)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if context.softcap is not None:
        scores = context.softcap * torch.tanh(scores / context.softcap)
    places = torch.arange(keys, device=query.device)
    distance = places[past:, None] - places  # (seq, keys)
    if context.slopes is not None:
        scores = scores - context.slopes.to(scores.dtype)[:, None, None] * distance.abs()
    hidden = hidden_keys(distance, past, keys, 0, keys, context)
    return torch.softmax(scores if hidden is None else scores.masked_fill(hidden, -torch.inf), -1)
