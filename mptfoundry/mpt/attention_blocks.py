"""Causal attention in float32 on a CPU, with ALiBi and documents: fast, exact, memory linear in the sequence.

The lower triangle of a document's scores is cut into small triangles along the diagonal and rectangles left
of them. PyTorch's fused CPU kernel computes each; the parts of a row's softmax are joined by the logarithms
of their sums, in backward too (as in https://arxiv.org/abs/2205.14135, section 3.1). Bias of a triangle is a
small table of distances; that of a rectangle needs one number a key, since a row's own share of it cancels.
Both are measured from where the piece lies, so nothing is lost to rounding however long the document.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .position import PADDING, AttentionContext

# ALiBi makes tiny probabilities; as denormal numbers they slow a CPU's products down by a factor of ten.
# Threads of the pool inherit this when they start, so it is said before there are any.
torch.set_flush_denormal(True)

# Side of the small triangles: larger ones leave the processor's cache, smaller ones need more calls.
_SIDE = 256

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# A document, or several alike: rows [first, last) of the batch, tokens [start, stop).
Segment = tuple[int, int, int, int]

# A piece of a document's triangle: queries [start, stop) against keys [key_start, key_stop).
_Piece = tuple[int, int, int, int, int, int]


def attend_by_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: AttentionContext,
    segments: tuple[Segment, ...],
) -> torch.Tensor:
    """Attend within each segment, causally.

    Args:
        query: (batch, seq, n_heads, head_dim) float32 on a CPU; ``key`` and ``value`` alike with kv_heads.
        context: Scale and slopes.
        segments: What ``find_segments`` gives.

    Returns:
        (batch, seq, n_heads, head_dim); zero for padding.
    """
    group = query.shape[2] // key.shape[2]
    if group > 1:
        key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    return _Blocks.apply(query, key, value, context, segments)


def find_segments(documents: torch.Tensor | None, batch: int, seq: int) -> tuple[Segment, ...] | None:
    """Say where the documents lie, as plain numbers; rows that are cut alike share their segments.

    Args:
        documents: (batch, seq) int64 on a CPU, or None where each row is one document.
        batch: Rows.
        seq: Tokens in a row.

    Returns:
        The segments without padding; None if padding stands inside a document.
    """
    if documents is None:
        return ((0, batch, 0, seq),)
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).nonzero()
    numbers = documents[starts[:, 0], starts[:, 1]].tolist()
    cuts: list[list[tuple[int, int]]] = [[] for _ in range(batch)]
    for (row, start), number in zip(starts.tolist(), numbers, strict=True):
        cuts[row].append((start, number))
    rows = []
    for row in cuts:
        real = [number for _, number in row if number != PADDING]
        if len(set(real)) < len(real):
            return None
        stops = [start for start, _ in row[1:]] + [seq]
        rows.append([(start, stop) for (start, n), stop in zip(row, stops, strict=True) if n != PADDING])
    segments: list[Segment] = []
    first = 0
    for last in range(1, batch + 1):
        if last == batch or rows[last] != rows[first]:
            segments += [(first, last, start, stop) for start, stop in rows[first]]
            first = last
    return tuple(segments)


def _cut(segment: Segment, side: int) -> list[_Piece]:
    """Cut a document's triangle into triangles of at most ``side``, each followed by what lies left of it."""
    first, last, start, stop = segment
    if stop - start <= side:
        return [(first, last, start, stop, start, stop)]
    half = side
    while 2 * half < stop - start:
        half *= 2
    middle = start + half
    upper, lower = _cut((first, last, start, middle), side), _cut((first, last, middle, stop), side)
    return [*upper, *lower, (first, last, middle, stop, start, middle)]


