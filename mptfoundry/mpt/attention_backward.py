"""The backward kernels of FlashAttention for MPT; attention_kernels.py tells what they rest on."""

from __future__ import annotations

from .attention_kernels import (
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
def _softmax_gradient(scores, weights, grad_weights, delta, kept, outer, dropout, HAS_SOFTCAP: constexpr,
                      HAS_DROPOUT: constexpr):  # fmt: skip
    """Gradient of the products of queries and keys, but for the factor of the scale."""
    if HAS_DROPOUT:
        grad_weights = tl.where(kept, grad_weights / (1 - dropout), 0.0)
    grad = weights * (grad_weights - delta)
    if HAS_SOFTCAP:
        tangent = scores / outer
        grad = grad * (1 - tangent * tangent)
    return grad


@triton.jit
def _query_span(
    grad_q, q, grad, level, delta, k, v, stride_k, stride_v, low, whole_low, whole_high, high, keys, places_q,
    marks, marks_q, slope, frame, inner, outer, window, seed, head, dropout, HEAD_DIM: constexpr, WIDTH:
    constexpr, BLOCK_K:
    constexpr, MASKED: constexpr, HAS_ALIBI: constexpr, HAS_MARKS: constexpr, HAS_PREFIX: constexpr, EXACT:
    constexpr, HAS_WINDOW: constexpr, HAS_SOFTCAP: constexpr, HAS_DROPOUT: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Adds what key blocks give to the queries' gradients: those in [whole_low, whole_high), or the others.

    All four bounds are multiples of BLOCK_K.
    """
    inner_keys = whole_high - whole_low
    for forth in range((high - low - inner_keys if MASKED else inner_keys) // BLOCK_K):
        start = (low if MASKED else whole_low) + forth * BLOCK_K
        if MASKED:
            start += tl.where(start >= whole_low, inner_keys, 0)
        places_k = start + tl.arange(0, BLOCK_K)
        k_block = load_rows(k, start, stride_k, keys, BLOCK_K, HEAD_DIM, WIDTH, MASKED)
        v_block = load_rows(v, start, stride_v, keys, BLOCK_K, HEAD_DIM, WIDTH, MASKED)
        scores = scores_of(tl.dot(q, tl.trans(k_block), input_precision=PRECISION), inner, outer, HAS_SOFTCAP)
        biased = scores
        if HAS_ALIBI:
            biased += bias_of(slope, places_q[:, None], places_k[None, :], frame, EXACT)
        if MASKED:
            marks_k = places_k
            if HAS_MARKS:
                marks_k = tl.load(marks + places_k, mask=places_k < keys, other=-1)
            visible = is_visible(
                places_q[:, None], places_k[None, :], marks_q[:, None], marks_k[None, :], window,
                HAS_MARKS, HAS_PREFIX, HAS_WINDOW,
            )  # fmt: skip
            biased = tl.where(visible, biased, NOTHING)
        weights = tl.exp2(biased - level[:, None])
        grad_weights = tl.dot(grad, tl.trans(v_block), input_precision=PRECISION)
        kept = is_kept(seed, head, places_q[:, None], places_k[None, :], dropout) if HAS_DROPOUT else True
        grad_products = _softmax_gradient(scores, weights, grad_weights, delta[:, None], kept, outer, dropout,
                                          HAS_SOFTCAP, HAS_DROPOUT)  # fmt: skip
        grad_q = tl.dot(grad_products.to(k_block.dtype), k_block, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit(do_not_specialize=["seq", "keys", "plane", "blocks"])
def backward_query_kernel(
    grad, q, k, v, out, log_sum, reach, slopes, marks, bounds, seed, delta, grad_q,
    stride_gb, stride_gs, stride_gh, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    seq, keys, plane, n_heads, blocks, scale, inner, outer, window, dropout,
    GROUP: constexpr, HEAD_DIM: constexpr, WIDTH: constexpr, BLOCK_Q: constexpr,
    BLOCK_K: constexpr, REACH_BLOCK: constexpr, HAS_ALIBI: constexpr, HAS_MARKS: constexpr,
    HAS_PREFIX: constexpr, EXACT: constexpr, HAS_WINDOW: constexpr, HAS_SOFTCAP: constexpr,
    HAS_DROPOUT: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """One block of queries of one head: its gradient, (batch, seq, n_heads, head_dim).

    Also writes delta (batch, n_heads, seq), each row's sum of gradient times output.
    """
    block = blocks - 1 - tl.program_id(0) % blocks
    head_of_all = tl.program_id(0) // blocks
    row, head = head_of_all // n_heads, head_of_all % n_heads
    past, begin = keys - seq, block * BLOCK_Q
    grad += row.to(tl.int64) * stride_gb + head * stride_gh
    q += row.to(tl.int64) * stride_qb + head * stride_qh
    k += row.to(tl.int64) * stride_kb + head // GROUP * stride_kh
    v += row.to(tl.int64) * stride_vb + head // GROUP * stride_vh
    out += (row.to(tl.int64) * seq * n_heads + head) * HEAD_DIM
    grad_q += (row.to(tl.int64) * seq * n_heads + head) * HEAD_DIM
    log_sum += head_of_all.to(tl.int64) * seq
    delta += head_of_all.to(tl.int64) * seq
    marks += row * keys
    bounds += row * keys

    rows = begin + tl.arange(0, BLOCK_Q)
    places_q, frame = past + rows, past + begin
    marks_q = marks_of_queries(marks, places_q, rows < seq) if HAS_MARKS else places_q
    slope = tl.load(slopes + head) * 1.4426950408889634 if HAS_ALIBI else 0.0
    drawn_from = tl.load(seed) if HAS_DROPOUT else 0
    q_block = load_rows(q, begin, stride_qs, seq, BLOCK_Q, HEAD_DIM, WIDTH, True)
    grad_block = load_rows(grad, begin, stride_gs, seq, BLOCK_Q, HEAD_DIM, WIDTH, True)
    out_block = load_rows(out, begin, n_heads * HEAD_DIM, seq, BLOCK_Q, HEAD_DIM, WIDTH, True)
    own_delta = tl.sum(grad_block.to(tl.float32) * out_block.to(tl.float32), 1)
    tl.store(delta + rows, own_delta, mask=rows < seq)
    level = tl.load(log_sum + rows, mask=rows < seq, other=float("inf"))
    level += shift_of(slope, places_q, frame, EXACT)

    low, whole_low, whole_high, high = query_bounds(
        bounds, plane, begin, past, seq, keys, window, BLOCK_Q, BLOCK_K, HAS_MARKS, HAS_PREFIX, HAS_WINDOW
    )
    reached = tl.load(reach + head_of_all * tl.cdiv(seq, REACH_BLOCK) + begin // REACH_BLOCK)
    low = tl.minimum(tl.maximum(low, reached // BLOCK_K * BLOCK_K), whole_high)
    whole_low = tl.maximum(whole_low, low)
    grad_q_block = tl.zeros([BLOCK_Q, WIDTH], dtype=tl.float32)
    for masked in tl.static_range(2):
        grad_q_block = _query_span(
            grad_q_block, q_block, grad_block, level, own_delta, k, v, stride_ks, stride_vs, low, whole_low,
            whole_high, high, keys, places_q, marks, marks_q, slope, frame, inner, outer, window, drawn_from,
            head_of_all, dropout, HEAD_DIM, WIDTH, BLOCK_K, masked, HAS_ALIBI, HAS_MARKS, HAS_PREFIX, EXACT,
            HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    store_rows(grad_q, grad_q_block * scale, begin, n_heads * HEAD_DIM, seq, BLOCK_Q, HEAD_DIM, WIDTH)


@triton.jit
def _key_bounds(
    bounds, plane, reach, begin, past, seq, keys, window,
    BLOCK_Q: constexpr, BLOCK_K: constexpr, REACH_BLOCK: constexpr, HAS_MARKS: constexpr,
    HAS_PREFIX: constexpr, HAS_WINDOW: constexpr, SKIPS: constexpr,
):  # fmt: skip
    """Which queries see the keys [begin, begin + BLOCK_K), in multiples of BLOCK_Q.

    Returns:
        low, whole_low, whole_high, high: all queries of [whole_low, whole_high) see all the keys; none
        outside [low, high) sees any that counts.
    """
    last_place = tl.minimum(begin + BLOCK_K, keys) - 1
    low, whole_low = begin - past, tl.cdiv(tl.maximum(last_place - past, 0), BLOCK_Q) * BLOCK_Q
    high, whole_high = seq, seq
    if HAS_WINDOW:
        high = tl.minimum(high, last_place + window + 1 - past)
        whole_high = tl.minimum(whole_high, begin + window + 1 - past)
    if HAS_MARKS:
        places = begin + tl.arange(0, BLOCK_K)
        inside = places < keys
        high = tl.minimum(high, tl.max(tl.load(bounds + plane + places, mask=inside, other=0)) - past)
        run = tl.load(bounds + 2 * plane + places, mask=inside, other=0)
        run_end = tl.min(tl.load(bounds + 3 * plane + places, mask=inside, other=keys))
        whole_high = tl.where(tl.max(run) <= begin, tl.minimum(whole_high, run_end - past), 0)
        if HAS_PREFIX:
            low = tl.minimum(low, tl.min(tl.load(bounds + places, mask=inside, other=keys)) - past)
            whole_high = 0
    if SKIPS:
        high = tl.minimum(high, _reached_by(reach, last_place, seq, REACH_BLOCK))
    low = tl.maximum(low, 0) // BLOCK_Q * BLOCK_Q
    high = tl.maximum(tl.cdiv(high, BLOCK_Q) * BLOCK_Q, low)
    whole_high = tl.minimum(whole_high // BLOCK_Q * BLOCK_Q, high)
    whole_low = tl.minimum(tl.maximum(whole_low, low), high)
    return low, whole_low, tl.maximum(whole_high, whole_low), high


@triton.jit
def _reached_by(reach, place, seq, REACH_BLOCK: constexpr):
    """The end of the last block of queries that visited a key at or before `place`."""
    number = tl.cdiv(seq, REACH_BLOCK)
    last = number * 0
    for start in range(0, number, 128):
        blocks = start + tl.arange(0, 128)
        first_visited = tl.load(reach + blocks, mask=blocks < number, other=2147483647)
        last = tl.maximum(last, tl.max(tl.where(first_visited <= place, blocks + 1, 0)))
    return last * REACH_BLOCK


@triton.jit
def _key_span(
    grad_k, grad_v, q, grad, log_sum, delta, k, v, stride_q, stride_g, low, whole_low, whole_high, high, seq,
    frame, past, places_k, marks, marks_k, slope, inner, outer, window, seed, head, dropout,
    HEAD_DIM: constexpr, WIDTH: constexpr, BLOCK_Q: constexpr, MASKED: constexpr,
    HAS_ALIBI: constexpr, HAS_MARKS: constexpr, HAS_PREFIX: constexpr, EXACT: constexpr, HAS_WINDOW:
    constexpr, HAS_SOFTCAP: constexpr, HAS_DROPOUT: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Adds what query blocks give to the keys' gradients: those in [whole_low, whole_high), or the others.

    All four bounds are multiples of BLOCK_Q. Scores and weights stand transposed here, (keys, queries).
    """
    inner_queries = whole_high - whole_low
    for forth in range((high - low - inner_queries if MASKED else inner_queries) // BLOCK_Q):
        start = (low if MASKED else whole_low) + forth * BLOCK_Q
        if MASKED:
            start += tl.where(start >= whole_low, inner_queries, 0)
        rows = start + tl.arange(0, BLOCK_Q)
        places_q = past + rows
        q_block = load_rows(q, start, stride_q, seq, BLOCK_Q, HEAD_DIM, WIDTH, MASKED)
        grad_block = load_rows(grad, start, stride_g, seq, BLOCK_Q, HEAD_DIM, WIDTH, MASKED)
        if MASKED:
            level = tl.load(log_sum + rows, mask=rows < seq, other=float("inf"))
            own_delta = tl.load(delta + rows, mask=rows < seq, other=0.0)
        else:
            level, own_delta = tl.load(log_sum + rows), tl.load(delta + rows)
        level += shift_of(slope, places_q, frame, EXACT)
        scores = scores_of(tl.dot(k, tl.trans(q_block), input_precision=PRECISION), inner, outer, HAS_SOFTCAP)
        biased = scores
        if HAS_ALIBI:
            biased += bias_of(slope, places_q[None, :], places_k[:, None], frame, EXACT)
        if MASKED:
            marks_q = places_q
            if HAS_MARKS:
                marks_q = marks_of_queries(marks, places_q, rows < seq)
            visible = is_visible(
                places_q[None, :], places_k[:, None], marks_q[None, :], marks_k[:, None], window,
                HAS_MARKS, HAS_PREFIX, HAS_WINDOW,
            )  # fmt: skip
            biased = tl.where(visible, biased, NOTHING)
        weights = tl.exp2(biased - level[None, :])
        kept = is_kept(seed, head, places_q[None, :], places_k[:, None], dropout) if HAS_DROPOUT else True
        passed = tl.where(kept, weights / (1 - dropout), 0.0) if HAS_DROPOUT else weights
        grad_v = tl.dot(passed.to(grad_block.dtype), grad_block, grad_v, input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(grad_block), input_precision=PRECISION)
        grad_products = _softmax_gradient(scores, weights, grad_weights, own_delta[None, :], kept, outer,
                                          dropout, HAS_SOFTCAP, HAS_DROPOUT)  # fmt: skip
        grad_k = tl.dot(grad_products.to(q_block.dtype), q_block, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["seq", "keys", "plane", "blocks"])
def backward_key_kernel(
    grad, q, k, v, log_sum, reach, slopes, marks, bounds, seed, delta, grad_k, grad_v,
    stride_gb, stride_gs, stride_gh, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    seq, keys, plane, n_heads, blocks, scale, inner, outer, window, dropout,
    GROUP: constexpr, HEAD_DIM: constexpr, WIDTH: constexpr, BLOCK_Q: constexpr,
    BLOCK_K: constexpr, REACH_BLOCK: constexpr, HAS_ALIBI: constexpr, HAS_MARKS: constexpr,
    HAS_PREFIX: constexpr, EXACT: constexpr, HAS_WINDOW: constexpr, HAS_SOFTCAP: constexpr,
    HAS_DROPOUT: constexpr, SKIPS: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """One block of one key head: its keys' and values' gradients, (batch, keys, kv_heads, head_dim)."""
    block, kv_head_of_all = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    kv_heads = n_heads // GROUP
    row, kv_head = kv_head_of_all // kv_heads, kv_head_of_all % kv_heads
    past, begin = keys - seq, block * BLOCK_K
    k += row.to(tl.int64) * stride_kb + kv_head * stride_kh
    v += row.to(tl.int64) * stride_vb + kv_head * stride_vh
    marks += row * keys
    bounds += row * keys
    places_k = begin + tl.arange(0, BLOCK_K)
    marks_k = tl.load(marks + places_k, mask=places_k < keys, other=-1) if HAS_MARKS else places_k
    drawn_from = tl.load(seed) if HAS_DROPOUT else 0
    k_block = load_rows(k, begin, stride_ks, keys, BLOCK_K, HEAD_DIM, WIDTH, True)
    v_block = load_rows(v, begin, stride_vs, keys, BLOCK_K, HEAD_DIM, WIDTH, True)
    grad_k_block = tl.zeros([BLOCK_K, WIDTH], dtype=tl.float32)
    grad_v_block = tl.zeros([BLOCK_K, WIDTH], dtype=tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_of_all = row * n_heads + head
        slope = tl.load(slopes + head) * 1.4426950408889634 if HAS_ALIBI else 0.0
        own_q = q + row.to(tl.int64) * stride_qb + head * stride_qh
        own_grad = grad + row.to(tl.int64) * stride_gb + head * stride_gh
        own_sum, own_delta = log_sum + head_of_all.to(tl.int64) * seq, delta + head_of_all.to(tl.int64) * seq
        own_reach = reach + head_of_all * tl.cdiv(seq, REACH_BLOCK)
        low, whole_low, whole_high, high = _key_bounds(
            bounds, plane, own_reach, begin, past, seq, keys, window, BLOCK_Q, BLOCK_K, REACH_BLOCK,
            HAS_MARKS, HAS_PREFIX, HAS_WINDOW, SKIPS,
        )  # fmt: skip
        for masked in tl.static_range(2):
            grad_k_block, grad_v_block = _key_span(
                grad_k_block, grad_v_block, own_q, own_grad, own_sum, own_delta, k_block, v_block, stride_qs,
                stride_gs, low, whole_low, whole_high, high, seq, begin, past, places_k, marks, marks_k,
                slope, inner, outer, window, drawn_from, head_of_all, dropout, HEAD_DIM, WIDTH, BLOCK_Q,
                masked, HAS_ALIBI, HAS_MARKS, HAS_PREFIX, EXACT, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT,
                PRECISION,
            )  # fmt: skip
    kv_width = kv_heads * HEAD_DIM
    offset = (row.to(tl.int64) * keys * kv_heads + kv_head) * HEAD_DIM
    store_rows(grad_k + offset, grad_k_block * scale, begin, kv_width, keys, BLOCK_K, HEAD_DIM, WIDTH)
    store_rows(grad_v + offset, grad_v_block, begin, kv_width, keys, BLOCK_K, HEAD_DIM, WIDTH)
