"""The forward kernel of FlashAttention for MPT; attention_kernels.py tells what it rests on."""

from __future__ import annotations

from .attention_kernels import (
    LOWEST,
    NOTHING,
    bias_of,
    constexpr,
    is_kept,
    is_visible,
    load_rows,
    marks_of_queries,
    query_bounds,
    scores_of,
    shift_of,
    store_rows,
    tl,
    triton,
)


@triton.jit
def _forward_span(
    acc, total, highest, q, k, v, stride_k, stride_v, low, whole_low, whole_high, high, keys, places_q,
    marks, marks_q, slope, frame, inner, outer, window, seed, head, dropout, HEAD_DIM: constexpr, WIDTH:
    constexpr, BLOCK_K:
    constexpr, MASKED: constexpr, HAS_ALIBI: constexpr, HAS_MARKS: constexpr, HAS_PREFIX: constexpr, EXACT:
    constexpr, HAS_WINDOW: constexpr, HAS_SOFTCAP: constexpr, HAS_DROPOUT: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Visits key blocks from the last to the first: those in [whole_low, whole_high), or the others.

    All four bounds are multiples of BLOCK_K.
    """
    inner_keys = whole_high - whole_low
    for back in range((high - low - inner_keys if MASKED else inner_keys) // BLOCK_K):
        start = (high if MASKED else whole_high) - (back + 1) * BLOCK_K
        if MASKED:
            start -= tl.where(start < whole_high, inner_keys, 0)
        places_k = start + tl.arange(0, BLOCK_K)
        k_block = load_rows(k, start, stride_k, keys, BLOCK_K, HEAD_DIM, WIDTH, MASKED)
        scores = scores_of(tl.dot(q, tl.trans(k_block), input_precision=PRECISION), inner, outer, HAS_SOFTCAP)
        if HAS_ALIBI:
            scores += bias_of(slope, places_q[:, None], places_k[None, :], frame, EXACT)
        if MASKED:
            marks_k = places_k
            if HAS_MARKS:
                marks_k = tl.load(marks + places_k, mask=places_k < keys, other=-1)
            visible = is_visible(
                places_q[:, None], places_k[None, :], marks_q[:, None], marks_k[None, :], window,
                HAS_MARKS, HAS_PREFIX, HAS_WINDOW,
            )  # fmt: skip
            scores = tl.where(visible, scores, NOTHING)
        now = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - now[:, None])
        shrink = tl.exp2(highest - now)
        total = total * shrink + tl.sum(weights, 1)
        if HAS_DROPOUT:
            kept = is_kept(seed, head, places_q[:, None], places_k[None, :], dropout)
            weights = tl.where(kept, weights, 0.0)
        v_block = load_rows(v, start, stride_v, keys, BLOCK_K, HEAD_DIM, WIDTH, MASKED)
        acc = tl.dot(weights.to(v_block.dtype), v_block, acc * shrink[:, None], input_precision=PRECISION)
        highest = now
    return acc, total, highest


@triton.jit
def _bound(q, longest, inner, outer, HAS_SOFTCAP: constexpr):
    """What no score of a row exceeds before the bias, by Cauchy and Schwarz; 1e29 where that is no number."""
    norm = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)) * longest
    bound = outer * inner * norm if HAS_SOFTCAP else outer * norm
    bound = tl.where(bound < 1e28, bound * 1.001, 1e29)
    return tl.where(bound < 1e29, tl.minimum(outer, bound), bound) if HAS_SOFTCAP else bound


@triton.jit
def _stop(bound, highest, inside, slope, frame, bits, BLOCK_K: constexpr):
    """The first block that may still count: no key before it reaches a weight of 2 ** -bits in any row."""
    # A row that has seen nothing says nothing; one whose scores are no numbers forbids to stop.
    gap = tl.where(highest > LOWEST, bound - highest, tl.where(highest == LOWEST, NOTHING, 1e29))
    widest = tl.max(tl.where(inside, gap, NOTHING))
    stop = tl.minimum(tl.maximum(frame - (widest + bits) / slope, 0.0), frame)
    return stop.to(tl.int32) // BLOCK_K * BLOCK_K


@triton.jit(do_not_specialize=["seq", "keys", "plane", "blocks"])
def forward_kernel(
    q, k, v, out, log_sum, reach, slopes, marks, bounds, longest, seed,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    seq, keys, plane, n_heads, blocks, inner, outer, window, dropout, bits,
    GROUP: constexpr, HEAD_DIM: constexpr, WIDTH: constexpr, BLOCK_Q: constexpr,
    BLOCK_K: constexpr, HAS_ALIBI: constexpr, HAS_MARKS: constexpr, HAS_PREFIX: constexpr, EXACT: constexpr,
    HAS_WINDOW: constexpr, HAS_SOFTCAP: constexpr, HAS_DROPOUT: constexpr, SKIPS: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """One block of queries of one head.

    Writes out (batch, seq, n_heads, head_dim), log_sum (batch, n_heads, seq), the base-2 logarithm of the sum
    of exponentials, infinite for rows that see nothing, and reach (batch, n_heads, blocks), the first place
    visited.
    """
    # The longest rows first, so that no long one is left at the end.
    block = blocks - 1 - tl.program_id(0) % blocks
    head_of_all = tl.program_id(0) // blocks
    row, head = head_of_all // n_heads, head_of_all % n_heads
    past, begin = keys - seq, block * BLOCK_Q
    q += row.to(tl.int64) * stride_qb + head * stride_qh
    k += row.to(tl.int64) * stride_kb + head // GROUP * stride_kh
    v += row.to(tl.int64) * stride_vb + head // GROUP * stride_vh
    marks += row * keys
    bounds += row * keys

    rows = begin + tl.arange(0, BLOCK_Q)
    places_q, frame = past + rows, past + begin
    marks_q = marks_of_queries(marks, places_q, rows < seq) if HAS_MARKS else places_q
    slope = tl.load(slopes + head) * 1.4426950408889634 if HAS_ALIBI else 0.0
    drawn_from = tl.load(seed) if HAS_DROPOUT else 0
    q_block = load_rows(q, begin, stride_qs, seq, BLOCK_Q, HEAD_DIM, WIDTH, True)
    low, whole_low, whole_high, high = query_bounds(
        bounds, plane, begin, past, seq, keys, window, BLOCK_Q, BLOCK_K, HAS_MARKS, HAS_PREFIX, HAS_WINDOW
    )

    acc = tl.zeros([BLOCK_Q, WIDTH], dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    highest = tl.full([BLOCK_Q], LOWEST, dtype=tl.float32)
    if SKIPS:
        longest_key = tl.load(longest + row * (n_heads // GROUP) + head // GROUP)
        bound = _bound(q_block, longest_key, inner, outer, HAS_SOFTCAP)
        # No row's highest score is below its bound's negative; the edges are visited before it is known.
        stop = _stop(bound, -bound, rows < seq, slope, frame, bits, BLOCK_K)
        low = tl.minimum(tl.maximum(low, stop), whole_high)
        whole_low = tl.maximum(whole_low, low)
    for span in tl.static_range(2):
        if span == 1 and SKIPS:
            stop = _stop(bound, highest, rows < seq, slope, frame, bits, BLOCK_K)
            whole_low = tl.minimum(tl.maximum(whole_low, stop), whole_high)
            low = tl.minimum(tl.maximum(low, stop), whole_low)
        acc, total, highest = _forward_span(
            acc, total, highest, q_block, k, v, stride_ks, stride_vs, low, whole_low, whole_high, high,
            keys, places_q, marks, marks_q, slope, frame, inner, outer, window, drawn_from, head_of_all,
            dropout, HEAD_DIM, WIDTH, BLOCK_K, span == 0, HAS_ALIBI, HAS_MARKS, HAS_PREFIX, EXACT,
            HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    tl.store(reach + head_of_all * blocks + block, low)

    sees = total > 0
    logarithm = highest + tl.log2(tl.where(sees, total, 1.0)) - shift_of(slope, places_q, frame, EXACT)
    tl.store(log_sum + head_of_all.to(tl.int64) * seq + rows, tl.where(sees, logarithm, float("inf")),
             mask=rows < seq)  # fmt: skip
    acc = acc / (tl.where(sees, total, 1.0) * (1 - dropout))[:, None]
    out += (row.to(tl.int64) * seq * n_heads + head) * HEAD_DIM
    store_rows(out, acc, begin, n_heads * HEAD_DIM, seq, BLOCK_Q, HEAD_DIM, WIDTH)
