"""Causal attention in float32 on a CPU, with ALiBi and documents: fast, exact, memory linear in the sequence.

The lower triangle of a document's scores is split into small triangles along the diagonal and rectangles left
of them. PyTorch's fused CPU kernel computes each piece; a row's pieces are combined by their lse (logsumexp),
also in backward (https://arxiv.org/abs/2205.14135, section 3.1). A triangle's bias is a small table of
distances. A rectangle's bias is one number per key, because the softmax cancels the part that all keys of a
row share. Both are relative to the piece, so long documents lose no precision. ALiBi decreases linearly, so
distant keys have zero weight in float32 and are skipped. Small weights would be denormal numbers, which slow
down a CPU's products by a factor of ten, so they are flushed to zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .position import PADDING, AttentionContext

# Side of the small triangles: larger ones exceed the CPU's cache, smaller ones need more calls.
_SIDE = 256

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# A document, or documents at the same positions in several rows: rows [first, last), tokens [start, stop).
Segment = tuple[int, int, int, int]


class _Piece(NamedTuple):
    """``number`` equal blocks of the scores, ``step`` tokens apart, for some rows and heads.

    ``queries`` and ``keys`` belong to the first block, as (start, length); in a triangle they are equal.
    """

    rows: slice
    heads: slice
    queries: tuple[int, int]
    keys: tuple[int, int]
    step: int
    number: int

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
        query: (batch, seq, n_heads, head_dim) float32 on a CPU; ``key`` and ``value`` with kv_heads instead.
        context: Scale and slopes.
        segments: The result of ``find_segments``.

    Returns:
        (batch, seq, n_heads, head_dim); zero for padding.
    """
    torch.set_flush_denormal(True)  # on a machine with a GPU it isn't set yet
    group = query.shape[2] // key.shape[2]
    if group > 1:
        key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    return _Blocks.apply(query, key, value, context, segments)


def find_segments(documents: torch.Tensor | None, batch: int, seq: int) -> tuple[Segment, ...] | None:
    """The documents' bounds as plain numbers; adjacent rows with the same bounds share segments.

    ``documents`` is (batch, seq) int64 on a CPU, or None if each row is one document. The result, without
    padding, is None if there is padding inside a document.
    """
    if documents is None:
        return ((0, batch, 0, seq),)
    return _segments_of(documents)


def _segments_of(documents: torch.Tensor) -> tuple[Segment, ...] | None:
    batch, seq = documents.shape
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
    """Causal attention of (batch, seq, n_heads, head_dim) float32 on a CPU, piece by piece.

    Inside, tensors are (batch, n_heads, seq, head_dim), and lse is (batch, n_heads, seq).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
        segments: tuple[Segment, ...],
    ) -> torch.Tensor:
        q, k, v = (_heads_second(x) for x in (query, key, value))
        pieces = _cut(q, k, segments, context)
        out = lse = None
        if not _begins_whole(pieces, q):
            out = query.new_zeros(query.shape).transpose(1, 2)
            lse = query.new_zeros(query.shape[:3]).transpose(1, 2)
        for piece in pieces:
            bias, slant = _bias_of(piece, context)
            parts = _flash(
                _blocks(q, piece, piece.queries).flatten(0, 1),
                _blocks(k, piece, piece.keys).flatten(0, 1),
                _blocks(v, piece, piece.keys).flatten(0, 1),
                0.0,
                piece.is_triangle,
                attn_mask=bias,
                scale=context.scale,
            )
            if out is None or lse is None:
                out, lse = (_joined(part, q.shape[0]) for part in parts)
            else:
                _combine(out, lse, parts, piece, slant)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces, ctx.context = pieces, context
        assert out is not None
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads: list[torch.Tensor] = []
        if not _begins_whole(ctx.pieces, q):
            grads = [grad.new_zeros(grad.shape).transpose(1, 2) for _ in range(3)]
        grad = _heads_second(grad)
        for piece in ctx.pieces:
            bias, slant = _bias_of(piece, ctx.context)
            sums = _blocks(lse, piece, piece.queries)
            parts = _flash_backward(
                _blocks(grad, piece, piece.queries).flatten(0, 1),
                _blocks(q, piece, piece.queries).flatten(0, 1),
                _blocks(k, piece, piece.keys).flatten(0, 1),
                _blocks(v, piece, piece.keys).flatten(0, 1),
                _blocks(out, piece, piece.queries).flatten(0, 1),
                (sums if slant is None else sums + slant).flatten(0, 1),
                0.0,
                piece.is_triangle,
                attn_mask=bias,
                scale=ctx.context.scale,
            )
            if not grads:
                grads = [_joined(part, q.shape[0]) for part in parts]
                continue
            for whole, part, tokens in zip(
                grads, parts, (piece.queries, piece.keys, piece.keys), strict=True
            ):
                _blocks(whole, piece, tokens).add_(part.unflatten(0, (-1, piece.number)))
        return *(x.transpose(1, 2) for x in grads), None, None


def _combine(
    out: torch.Tensor,
    lse: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor],
    piece: _Piece,
    slant: torch.Tensor | None,
) -> None:
    """Add a piece's results to those of all pieces, weighted by their lse."""
    part, part_sum = (x.unflatten(0, (-1, piece.number)) for x in parts)
    old, old_sum = (_blocks(x, piece, piece.queries) for x in (out, lse))
    if slant is None:
        old.copy_(part)
        old_sum.copy_(part_sum)
    else:
        part_sum = part_sum - slant
        old.lerp_(part, torch.sigmoid(part_sum - old_sum).unsqueeze(-1))
        old_sum.copy_(torch.logaddexp(old_sum, part_sum))


