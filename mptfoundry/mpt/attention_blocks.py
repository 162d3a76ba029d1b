"""Causal attention in float32 on a CPU, with ALiBi and documents: fast, exact, memory linear in the sequence.

The lower triangle of a document's scores is cut into small triangles along the diagonal and rectangles left
of them. PyTorch's fused CPU kernel computes each; the parts of a row's softmax are joined by the logarithms
of their sums, in backward too (as in https://arxiv.org/abs/2205.14135, section 3.1). Bias of a triangle is a
small table of distances; that of a rectangle needs one number a key, since a row's own share of it cancels.
Both are measured from where the piece lies, so nothing is lost to rounding however long the document.
Since ALiBi falls linearly, far keys have no weight left in float32; they are not computed.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any, NamedTuple

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


class _Piece(NamedTuple):
    """A part of the scores: some rows' and heads' queries against keys. A triangle's are the same tokens."""

    rows: slice
    heads: slice
    queries: slice
    keys: slice

    @property
    def is_triangle(self) -> bool:
        return self.queries == self.keys


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
        ctx.pieces, ctx.context = _cut(q, k, segments, context), context
        covered = sum((last - first) * (stop - start) for first, last, start, stop in segments)
        ctx.is_full = covered == q.shape[0] * q.shape[2]
        ctx.is_one = ctx.is_full and len(ctx.pieces) == 1
        if ctx.is_one:
            bias, _ = _bias_of(ctx.pieces[0], context)
            out, log_sum = _flash(q, k, v, 0.0, True, attn_mask=bias, scale=context.scale)
        else:
            out, log_sum = _forward_pieces(q, k, v, ctx)
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        grad = _heads_second(grad)
        if ctx.is_one:
            bias, _ = _bias_of(ctx.pieces[0], ctx.context)
            grads = _flash_backward(
                grad, q, k, v, out, log_sum, 0.0, True, attn_mask=bias, scale=ctx.context.scale
            )
        else:
            grads = _backward_pieces(grad, q, k, v, out, log_sum, ctx)
        return *(x.transpose(1, 2) for x in grads), None, None


def _heads_second(x: torch.Tensor) -> torch.Tensor:
    """(batch, seq, heads, head_dim) as (batch, heads, seq, head_dim), with dense features for the kernel."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _cut(
    q: torch.Tensor, k: torch.Tensor, segments: tuple[Segment, ...], context: AttentionContext
) -> list[_Piece]:
    """Cut the segments' triangles; a rectangle comes after the triangles of its queries and of its keys."""
    n_heads, seq = q.shape[1:3]
    is_short = all(stop - start <= _SIDE for _, _, start, stop in segments)
    reaches = (seq,) * n_heads
    if context.slopes is not None and not is_short:
        reaches = _reaches(q, k, context.slopes, context.scale)
    side = seq if context.slopes is None else _SIDE
    pieces = []
    for first, last, start, stop in segments:
        pieces += _cut_triangle(slice(first, last), start, stop, side, reaches)
    return pieces


def _cut_triangle(rows: slice, start: int, stop: int, side: int, reaches: tuple[int, ...]) -> list[_Piece]:
    """Cut the triangle of tokens [start, stop) into triangles of at most ``side`` and rectangles."""
    if stop - start <= side:
        tokens = slice(start, stop)
        return [_Piece(rows, slice(0, len(reaches)), tokens, tokens)]
    half = side
    while 2 * half < stop - start:
        half *= 2
    middle = start + half
    pieces = _cut_triangle(rows, start, middle, side, reaches)
    pieces += _cut_triangle(rows, middle, stop, side, reaches)
    head = 0
    for reach, same in groupby(min(reach, half) for reach in reaches):
        heads = slice(head, head + len(list(same)))
        head = heads.stop
        queries = slice(middle, min(stop, middle + reach))
        pieces.append(_Piece(rows, heads, queries, slice(middle - reach, middle)))
    return pieces


