"""The attention backend that calls the flash-attn package (https://github.com/Dao-AILab/flash-attention).

Rows of one document, also those with padding at the end, which earlier tokens don't see, go to its dense
function as they are. Other rows are laid end to end, which copies nothing but a cache, and go to its function
for sequences of various lengths: each *run* of one document's tokens, or of padding, is a sequence.

The package adds slope * column to a score, which float32 rounds the more the larger the column: by a few
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

    Where documents are given without `max_documents`, the first layer of a forward pass waits for the device
    to count them.

    Returns:
        (batch, seq, n_heads, head_dim), in ``query``'s dtype. Padding's rows are finite and mean nothing.

    Raises:
        ValueError: The package can't be imported, or padding stands between tokens of one document.
    """
    if flash_attn_func is None:
        raise ValueError(
            f"attn_config.attn_impl: flash can't be used: flash-attn can't be imported ({import_error}). "
            "Compile it against the installed torch, or use torch or triton."
        )
    documents, options = context.documents, options_of(context)
    if documents is None or context.max_documents == 1:
        return flash_attn_func(query, key, value, **options)
    batch, seq = query.shape[:2]
    bounds = context.once("bounds of runs", lambda: bounds_of_runs(documents, seq, context.max_documents))
    flat = (x.flatten(0, 1) for x in (query, key, value))  # (batch * seq or keys, heads, head_dim)
    return flash_attn_varlen_func(*flat, **bounds, **options).unflatten(0, (batch, seq))


def options_of(context: AttentionContext) -> dict[str, Any]:
    """The arguments that both functions share.

    They let a query see the keys up to the end of the keys less the queries after it, so that fewer queries
    than keys are the last ones.
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
    """Where the runs begin and end in rows laid end to end.

    Args:
        documents: (batch, keys) int64, as in AttentionContext.
        seq: The last so many keys of each row have queries.
        max_documents: As in AttentionContext. With it nothing is asked of the device.

    Returns:
        Cumulative lengths in queries and in keys, int32, from 0 on, and what no length exceeds. There may be
        more sequences than runs: the last ones are empty, and so are, in queries, runs within the cache.

    Raises:
        ValueError: Padding stands between tokens of one document; `max_documents` excludes it.
    """
    batch, keys = documents.shape
    differs = documents[:, 1:] != documents[:, :-1]
    run = F.pad(differs, (1, 0), value=True).flatten().cumsum(0).sub_(1)  # (batch * keys)
    if max_documents is not None:
        count = batch * (max_documents + 1)  # and the padding
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
        # With one query a sequence, grouped heads make the package expect one in each, also in empty ones.
        "max_seqlen_q": max(seq, 2),
        "max_seqlen_k": keys,
    }