def _heads_second(x: torch.Tensor) -> torch.Tensor:
    """(batch, seq, heads, head_dim) as (batch, heads, seq, head_dim), with contiguous features."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _cut(
    q: torch.Tensor, k: torch.Tensor, segments: tuple[Segment, ...], context: AttentionContext
) -> list[_Piece]:
    """Split the segments' triangles into pieces; a rectangle comes after the triangles of its queries."""
    n_heads, seq = q.shape[1:3]
    side, reaches = seq, (seq,) * n_heads
    if context.slopes is not None:
        side = _SIDE
        if context.skips and any(stop - start > side for _, _, start, stop in segments):
            reaches = _reaches(q, k, context.slopes, context.scale)
    return [piece for segment in segments for piece in _cut_segment(segment, side, reaches)]


def _cut_segment(segment: Segment, side: int, reaches: tuple[int, ...]) -> list[_Piece]:
    """Split one triangle into triangles of ``side``, the last one smaller, and rectangles left of them."""
    first, last, begin, end = segment
    rows, heads, length = slice(first, last), slice(0, len(reaches)), end - begin
    triangles = []
    for start, size, number in ((begin, side, length // side), (end - length % side, length % side, 1)):
        if size and number:
            triangles.append(_Piece(rows, heads, (start, size), (start, size), size, number))
    return triangles if length <= side else triangles + _rectangles(segment, side, reaches)


def _rectangles(segment: Segment, side: int, reaches: tuple[int, ...]) -> list[_Piece]:
    """Rectangles that double in size: left of every second triangle, of every second pair, and so on. At the
    end of a segment each size may have a shorter piece."""
    first, last, begin, end = segment
    rows, length = slice(first, last), end - begin
    pieces = []
    size = side
    while size < length:
        pairs, rest = divmod(length, 2 * size)
        edge = begin + size
        for heads, reach in _groups(reaches, size):
            keys, near = (edge - reach, reach), min(reach, rest - size)
            if pairs:
                pieces.append(_Piece(rows, heads, (edge, reach), keys, 2 * size, pairs))
            if near > 0:
                shift = pairs * 2 * size
                last_keys = (keys[0] + shift, reach)
                pieces.append(_Piece(rows, heads, (edge + shift, near), last_keys, 2 * size, 1))
        size *= 2
    return pieces


def _groups(reaches: tuple[int, ...], size: int) -> Iterator[tuple[slice, int]]:
    """Groups of adjacent heads with the same reach within ``size`` tokens, and that reach."""
    start = 0
    for reach, heads in groupby(min(reach, size) for reach in reaches):
        stop = start + len(list(heads))
        yield slice(start, stop), reach
        start = stop


def _reaches(q: torch.Tensor, k: torch.Tensor, slopes: torch.Tensor, scale: float) -> tuple[int, ...]:
    """How many tokens back each head must look: keys farther away don't change a float32 result.

    A score is at most M = scale * max|q| * max|k| before its bias, a token's score with itself at least -M.
    So all keys at distance d or more have together at most seq * exp(2 M - slope * d) of a row's weight; the
    reach, a power of two, makes that less than 2 ** -30.
    """
    highest = scale * _longest(q) * _longest(k)
    distance = (2 * highest + 30 * math.log(2) + math.log(q.shape[2])) / slopes
    powers = torch.log2(distance).ceil().nan_to_num(torch.inf).clamp(0, math.ceil(math.log2(q.shape[2])))
    return tuple(2 ** int(power) for power in powers.tolist())


def _longest(x: torch.Tensor) -> torch.Tensor:
    """The largest vector norm of each head, (n_heads,)."""
    return torch.linalg.vector_norm(x, dim=-1).amax((0, 2))


def _blocks(x: torch.Tensor, piece: _Piece, tokens: tuple[int, int]) -> torch.Tensor:
    """A view of a piece's part of (batch, n_heads, seq, ...) as (rows, number, heads, length, ...)."""
    start, length = tokens
    stop = start + (piece.number - 1) * piece.step + length
    part = x[piece.rows, piece.heads, start:stop].unfold(2, length, piece.step).movedim(2, 1)
    return part if x.dim() == 3 else part.mT


def _begins_whole(pieces: list[_Piece], q: torch.Tensor) -> bool:
    """Whether the first piece covers all queries, so that its results need not be copied."""
    if not pieces:
        return False
    rows, heads, (start, length), _, step, number = pieces[0]
    is_every_row = rows == slice(0, q.shape[0]) and heads == slice(0, q.shape[1])
    return is_every_row and start == 0 and length == step and length * number == q.shape[2]


def _joined(part: torch.Tensor, batch: int) -> torch.Tensor:
    """The kernel's (batch * number, n_heads, length, ...) as (batch, n_heads, seq, ...)."""
    part = part.transpose(1, 2)
    return part.reshape(batch, -1, *part.shape[2:]).transpose(1, 2)


def _bias_of(piece: _Piece, context: AttentionContext) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The bias of a piece, and the correction of its rows' lse; None for a triangle."""
    slopes = context.slopes
    if slopes is None:
        return None, None
    if not piece.is_triangle:
        return _bias_of_rectangle(piece, slopes, context)
    table = context.once("triangle", lambda: _triangle(slopes))
    return table[:, :, : piece.queries[1], : piece.queries[1]], None


def _bias_of_rectangle(
    piece: _Piece, slopes: torch.Tensor, context: AttentionContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rectangle's bias, (1, heads, 1, keys), measured from its right edge, and its correction.

    The correction (heads, queries) is the query's distance from that edge times the slope, the same for all
    its keys.
    """
    queries, keys = piece.queries[1], piece.keys[1]
    size = 2 ** math.ceil(math.log2(max(keys, queries)))
    fall = context.once(f"fall {size}", lambda: (slopes[:, None] * torch.arange(-size, 0))[None, :, None])
    slant = context.once(f"slant {size}", lambda: slopes[:, None] * torch.arange(size))
    return fall[:, piece.heads, :, -keys:], slant[piece.heads, :queries]


def _triangle(slopes: torch.Tensor) -> torch.Tensor:
    """ALiBi inside a triangle, (1, n_heads, side, side)."""
    positions = torch.arange(_SIDE)
    return (slopes[:, None, None] * (positions - positions[:, None]))[None]