class _Blocks(torch.autograd.Function):
    """Causal attention of (batch, seq, n_heads, head_dim) float32 on a CPU, piece by piece."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
        segments: tuple[Segment, ...],
    ) -> torch.Tensor:
        q, k, v = (_heads_second(x) for x in (query, key, value))  # (batch, n_heads, seq, head_dim)
        side = q.shape[2] if context.slopes is None else _SIDE
        pieces = [piece for segment in segments for piece in _cut(segment, side)]
        whole = len(pieces) == 1 and pieces[0][:4] == (0, q.shape[0], 0, q.shape[2])
        ctx.pieces, ctx.whole, ctx.context = pieces, whole, context
        if whole:
            bias, _ = _bias_of(pieces[0], context)
            out, log_sum = _flash(q, k, v, 0.0, True, attn_mask=bias, scale=context.scale)
        else:
            out, log_sum = _forward_pieces(q, k, v, pieces, context)
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        grad = _heads_second(grad)
        if ctx.whole:
            bias, _ = _bias_of(ctx.pieces[0], ctx.context)
            grads = _flash_backward(
                grad, q, k, v, out, log_sum, 0.0, True, attn_mask=bias, scale=ctx.context.scale
            )
        else:
            grads = _backward_pieces(grad, q, k, v, out, log_sum, ctx.pieces, ctx.context)
        return *(x.transpose(1, 2) for x in grads), None, None


def _heads_second(x: torch.Tensor) -> torch.Tensor:
    """(batch, seq, heads, head_dim) as (batch, heads, seq, head_dim), with dense features for the kernel."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _forward_pieces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: list[_Piece], context: AttentionContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend piece by piece; returns (batch, n_heads, seq, head_dim) and the scores' (batch, n_heads, seq)
    logarithmic sums. Padding stays zero."""
    batch, n_heads, seq, head_dim = q.shape
    out = q.new_zeros(batch, seq, n_heads, head_dim).transpose(1, 2)
    log_sum = q.new_zeros(batch, seq, n_heads).transpose(1, 2)
    for piece in pieces:
        first, last, start, stop, key_start, key_stop = piece
        rows, queries, keys = slice(first, last), slice(start, stop), slice(key_start, key_stop)
        bias, slant = _bias_of(piece, context)
        part, part_sum = _flash(
            q[rows, :, queries],
            k[rows, :, keys],
            v[rows, :, keys],
            0.0,
            slant is None,
            attn_mask=bias,
            scale=context.scale,
        )
        if slant is None:
            out[rows, :, queries], log_sum[rows, :, queries] = part, part_sum
        else:
            part_sum -= slant
            so_far = log_sum[rows, :, queries]
            out[rows, :, queries].lerp_(part, torch.sigmoid(part_sum - so_far).unsqueeze(-1))
            torch.logaddexp(so_far, part_sum, out=so_far)
    return out, log_sum


def _backward_pieces(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    pieces: list[_Piece],
    context: AttentionContext,
) -> tuple[torch.Tensor, ...]:
    """Gradients of queries, keys and values, each (batch, n_heads, seq, head_dim)."""
    batch, n_heads, seq, head_dim = q.shape
    grads = tuple(q.new_zeros(batch, seq, n_heads, head_dim).transpose(1, 2) for _ in range(3))
    for piece in pieces:
        first, last, start, stop, key_start, key_stop = piece
        rows, queries, keys = slice(first, last), slice(start, stop), slice(key_start, key_stop)
        bias, slant = _bias_of(piece, context)
        sums = log_sum[rows, :, queries]
        parts = _flash_backward(
            grad[rows, :, queries],
            q[rows, :, queries],
            k[rows, :, keys],
            v[rows, :, keys],
            out[rows, :, queries],
            sums if slant is None else sums + slant,
            0.0,
            slant is None,
            attn_mask=bias,
            scale=context.scale,
        )
        for whole, part, place in zip(grads, parts, (queries, keys, keys), strict=True):
            if slant is None:
                whole[rows, :, place] = part
            else:
                whole[rows, :, place] += part
    return grads


def _bias_of(piece: _Piece, context: AttentionContext) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The bias of a piece, and what its rows' logarithmic sums have too much; None for a triangle.

    A rectangle's bias falls from its right edge, (1, n_heads, 1, keys); the distance of the query from that
    edge, the same for all its keys, is the (n_heads, queries) slant.
    """
    _, _, start, stop, key_start, key_stop = piece
    slopes = context.slopes
    if start == key_start:
        if slopes is None:
            return None, None
        side = stop - start
        table = context.once("triangle", lambda: _triangle(slopes))
        return table[:, :, :side, :side], None
    assert slopes is not None
    keys, queries = key_stop - key_start, stop - start
    bias = context.once(f"{keys} keys", lambda: (slopes[:, None] * torch.arange(-keys, 0))[None, :, None])
    slant = context.once(f"{queries} queries", lambda: slopes[:, None] * torch.arange(queries))
    return bias, slant


def _triangle(slopes: torch.Tensor) -> torch.Tensor:
    """ALiBi among neighbours, (1, n_heads, side, side)."""
    place = torch.arange(_SIDE)
    return (slopes[:, None, None] * (place - place[:, None]))[None]
