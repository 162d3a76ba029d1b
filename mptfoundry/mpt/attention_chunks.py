"""Attention with the plain formula for a few queries at a time: supports every feature, dtype and device.

Scores and masks exist for only one chunk at a time, and backward recomputes them, so memory is linear in the
sequence. A window limits the keys that a chunk reads.

Letters of the shapes: group = n_heads / kv_heads; queries = those of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .position import AttentionContext

# Scores per chunk: few enough for a CPU's cache, enough to occupy a GPU.
_CHUNK_SCORES = {"cpu": 2**20, "cuda": 2**27}
_FEWEST_QUERIES = 16

# Queries [start, stop) against keys [key_start, key_stop).
_Chunk = tuple[int, int, int, int]


def attend_by_chunks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
) -> torch.Tensor:
    """Attend from (batch, seq, n_heads, head_dim) to (batch, keys, kv_heads, head_dim).

    Returns:
        (batch, seq, n_heads, head_dim) in ``query``'s dtype; probabilities are float32 or wider.
    """
    return _Chunks.apply(query, key, value, context)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.context = context
        ctx.random_state = _random_state(query.device) if context.dropout else None
        k, v = _heads_first(key), _heads_first(value)  # (batch * kv_heads, keys, head_dim)
        out = query.new_empty(query.shape)
        for chunk in _chunks(query, key, context):
            queries, keys = slice(*chunk[:2]), slice(*chunk[2:])
            q = _by_kv_head(query[:, queries], key.shape[2])
            weights, _ = _weights(q, k[:, keys], query, key, chunk, context)
            if context.dropout:
                weights *= _noise(weights, context.dropout)
            part = weights.to(v.dtype) @ v[:, keys]  # (batch * kv_heads, group * queries, head_dim)
            out[:, queries] = _by_query(part, out[:, queries].shape)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        if ctx.random_state is None:
            return *_backward(grad, query, key, value, ctx.context), None
        with torch.random.fork_rng([query.device] if query.is_cuda else []):
            _restore_random_state(ctx.random_state, query.device)
            return *_backward(grad, query, key, value, ctx.context), None


def _backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, chunk by chunk; key and value accumulate in float32."""
    kv_heads = key.shape[2]
    k, v = _heads_first(key), _heads_first(value)
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_query = query.new_empty(query.shape)
    grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for chunk in _chunks(query, key, context):
        queries, keys = slice(*chunk[:2]), slice(*chunk[2:])
        q, g = _by_kv_head(query[:, queries], kv_heads), _by_kv_head(grad[:, queries], kv_heads)
        weights, tanh = _weights(q, k[:, keys], query, key, chunk, context)
        grad_weights = (g @ v[:, keys].mT).to(wide)  # (batch * kv_heads, group * queries, keys)
        if context.dropout:
            noise = _noise(weights, context.dropout)
            grad_weights *= noise
            grad_v[:, keys] += ((weights * noise).to(g.dtype).mT @ g).to(wide)
        else:
            grad_v[:, keys] += (weights.to(g.dtype).mT @ g).to(wide)
        grad_scores = weights.mul_(grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
        if tanh is not None:
            grad_scores *= 1 - tanh.square()
        grad_scores = grad_scores.mul_(context.scale).to(q.dtype)
        part = grad_scores @ k[:, keys]
        grad_query[:, queries] = _by_query(part, grad_query[:, queries].shape)
        grad_k[:, keys] += (grad_scores.mT @ q).to(wide)
    batch = query.shape[0]
    grad_key, grad_value = (x.unflatten(0, (batch, kv_heads)).transpose(1, 2) for x in (grad_k, grad_v))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _chunks(query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> list[_Chunk]:
    """Split the queries into chunks, each with the keys that causality, prefix and window allow."""
    batch, seq, n_heads, _ = query.shape
    keys = key.shape[1]
    past = keys - seq
    window = keys if context.window is None else context.window
    scores_of_query = batch * n_heads * min(keys, 2 * window + 1)
    budget = _CHUNK_SCORES.get(query.device.type, _CHUNK_SCORES["cuda"])
    step = max(_FEWEST_QUERIES, budget // scores_of_query)
    chunks = []
    for start in range(0, seq, step):
        stop = min(start + step, seq)
        key_stop = past + stop if context.prefix is None else min(keys, past + stop + window)
        chunks.append((start, stop, max(0, past + start - window), key_stop))
    return chunks


def _weights(
    q: torch.Tensor,
    k: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    chunk: _Chunk,
    context: AttentionContext,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention weights of a chunk before dropout, and the tanh of softcapping if there is one.

    Args:
        q: (batch * kv_heads, group * queries, head_dim).
        k: (batch * kv_heads, keys, head_dim), the chunk's keys.
        query, key: The full tensors, for their shapes.
        chunk: The ranges of queries and keys in ``q`` and ``k``.
        context: Scale, bias and mask.

    Returns:
        Two tensors (batch * kv_heads, group * queries, keys), float32 or wider.
    """
    batch, seq, n_heads, _ = query.shape
    start, stop, key_start, key_stop = chunk
    scores = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    torch.baddbmm(scores, q, k.mT, beta=0, alpha=context.scale, out=scores)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    tanh = None
    if context.softcap is not None:
        tanh = scores.div_(context.softcap).tanh_()
        scores = tanh * context.softcap
    positions = torch.arange(key.shape[1], device=q.device)
    past = key.shape[1] - seq
    distance = positions[past + start : past + stop, None] - positions[key_start:key_stop]  # (queries, keys)
    by_head = scores.view(batch, n_heads, stop - start, key_stop - key_start)
    if context.slopes is not None:
        slopes = context.slopes.to(scores.dtype)[:, None, None]
        by_head.addcmul_(slopes, distance.abs().to(scores.dtype), value=-1)
    hidden = hidden_keys(distance, past + start, past + stop, key_start, key_stop, context)
    if hidden is not None:
        by_head.masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, -1), tanh


def hidden_keys(
    distance: torch.Tensor, start: int, stop: int, key_start: int, key_stop: int, context: AttentionContext
) -> torch.Tensor | None:
    """The keys [key_start, key_stop) hidden from tokens [start, stop): (batch or 1, 1, queries, keys) bool.

    None if no key is hidden, as for a single query without documents.
    """
    hidden = None
    if key_stop - 1 > start:
        hidden = (distance < 0)[None]
        if context.prefix is not None:
            prefix = context.prefix
            hidden = hidden & ~(prefix[:, start:stop, None] & prefix[:, None, key_start:key_stop])
    if context.window is not None:
        beyond = (distance.abs() > context.window)[None]
        hidden = beyond if hidden is None else hidden | beyond
    if context.documents is not None:
        own = context.documents[:, start:stop, None]
        foreign = own != context.documents[:, None, key_start:key_stop]
        hidden = foreign if hidden is None else hidden | foreign
    return None if hidden is None else hidden[:, None]


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(batch, keys, heads, head_dim) as (batch * heads, keys, head_dim); a view where strides allow."""
    return x.transpose(1, 2).flatten(0, 1)


def _by_kv_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(batch, queries, n_heads, head_dim) as (batch * kv_heads, group * queries, head_dim)."""
    batch, queries, n_heads, head_dim = x.shape
    return x.transpose(1, 2).reshape(batch * kv_heads, n_heads // kv_heads * queries, head_dim)


def _by_query(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of ``_by_kv_head``: (batch, queries, n_heads, head_dim) of the given shape."""
    batch, queries, n_heads, head_dim = shape
    return x.view(batch, n_heads, queries, head_dim).transpose(1, 2)


def _noise(weights: torch.Tensor, probability: float) -> torch.Tensor:
    """Dropout factors: 0 with the dropout probability, otherwise 1 / (1 - probability)."""
    return torch.empty_like(weights).bernoulli_(1 - probability).div_(1 - probability)


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore_random_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class WeightsKept:
    """A backend that keeps each layer's attention weights, for `output_attentions`.

    It computes the plain formula; memory is quadratic in the sequence.

    Attributes:
        weights: For each layer so far, (batch, n_heads, seq, keys) in the queries' dtype, after dropout.
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
    """Softmax of the scores that AttentionContext defines, 0 for masked keys.

    Args:
        query: (batch, seq, n_heads, head_dim), for the last ``seq`` of the keys' tokens.
        key: (batch, keys, kv_heads, head_dim).
        context: Scale, bias and mask.

    Returns:
        (batch, n_heads, seq, keys), float32 or wider. Rows of padding are meaningless.
    """
    seq, keys = query.shape[1], key.shape[1]
    past = keys - seq
    group = query.shape[2] // key.shape[2]
    repeated = key.repeat_interleave(group, 2).transpose(1, 2)  # (batch, n_heads, keys, head_dim)
    scores = context.scale * query.transpose(1, 2) @ repeated.mT  # (batch, n_heads, seq, keys)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if context.softcap is not None:
        scores = context.softcap * torch.tanh(scores / context.softcap)
    positions = torch.arange(keys, device=query.device)
    distance = positions[past:, None] - positions  # (seq, keys)
    if context.slopes is not None:
        scores = scores - context.slopes.to(scores.dtype)[:, None, None] * distance.abs()
    hidden = hidden_keys(distance, past, keys, 0, keys, context)
    return torch.softmax(scores if hidden is None else scores.masked_fill(hidden, -torch.inf), -1)