def _reaches(q: torch.Tensor, k: torch.Tensor, slopes: torch.Tensor, scale: float) -> tuple[int, ...]:
    """How many tokens back each head can see: what lies farther changes no float32 result.

    A score is at most M = scale * max|q| * max|k| before its bias, a token's score with itself at least -M.
    So all keys from a distance d on have together at most seq * exp(2 M - slope * d) of a row's weight; the
    reach, a power of two, makes that less than 2 ** -30.
    """
    highest = scale * _longest(q) * _longest(k)
    distance = (2 * highest + 30 * math.log(2) + math.log(q.shape[2])) / slopes
    powers = torch.log2(distance).ceil().nan_to_num(torch.inf).clamp(0, math.ceil(math.log2(q.shape[2])))
    return tuple(2 ** int(power) for power in powers.tolist())


def _longest(x: torch.Tensor) -> torch.Tensor:
    """The longest vector of each head, (n_heads,)."""
    return torch.linalg.vector_norm(x, dim=-1).amax((0, 2))


def _forward_pieces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend piece by piece.

    Returns:
        The output, (batch, n_heads, seq, head_dim), zero for padding, and the logarithmic sums of the rows'
        exponentials, (batch, n_heads, seq).
    """
    batch, n_heads, seq, head_dim = q.shape
    make = q.new_empty if ctx.is_full else q.new_zeros
    out = make(batch, seq, n_heads, head_dim).transpose(1, 2)
    log_sum = make(batch, seq, n_heads).transpose(1, 2)
    for piece in ctx.pieces:
        query = piece.rows, piece.heads, piece.queries
        key = piece.rows, piece.heads, piece.keys
        bias, slant = _bias_of(piece, ctx.context)
        part, part_sum = _flash(
            q[query],
            k[key],
            v[key],
            0.0,
            piece.is_triangle,
            attn_mask=bias,
            scale=ctx.context.scale,
        )
        if slant is None:
            out[query], log_sum[query] = part, part_sum
            continue
        part_sum -= slant
        so_far = log_sum[query]
        out[query].lerp_(part, torch.sigmoid(part_sum - so_far).unsqueeze(-1))
        torch.logaddexp(so_far, part_sum, out=so_far)
    return out, log_sum


def _backward_pieces(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    ctx: Any,
) -> tuple[torch.Tensor, ...]:
    """Gradients of queries, keys and values, each (batch, n_heads, seq, head_dim)."""
    batch, n_heads, seq, head_dim = q.shape
    make = q.new_empty if ctx.is_full else q.new_zeros
    grads = tuple(make(batch, seq, n_heads, head_dim).transpose(1, 2) for _ in range(3))
    for piece in ctx.pieces:
        query = piece.rows, piece.heads, piece.queries
        key = piece.rows, piece.heads, piece.keys
        bias, slant = _bias_of(piece, ctx.context)
        parts = _flash_backward(
            grad[query],
            q[query],
            k[key],
            v[key],
            out[query],
            log_sum[query] if slant is None else log_sum[query] + slant,
            0.0,
            piece.is_triangle,
            attn_mask=bias,
            scale=ctx.context.scale,
        )
        for whole, part, place in zip(grads, parts, (query, key, key), strict=True):
            if piece.is_triangle:
                whole[place] = part
            else:
                whole[place] += part
    return grads


def _bias_of(piece: _Piece, context: AttentionContext) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The bias of a piece, and what its rows' logarithmic sums have too much; None for a triangle.

    A rectangle's bias falls from its right edge, (1, heads, 1, keys); the distance of the query from that
    edge, the same for all its keys, is the (heads, queries) slant.
    """
    slopes = context.slopes
    if slopes is None:
        return None, None
    keys, queries = piece.keys.stop - piece.keys.start, piece.queries.stop - piece.queries.start
    if piece.is_triangle:
        table = context.once("triangle", lambda: _triangle(slopes))
        return table[:, :, :queries, :queries], None
    size = 2 ** math.ceil(math.log2(max(keys, queries)))
    fall = context.once(f"fall {size}", lambda: (slopes[:, None] * torch.arange(-size, 0))[None, :, None])
    slant = context.once(f"slant {size}", lambda: slopes[:, None] * torch.arange(size))
    return fall[:, piece.heads, :, -keys:], slant[piece.heads, :queries]


def _triangle(slopes: torch.Tensor) -> torch.Tensor:
    """ALiBi among neighbours, (1, n_heads, side, side)."""
    place = torch.arange(_SIDE)
    return (slopes[:, None, None] * (place - place[:, None]))[None]
