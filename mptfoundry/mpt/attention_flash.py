"""The attention backend that calls the flash-attn package (https://github.com/Dao-AILab/flash-attention).

Rows of one document go to its dense function as they are, also with padding at the end, which earlier tokens
don't see. Other rows are concatenated, which copies only a cache, and go to its varlen function: each *run*
of one document's tokens, or of padding, is a sequence.

The package adds slope * column to a score. In float32 the rounding error grows with the column: to a few
thousandths of a weight in the steepest heads at 65,536.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .position import PADDING, AttentionContext

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    import_error = None
except (ImportError, OSError) as error:
    flash_attn_func = flash_attn_varlen_func = None
    import_error = str(error)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
) -> torch.Tensor:
    """Attend from (batch, seq, n_heads, head_dim) to (batch, keys, kv_heads, head_dim).

    Returns:
        (batch, seq, n_heads, head_dim), in ``query``'s dtype. Rows of padding are finite but meaningless.

    Raises:
        ValueError: The package can't be imported, or there is padding between tokens of one document.
    """
    if flash_attn_func is None:
        raise ValueError(
            f"attn_config.attn_impl: flash can't be used: flash-attn can't be imported ({import_error}). "
            "Compile it against the installed torch, or use torch or triton."
        )
    options = options_of(context)
    batch, seq = query.shape[:2]
    bounds = _bounds(context, seq)
    if bounds is None:
        return flash_attn_func(query, key, value, **options)
    flat = (x.flatten(0, 1) for x in (query, key, value))  # (batch * seq or keys, heads, head_dim)
    return flash_attn_varlen_func(*flat, **bounds, **options).unflatten(0, (batch, seq))


def prepare(context: AttentionContext, seq: int) -> None:
    """Find the documents of a forward pass, before the first layer needs them.

    Without `max_documents` this syncs with the device to count them.

    Raises:
        ValueError: There is padding between tokens of one document.
    """
    _bounds(context, seq)


def _bounds(context: AttentionContext, seq: int) -> dict[str, Any] | None:
    """The boundaries of the runs, computed once; None if every row is one document."""
    documents = context.documents
    if documents is None or context.max_documents == 1:
        return None
    return context.once("bounds of runs", lambda: bounds_of_runs(documents, seq, context.max_documents))


def options_of(context: AttentionContext) -> dict[str, Any]:
    """The arguments that both functions share.

    With fewer queries than keys, causal and window masks are aligned at the end: the queries are the last
    tokens.
    """
    return {
        "dropout_p": context.dropout,
        "softmax_scale": context.scale,
        "causal": True,
        "window_size": (-1, -1) if context.window is None else (context.window, 0),
        "softcap": context.softcap or 0.0,
        "alibi_slopes": context.slopes,
        "deterministic": True,
    }


def bounds_of_runs(documents: torch.Tensor, seq: int, max_documents: int | None) -> dict[str, Any]:
    """The boundaries of the runs in concatenated rows.

    Args:
        documents: (batch, keys) int64, as in AttentionContext.
        seq: The last ``seq`` keys of each row have queries.
        max_documents: As in AttentionContext. If given, there is no device sync.

    Returns:
        Cumulative lengths in queries and in keys, int32, from 0, and upper bounds of the lengths. There may
        be more sequences than runs: the extra ones are empty, and runs inside the cache have no queries.

    Raises:
        ValueError: There is padding between tokens of one document; `max_documents` rules this out.
    """
    batch, keys = documents.shape
    differs = documents[:, 1:] != documents[:, :-1]
    run = F.pad(differs, (1, 0), value=True).flatten().cumsum(0).sub_(1)  # (batch * keys)
    if max_documents is not None:
        count = batch * (max_documents + 1)  # plus the padding
    else:
        latest = documents.cummax(1).values[:, :-1]
        resumes = differs & (documents[:, 1:] == latest) & (documents[:, :-1] == PADDING)
        count = int(torch.where(resumes.any(), 0, run[-1] + 1))
        if count == 0:
            raise ValueError(
                "attention_mask: padding stands between tokens of one document, which attn_impl: flash can't "
                "leave out. Pad at either end, or use attn_impl: torch or triton."
            )
    positions = torch.arange(batch * keys, device=documents.device)
    starts = positions.new_full((count,), batch * keys).scatter_reduce_(0, run, positions, "amin")
    starts = F.pad(starts, (0, 1), value=batch * keys)
    row, column = starts // keys, starts % keys
    return {
        "cu_seqlens_q": (row * seq + (column - (keys - seq)).clamp(min=0)).int(),
        "cu_seqlens_k": starts.int(),
        # With a max of one query and grouped heads, the package expects one query in every sequence, even in
        # empty ones.
        "max_seqlen_q": max(seq, 2),
        "max_seqlen_k": keys,
    }
