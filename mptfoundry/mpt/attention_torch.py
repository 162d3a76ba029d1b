"""The attention backend in plain PyTorch, which runs everywhere.

It has four paths; all give the same mathematics with memory linear in the sequence:

* *blocks*: causal attention in float32 on a CPU, with ALiBi, documents and padding (attention_blocks.py);
* *one*: a single query per row against a cache, also on a CPU;
* *kernel*: PyTorch's `scaled_dot_product_attention`, for plain causal attention on other devices;
* *chunks*: everything else, with the plain formula for a few queries at a time (attention_chunks.py).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .attention_blocks import attend_by_blocks, find_segments
from .attention_chunks import attend_by_chunks
from .position import AttentionContext

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
) -> torch.Tensor:
    """Attend from (batch, seq, n_heads, head_dim) to (batch, keys, kv_heads, head_dim).

    Returns:
        (batch, seq, n_heads, head_dim), in ``query``'s dtype. Padding's rows are finite and mean nothing.
    """
    on_cpu = query.device.type == "cpu"
    exact = query.dtype == torch.float32 and context.softcap is None and context.dropout == 0
    if on_cpu and exact and query.shape[1] == 1:
        return _attend_one(query, key, value, context)
    if not _is_plainly_causal(query, key, context):
        return attend_by_chunks(query, key, value, context)
    if on_cpu and exact:
        segments = context.once("segments", lambda: find_segments(context.documents, *query.shape[:2]))
        if segments is not None:
            return attend_by_blocks(query, key, value, context, segments)
    kernel_serves = not on_cpu and query.dtype != torch.float64
    if kernel_serves and context.slopes is None and context.documents is None:
        return _attend_by_kernel(query, key, value, context)
    return attend_by_chunks(query, key, value, context)


def _is_plainly_causal(query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> bool:
    """Whether every query sees its whole document up to itself, and the cache is empty."""
    keys = key.shape[1]
    sees_all = context.window is None or context.window >= keys - 1
    return query.shape[1] == keys and sees_all and context.prefix is None and context.softcap is None


def _attend_by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
) -> torch.Tensor:
    """Causal attention without bias or mask; PyTorch chooses the kernel."""
    group = query.shape[2] // key.shape[2]
    if group > 1 and query.dtype == torch.float32:  # no linear-memory kernel supports grouped heads here
        key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        dropout_p=context.dropout,
        is_causal=True,
        scale=context.scale,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return out.transpose(1, 2)


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
) -> torch.Tensor:
    """One query per row against all its keys, on a CPU: a generation step."""
    batch, _, n_heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    bias = context.once("bias of one query", lambda: _bias_of_one(context, keys, kv_heads, key.device))
    out, _ = _flash(
        query.reshape(batch, kv_heads, n_heads // kv_heads, head_dim),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=bias,
        scale=context.scale,
    )  # (batch, kv_heads, group, head_dim)
    return out.reshape(batch, 1, n_heads, head_dim)


def _bias_of_one(
    context: AttentionContext, keys: int, kv_heads: int, device: torch.device
) -> torch.Tensor | None:
    """Bias of the last token's scores, (batch or 1, kv_heads or 1, group or 1, keys), or None."""
    if context.slopes is None and context.documents is None and context.window is None:
        return None
    distance = torch.arange(keys - 1, -1, -1, device=device)
    bias = torch.zeros(1, 1, 1, keys, device=device)
    if context.slopes is not None:
        bias = (context.slopes[:, None] * -distance).view(1, kv_heads, -1, keys)
    if context.documents is not None:
        hidden = context.documents != context.documents[:, -1:]
        bias = bias.masked_fill(hidden[:, None, None], -torch.inf)
    if context.window is not None:
        bias = bias.masked_fill(distance > context.window, -torch.inf)
    return bias
