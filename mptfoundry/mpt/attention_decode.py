"""The decoding kernels: few queries a row against a cache of many keys; see attention_kernels.py.

One query would keep one program busy with all its keys. So the keys are cut into parts that are visited
side by side, and the parts' results joined (https://pytorch.org/blog/flash-decoding). The queries of all
heads that share a key head are one block of rows: row = member * seq + query.
"""

from __future__ import annotations

from .attention_kernels import (
    LOWEST,
    NOTHING,
    bias_of,
    constexpr,
    is_visible,
    load_rows,
    marks_of_queries,
    scores_of,
    tl,
    triton,
)


@triton.jit(do_not_specialize=["seq", "keys", "parts", "keys_of_part", "stride_mb"])
def decode_kernel(
    q, k, v, partial, partial_sum, slopes, marks,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_mb, seq, keys, parts, keys_of_part, n_heads, inner, outer, window, GROUP: constexpr, HEAD_DIM:
    constexpr, WIDTH: constexpr, ROWS: constexpr, BLOCK_K: constexpr, HAS_ALIBI: constexpr, HAS_MARKS:
    constexpr, HAS_PREFIX: constexpr, EXACT: constexpr, HAS_WINDOW: constexpr, HAS_SOFTCAP: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """All queries of one key head against one part of the keys.

    Writes partial (batch, parts, n_heads, seq, head_dim) float32 and partial_sum (batch, parts, n_heads,
    seq), the base-2 logarithms of the sums of exponentials.
    """
    part = tl.program_id(0) % parts
    kv_heads = n_heads // GROUP
    row, kv_head = tl.program_id(0) // parts // kv_heads, tl.program_id(0) // parts % kv_heads
    past = keys - seq
    q += row.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
    k += row.to(tl.int64) * stride_kb + kv_head * stride_kh
    v += row.to(tl.int64) * stride_vb + kv_head * stride_vh
    marks += row.to(tl.int64) * stride_mb

    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    members, queries = rows // seq, rows % seq
    inside = rows < GROUP * seq
    places_q = past + queries
    q_block = tl.load(q + members[:, None] * stride_qh + queries[:, None] * stride_qs + columns[None, :],
                      mask=inside[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)  # fmt: skip
    slope = tl.zeros([ROWS], dtype=tl.float32)
    if HAS_ALIBI:
        slope = tl.load(slopes + kv_head * GROUP + members, mask=inside, other=0.0) * 1.4426950408889634
    marks_q = marks_of_queries(marks, places_q, inside) if HAS_MARKS else places_q

    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    highest = tl.full([ROWS], LOWEST, dtype=tl.float32)
    begin, end = part * keys_of_part, tl.minimum((part + 1) * keys_of_part, keys)
    for forth in range(tl.cdiv(end - begin, BLOCK_K)):
        start = begin + forth * BLOCK_K
        places_k = start + tl.arange(0, BLOCK_K)
        k_block = load_rows(k, start, stride_ks, end, BLOCK_K, HEAD_DIM, WIDTH, True)
        v_block = load_rows(v, start, stride_vs, end, BLOCK_K, HEAD_DIM, WIDTH, True)
        scores = scores_of(
            tl.dot(q_block, tl.trans(k_block), input_precision=PRECISION), inner, outer, HAS_SOFTCAP
        )
        if HAS_ALIBI:
            scores += bias_of(slope[:, None], places_q[:, None], places_k[None, :], past, EXACT)
        marks_k = tl.load(marks + places_k, mask=places_k < end, other=-1) if HAS_MARKS else places_k
        visible = is_visible(
            places_q[:, None], places_k[None, :], marks_q[:, None], marks_k[None, :], window,
            HAS_MARKS, HAS_PREFIX, HAS_WINDOW,
        )  # fmt: skip
        scores = tl.where(visible, scores, NOTHING)
        now = tl.maximum(highest, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - now[:, None]), tl.exp2(highest - now)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_block.dtype), v_block, acc * shrink[:, None], input_precision=PRECISION)
        highest = now

    sees = total > 0
    safe = tl.where(sees, total, 1.0)
    place = (row * parts + part).to(tl.int64) * n_heads * seq + kv_head * GROUP * seq + rows
    tl.store(partial_sum + place, tl.where(sees, highest + tl.log2(safe), LOWEST), mask=inside)
    tl.store(partial + place[:, None] * HEAD_DIM + columns[None, :], acc / safe[:, None],
             mask=inside[:, None] & (columns < HEAD_DIM)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["seq", "parts"])
def join_kernel(
    partial, partial_sum, out, seq, parts, n_heads,
    HEAD_DIM: constexpr, WIDTH: constexpr, PARTS: constexpr,
):  # fmt: skip
    """A query of one head: joins its parts into out (batch, seq, n_heads, head_dim); zero if it sees none."""
    row, rest = tl.program_id(0) // (n_heads * seq), tl.program_id(0) % (n_heads * seq)
    head, query = rest // seq, rest % seq
    number, columns = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    places = (row * parts + number).to(tl.int64) * n_heads * seq + rest
    logarithms = tl.load(partial_sum + places, mask=number < parts, other=LOWEST)
    highest = tl.max(logarithms)
    weights = tl.exp2(logarithms - highest)
    total = tl.sum(weights)
    inside = (number < parts)[:, None] & (columns < HEAD_DIM)[None, :]
    block = tl.load(partial + places[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    joined = tl.sum(block * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    place = ((row * seq + query).to(tl.int64) * n_heads + head) * HEAD_DIM
    tl.store(out + place + columns, joined.to(out.dtype.element_ty), mask=columns < HEAD_DIM)
