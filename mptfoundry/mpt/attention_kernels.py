"""FlashAttention for MPT in Triton: forward, backward, and decoding from a cache.

As in https://arxiv.org/abs/2307.08691, a program keeps one block of queries (or, in backward, of keys) on
chip and loops over the blocks of the other side, so the score matrix never exists. Each block applies all
features of MPT's attention: ALiBi, documents, window, prefix, grouped heads, softcapping, dropout.
Scores are in base 2, multiplied by log2(e), because the hardware computes `exp2`.

* Fully visible blocks are computed without a mask, blocks at an edge with one. Blocks without a visible pair
  are skipped: the work is proportional to the documents' own squares.
* A softmax cancels the part of ALiBi that all keys of a query share. So a key's bias is measured from the
  first token of the block that the program keeps, the *frame*: one number per key, and small where weights
  are not. In float32, and with a bidirectional prefix, it is the true distance's, one number per pair.
* Forward visits the edges first, including the diagonal. Then the rows' maxima are known, and with them the
  key beyond which ALiBi pushes all others below rounding. Forward stops there and stores that position, so
  that backward stops there too.
* Backward recomputes the probabilities, once for the queries' gradients and once for the keys' and values'.
  There are no atomic additions, so gradients are deterministic.
* Decoding has few queries per row against a cache of many keys, and a single query would run in one program.
  So the keys are split into parts that run in parallel, and the results are combined
  (https://pytorch.org/blog/flash-decoding). The queries of all heads that share a key head are one block of
  rows: row = member * seq + query.

Letters of the shapes: seq = queries of a row (seqlen_q), keys = tokens in the cache + seq (seqlen_k); the
queries are the last tokens. A *position* is a token's index among the keys. `bounds` holds where each token's
document starts and stops: a query sees the keys from its document's start on, which takes one comparison.
That is not enough with a prefix, or where padding may stand between tokens of one document. Then `codes`
holds 2 * document + is-in-prefix for each token, -1 for padding, and `bounds` also start and stop of the
token's unbroken run (see attention_triton.py).
"""

from __future__ import annotations

try:  # An exported folder must load without triton, too.
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    raise

MINUS_INFINITY = constexpr(float("-inf"))
LOWEST = constexpr(-1e30)  # initial row maximum: below any score, but differences stay finite


@triton.jit
def load_rows(start_of, begin, stride, limit, ROWS: constexpr, HEAD_DIM: constexpr, WIDTH: constexpr,
               MASKED: constexpr):  # fmt: skip
    """Rows [begin, begin + ROWS) of a head, (ROWS, WIDTH); zero from row `limit` and column HEAD_DIM on."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    pointers = start_of + begin.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if MASKED:
        inside = (begin + rows < limit)[:, None]
        if WIDTH != HEAD_DIM:
            inside = inside & (columns < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    if WIDTH != HEAD_DIM:
        return tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(start_of, x, begin, stride, limit, ROWS: constexpr, HEAD_DIM: constexpr,
                WIDTH: constexpr):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    pointers = start_of + begin.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    inside = (begin + rows < limit)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, x.to(start_of.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    # Near zero the quotient of exponentials loses half its digits; the series does not.
    squared = x * x
    series = 1 - squared * (1 / 3 - squared * (2 / 15 - squared * (17 / 315 - squared * (62 / 2835))))
    power = tl.exp2(-2.885390081777927 * tl.abs(x))
    quotient = (1 - power) / (1 + power)
    return tl.where(squared < 0.04, x * series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def scores_of(products, inner, outer, HAS_SOFTCAP: constexpr):
    """Base-2 scores before the bias: products * scale * log2(e), with softcapping if enabled."""
    if HAS_SOFTCAP:
        return outer * _tanh(products * inner)
    return products * outer


@triton.jit
def bias_of(slope, positions_q, positions_k, frame, EXACT: constexpr):
    """ALiBi in base 2: by the distance, or the key's part alone, measured from the frame."""
    if EXACT:
        return -slope * tl.abs(positions_q - positions_k).to(tl.float32)
    else:  # noqa: RET505 (Triton compiles what comes after a return, too)
        return slope * (positions_k - frame).to(tl.float32)


@triton.jit
def is_visible(
    positions_q, positions_k, codes_q, codes_k, in_document, window,
    HAS_CODES: constexpr, HAS_PREFIX: constexpr, HAS_WINDOW: constexpr,
):  # fmt: skip
    """The visibility mask; positions and codes are rows or columns of the result.

    Without codes, `in_document` excludes the other documents' keys, or is True.
    """
    visible = positions_q >= positions_k
    if HAS_PREFIX:
        visible = visible | ((codes_q & codes_k & 1) == 1)
    if HAS_WINDOW:
        visible = visible & (tl.abs(positions_q - positions_k) <= window)
    if HAS_CODES:
        in_document = (codes_q >> 1) == (codes_k >> 1)
    return visible & in_document


@triton.jit
def codes_of_queries(codes, positions, inside):
    """The queries' codes; padding gets a code that no key has, so it sees nothing."""
    codes_q = tl.load(codes + positions, mask=inside, other=-1)
    return tl.where(codes_q < 0, -4, codes_q)


@triton.jit
def is_kept(seed, head, first_row, first_column, dropout, ROWS: constexpr, COLUMNS: constexpr,
            QUERIES_FIRST: constexpr):  # fmt: skip
    """Whether dropout keeps a weight, (queries, keys) or (keys, queries); the same whatever the blocks.

    A call of the generator draws for four weights: 8 apart in queries and keys, because tensor cores give a
    thread these. Blocks start at multiples of 16.
    """
    # The axes: 16 rows, upper or lower 8 of them, which of these, and columns in the same way.
    rows = tl.reshape(first_row // 2 + tl.arange(0, ROWS // 2), [ROWS // 16, 1, 8, 1, 1, 1])
    columns = tl.reshape(first_column // 2 + tl.arange(0, COLUMNS // 2), [1, 1, 1, COLUMNS // 16, 1, 8])
    zero = rows * 0 + columns * 0
    if QUERIES_FIRST:
        first, right, below, both = tl.philox(seed, rows + zero, columns + zero, zero + head, zero)
    else:
        first, below, right, both = tl.philox(seed, columns + zero, rows + zero, zero + head, zero)
    is_upper = tl.reshape(tl.arange(0, 2), [1, 2, 1, 1, 1, 1]) == 0
    is_left = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 2, 1]) == 0
    drawn = tl.where(is_upper, tl.where(is_left, first, right), tl.where(is_left, below, both))
    drawn = tl.reshape(drawn, [ROWS, COLUMNS])
    return drawn >= (tl.full([1, 1], 4294967296.0, dtype=tl.float32) * dropout).to(tl.uint32)


@triton.jit
def shift_of(slope, positions_q, frame, EXACT: constexpr):
    """The excess of a row's scores because the bias is measured from the frame."""
    if EXACT:
        return positions_q * 0.0
    else:  # noqa: RET505
        return slope * (positions_q - frame).to(tl.float32)


@triton.jit
def _uniform(x):
    """The same int32, but the assembler knows that all threads of a warp have it, because a warp reduced it.

    A loop with such bounds has its addresses in uniform registers, which leaves more for the threads.
    """
    return tl.max(tl.full([32], 0, dtype=tl.int32) + x)


@triton.jit
def query_bounds(
    bounds, plane, begin, past, seqlen_q, seqlen_k, window,
    BLOCK_Q: constexpr, BLOCK_K: constexpr, HAS_DOCUMENTS: constexpr, HAS_CODES: constexpr,
    HAS_PREFIX: constexpr, HAS_WINDOW: constexpr,
):  # fmt: skip
    """The keys that the queries [begin, begin + BLOCK_Q) see, in multiples of BLOCK_K.

    Returns:
        low, whole_low, whole_high, high: all queries see all keys in [whole_low, whole_high); no query sees
        a key outside [low, high).
    """
    first_position, last_position = past + begin, past + tl.minimum(begin + BLOCK_Q, seqlen_q) - 1
    low, whole_low, high = first_position * 0, first_position * 0, last_position + 1
    whole_high = first_position // BLOCK_K * BLOCK_K
    if HAS_WINDOW:
        low = tl.maximum(low, first_position - window)
        whole_low = tl.maximum(whole_low, last_position - window)
    if HAS_DOCUMENTS:
        if HAS_CODES:
            rows = begin + tl.arange(0, BLOCK_Q)
            inside, positions = rows < seqlen_q, past + rows
            first_start = _uniform(tl.min(tl.load(bounds + positions, mask=inside, other=seqlen_k)))
            last_start = _uniform(tl.max(tl.load(bounds + 2 * plane + positions, mask=inside, other=0)))
        else:  # bounds rise along the row
            first_start, last_start = tl.load(bounds + first_position), tl.load(bounds + last_position)
        low = tl.maximum(low, first_start)
        # If the queries belong to several runs, no block counts as fully visible.
        whole_low = tl.where(last_start <= first_position, tl.maximum(whole_low, last_start), whole_high)
        if HAS_PREFIX:
            last_stop = tl.max(tl.load(bounds + plane + positions, mask=inside, other=0))
            high = tl.maximum(high, _uniform(last_stop))
            whole_low = whole_high
    low, high = low // BLOCK_K * BLOCK_K, tl.cdiv(high, BLOCK_K) * BLOCK_K
    whole_low = tl.minimum(tl.cdiv(whole_low, BLOCK_K) * BLOCK_K, whole_high)
    whole_high = tl.maximum(whole_high, low)
    return low, tl.maximum(whole_low, low), whole_high, tl.maximum(high, whole_high)


@triton.jit
def _forward_span(
    acc, row_sum, row_max, q, k, v, stride_k, stride_v, low, whole_low, whole_high, high, seqlen_k,
    positions_q, codes, codes_q, starts_q, slope, begin, frame, inner, outer, window, seed, head, dropout,
    HEAD_DIM: constexpr, WIDTH: constexpr, BLOCK_K: constexpr, MASKED: constexpr, HAS_ALIBI: constexpr,
    HAS_DOCUMENTS: constexpr, HAS_CODES: constexpr, HAS_PREFIX: constexpr, EXACT: constexpr,
    HAS_WINDOW: constexpr, HAS_SOFTCAP: constexpr, HAS_DROPOUT: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Visit key blocks from last to first: those in [whole_low, whole_high), or the others.

    All four bounds are multiples of BLOCK_K.
    """
    inner_keys = whole_high - whole_low
    bias_in_block = slope * tl.arange(0, BLOCK_K).to(tl.float32)  # the bias within a block of keys
    for step in range((high - low - inner_keys if MASKED else inner_keys) // BLOCK_K):
        start = (high if MASKED else whole_high) - (step + 1) * BLOCK_K
        if MASKED:
            start -= tl.where(start < whole_high, inner_keys, 0)
        positions_k = start + tl.arange(0, BLOCK_K)
        k_block = load_rows(k, start, stride_k, seqlen_k, BLOCK_K, HEAD_DIM, WIDTH, MASKED)
        scores = scores_of(tl.dot(q, tl.trans(k_block), input_precision=PRECISION), inner, outer, HAS_SOFTCAP)
        if HAS_ALIBI:
            if EXACT or HAS_CODES:  # with documents the vector would be one too many for the registers
                scores += bias_of(slope, positions_q[:, None], positions_k[None, :], frame, EXACT)
            else:
                scores += (bias_in_block + slope * (start - frame).to(tl.float32))[None, :]
        if MASKED:
            codes_k = positions_k
            if HAS_CODES:
                codes_k = tl.load(codes + positions_k, mask=positions_k < seqlen_k, other=-1)
            in_document = positions_k[None, :] >= starts_q[:, None] if HAS_DOCUMENTS else True
            visible = is_visible(
                positions_q[:, None], positions_k[None, :], codes_q[:, None], codes_k[None, :], in_document,
                window, HAS_CODES, HAS_PREFIX, HAS_WINDOW,
            )  # fmt: skip
            scores = tl.where(visible, scores, MINUS_INFINITY)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        if HAS_DROPOUT:
            kept = is_kept(seed, head, begin, start, dropout, positions_q.shape[0], BLOCK_K, True)
            weights = tl.where(kept, weights, 0.0)
        v_block = load_rows(v, start, stride_v, seqlen_k, BLOCK_K, HEAD_DIM, WIDTH, MASKED)
        acc = tl.dot(weights.to(v_block.dtype), v_block, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def _bound(q, longest, inner, outer, HAS_SOFTCAP: constexpr):
    """Upper bound of a row's scores before the bias (Cauchy-Schwarz); 1e29 if it overflows or is NaN."""
    norm = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)) * longest
    bound = outer * inner * norm if HAS_SOFTCAP else outer * norm
    bound = tl.where(bound < 1e28, bound * 1.001, 1e29)
    return tl.where(bound < 1e29, tl.minimum(outer, bound), bound) if HAS_SOFTCAP else bound


@triton.jit
def _stop(bound, row_max, inside, slope, frame, bits, BLOCK_K: constexpr):
    """The first relevant block: no key before it reaches a weight of 2 ** -bits in any row."""
    # Rows without a visible key so far don't count; a row with NaN scores prevents stopping.
    gap = tl.where(row_max > LOWEST, bound - row_max, tl.where(row_max == LOWEST, MINUS_INFINITY, 1e29))
    widest = tl.max(tl.where(inside, gap, MINUS_INFINITY))
    stop = tl.minimum(tl.maximum(frame - (widest + bits) / slope, 0.0), frame)
    return _uniform(stop.to(tl.int32)) // BLOCK_K * BLOCK_K


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "plane", "blocks"])
def forward_kernel(
    q, k, v, out, lse, reach, slopes, codes, bounds, longest, seed,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    seqlen_q, seqlen_k, plane, n_heads, blocks, inner, outer, window, dropout, bits,
    GROUP: constexpr, HEAD_DIM: constexpr, WIDTH: constexpr, BLOCK_Q: constexpr,
    BLOCK_K: constexpr, HAS_ALIBI: constexpr, HAS_DOCUMENTS: constexpr, HAS_CODES: constexpr,
    HAS_PREFIX: constexpr, EXACT: constexpr, HAS_WINDOW: constexpr, HAS_SOFTCAP: constexpr,
    HAS_DROPOUT: constexpr, SKIPS: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """One block of queries of one head.

    Writes out (batch, seq, n_heads, head_dim), lse (batch, n_heads, seq), the logsumexp in base 2, infinite
    for rows that see nothing, and reach (batch, n_heads, blocks), the first position visited.
    """
    # The longest rows start first, so that none is left over at the end.
    block = blocks - 1 - tl.program_id(0) % blocks
    head_of_all = tl.program_id(0) // blocks
    row, head = head_of_all // n_heads, head_of_all % n_heads
    past, begin = seqlen_k - seqlen_q, block * BLOCK_Q
    q += row.to(tl.int64) * stride_qb + head * stride_qh
    k += row.to(tl.int64) * stride_kb + head // GROUP * stride_kh
    v += row.to(tl.int64) * stride_vb + head // GROUP * stride_vh
    codes += row * seqlen_k
    bounds += row * seqlen_k

    rows = begin + tl.arange(0, BLOCK_Q)
    positions_q, frame, inside = past + rows, past + begin, rows < seqlen_q
    codes_q = codes_of_queries(codes, positions_q, inside) if HAS_CODES else positions_q
    starts_q = tl.load(bounds + positions_q, mask=inside, other=seqlen_k) if HAS_DOCUMENTS else positions_q
    slope = tl.load(slopes + head) * 1.4426950408889634 if HAS_ALIBI else 0.0
    seed_value = tl.load(seed) if HAS_DROPOUT else 0
    q_block = load_rows(q, begin, stride_qs, seqlen_q, BLOCK_Q, HEAD_DIM, WIDTH, True)
    low, whole_low, whole_high, high = query_bounds(
        bounds, plane, begin, past, seqlen_q, seqlen_k, window, BLOCK_Q, BLOCK_K, HAS_DOCUMENTS, HAS_CODES,
        HAS_PREFIX, HAS_WINDOW)  # fmt: skip

    acc = tl.zeros([BLOCK_Q, WIDTH], dtype=tl.float32)
    row_sum, row_max = tl.zeros([BLOCK_Q], dtype=tl.float32), tl.full([BLOCK_Q], LOWEST, dtype=tl.float32)
    if SKIPS:
        longest_key = tl.load(longest + row * (n_heads // GROUP) + head // GROUP)
        bound = _bound(q_block, longest_key, inner, outer, HAS_SOFTCAP)
        # A row's maximum is at least minus its bound; the edges are visited before the maximum is known.
        stop = _stop(bound, -bound, inside, slope, frame, bits, BLOCK_K)
        low = tl.minimum(tl.maximum(low, stop), whole_high)
        whole_low = tl.maximum(whole_low, low)
    for span in tl.static_range(2):
        if span == 1 and SKIPS:
            stop = _stop(bound, row_max, inside, slope, frame, bits, BLOCK_K)
            whole_low = tl.minimum(tl.maximum(whole_low, stop), whole_high)
            low = tl.minimum(tl.maximum(low, stop), whole_low)
        acc, row_sum, row_max = _forward_span(
            acc, row_sum, row_max, q_block, k, v, stride_ks, stride_vs, low, whole_low, whole_high, high,
            seqlen_k, positions_q, codes, codes_q, starts_q, slope, begin, frame, inner, outer, window,
            seed_value, head_of_all, dropout, HEAD_DIM, WIDTH, BLOCK_K, span == 0, HAS_ALIBI, HAS_DOCUMENTS,
            HAS_CODES, HAS_PREFIX, EXACT, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    tl.store(reach + head_of_all * blocks + block, low)

    sees = row_sum > 0
    row_lse = row_max + tl.log2(tl.where(sees, row_sum, 1.0)) - shift_of(slope, positions_q, frame, EXACT)
    tl.store(lse + head_of_all.to(tl.int64) * seqlen_q + rows, tl.where(sees, row_lse, float("inf")),
             mask=inside)  # fmt: skip
    acc = acc / (tl.where(sees, row_sum, 1.0) * (1 - dropout))[:, None]
    out += (row.to(tl.int64) * seqlen_q * n_heads + head) * HEAD_DIM
    store_rows(out, acc, begin, n_heads * HEAD_DIM, seqlen_q, BLOCK_Q, HEAD_DIM, WIDTH)


@triton.jit
def _softmax_gradient(scores, weights, grad_weights, delta, kept, outer, dropout, HAS_SOFTCAP: constexpr,
                      HAS_DROPOUT: constexpr):  # fmt: skip
    """Gradient of the products of queries and keys, without the factor of the scale."""
    if HAS_DROPOUT:
        grad_weights = tl.where(kept, grad_weights / (1 - dropout), 0.0)
    grad = weights * (grad_weights - delta)
    if HAS_SOFTCAP:
        tangent = scores / outer
        grad = grad * (1 - tangent * tangent)
    return grad


@triton.jit
def _query_span(
    grad_q, q, grad, lse_q, delta, k, v, stride_k, stride_v, low, whole_low, whole_high, high, seqlen_k,
    positions_q, codes, codes_q, starts_q, slope, begin, frame, inner, outer, window, seed, head, dropout,
    HEAD_DIM: constexpr, WIDTH: constexpr, BLOCK_K: constexpr, MASKED: constexpr, HAS_ALIBI: constexpr,
    HAS_DOCUMENTS: constexpr, HAS_CODES: constexpr, HAS_PREFIX: constexpr, EXACT: constexpr,
    HAS_WINDOW: constexpr, HAS_SOFTCAP: constexpr, HAS_DROPOUT: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Add the key blocks' part of the queries' gradients: those in [whole_low, whole_high), or the others.

    All four bounds are multiples of BLOCK_K.
    """
    inner_keys = whole_high - whole_low
    bias_in_block = slope * tl.arange(0, BLOCK_K).to(tl.float32)  # the bias within a block of keys
    for step in range((high - low - inner_keys if MASKED else inner_keys) // BLOCK_K):
        start = (low if MASKED else whole_low) + step * BLOCK_K
        if MASKED:
            start += tl.where(start >= whole_low, inner_keys, 0)
        positions_k = start + tl.arange(0, BLOCK_K)
        k_block = load_rows(k, start, stride_k, seqlen_k, BLOCK_K, HEAD_DIM, WIDTH, MASKED)
        v_block = load_rows(v, start, stride_v, seqlen_k, BLOCK_K, HEAD_DIM, WIDTH, MASKED)
        scores = scores_of(tl.dot(q, tl.trans(k_block), input_precision=PRECISION), inner, outer, HAS_SOFTCAP)
        biased = scores
        if HAS_ALIBI:
            if EXACT:
                biased += bias_of(slope, positions_q[:, None], positions_k[None, :], frame, EXACT)
            else:
                biased += (bias_in_block + slope * (start - frame).to(tl.float32))[None, :]
        if MASKED:
            codes_k = positions_k
            if HAS_CODES:
                codes_k = tl.load(codes + positions_k, mask=positions_k < seqlen_k, other=-1)
            in_document = positions_k[None, :] >= starts_q[:, None] if HAS_DOCUMENTS else True
            visible = is_visible(
                positions_q[:, None], positions_k[None, :], codes_q[:, None], codes_k[None, :], in_document,
                window, HAS_CODES, HAS_PREFIX, HAS_WINDOW,
            )  # fmt: skip
            biased = tl.where(visible, biased, MINUS_INFINITY)
        weights = tl.exp2(biased - lse_q[:, None])
        grad_weights = tl.dot(grad, tl.trans(v_block), input_precision=PRECISION)
        kept = True
        if HAS_DROPOUT:
            kept = is_kept(seed, head, begin, start, dropout, positions_q.shape[0], BLOCK_K, True)
        grad_products = _softmax_gradient(scores, weights, grad_weights, delta[:, None], kept, outer, dropout,
                                          HAS_SOFTCAP, HAS_DROPOUT)  # fmt: skip
        grad_q = tl.dot(grad_products.to(k_block.dtype), k_block, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "plane", "blocks"])
def backward_query_kernel(
    grad, q, k, v, out, lse, reach, slopes, codes, bounds, seed, delta, grad_q,
    stride_gb, stride_gs, stride_gh, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_db, stride_ds,
    seqlen_q, seqlen_k, plane, n_heads, blocks, scale, inner, outer, window, dropout,
    GROUP: constexpr, HEAD_DIM: constexpr, WIDTH: constexpr, BLOCK_Q: constexpr,
    BLOCK_K: constexpr, REACH_BLOCK: constexpr, HAS_ALIBI: constexpr, HAS_DOCUMENTS: constexpr,
    HAS_CODES: constexpr, HAS_PREFIX: constexpr, EXACT: constexpr, HAS_WINDOW: constexpr,
    HAS_SOFTCAP: constexpr, HAS_DROPOUT: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """One block of queries of one head: its gradient, (batch, seq, n_heads, head_dim), heads side by side.

    Also writes delta (batch, n_heads, seq), each row's sum of gradient times output.
    """
    block = blocks - 1 - tl.program_id(0) % blocks
    head_of_all = tl.program_id(0) // blocks
    row, head = head_of_all // n_heads, head_of_all % n_heads
    past, begin = seqlen_k - seqlen_q, block * BLOCK_Q
    grad += row.to(tl.int64) * stride_gb + head * stride_gh
    q += row.to(tl.int64) * stride_qb + head * stride_qh
    k += row.to(tl.int64) * stride_kb + head // GROUP * stride_kh
    v += row.to(tl.int64) * stride_vb + head // GROUP * stride_vh
    out += (row.to(tl.int64) * seqlen_q * n_heads + head) * HEAD_DIM
    grad_q += row.to(tl.int64) * stride_db + head * HEAD_DIM
    lse += head_of_all.to(tl.int64) * seqlen_q
    delta += head_of_all.to(tl.int64) * seqlen_q
    codes += row * seqlen_k
    bounds += row * seqlen_k

    rows = begin + tl.arange(0, BLOCK_Q)
    positions_q, frame, inside = past + rows, past + begin, rows < seqlen_q
    codes_q = codes_of_queries(codes, positions_q, inside) if HAS_CODES else positions_q
    starts_q = tl.load(bounds + positions_q, mask=inside, other=seqlen_k) if HAS_DOCUMENTS else positions_q
    slope = tl.load(slopes + head) * 1.4426950408889634 if HAS_ALIBI else 0.0
    seed_value = tl.load(seed) if HAS_DROPOUT else 0
    q_block = load_rows(q, begin, stride_qs, seqlen_q, BLOCK_Q, HEAD_DIM, WIDTH, True)
    grad_block = load_rows(grad, begin, stride_gs, seqlen_q, BLOCK_Q, HEAD_DIM, WIDTH, True)
    out_block = load_rows(out, begin, n_heads * HEAD_DIM, seqlen_q, BLOCK_Q, HEAD_DIM, WIDTH, True)
    own_delta = tl.sum(grad_block.to(tl.float32) * out_block.to(tl.float32), 1)
    tl.store(delta + rows, own_delta, mask=rows < seqlen_q)
    lse_q = tl.load(lse + rows, mask=rows < seqlen_q, other=float("inf"))
    lse_q += shift_of(slope, positions_q, frame, EXACT)

    low, whole_low, whole_high, high = query_bounds(
        bounds, plane, begin, past, seqlen_q, seqlen_k, window, BLOCK_Q, BLOCK_K, HAS_DOCUMENTS,
        HAS_CODES, HAS_PREFIX, HAS_WINDOW,
    )  # fmt: skip
    reached = tl.load(reach + head_of_all * tl.cdiv(seqlen_q, REACH_BLOCK) + begin // REACH_BLOCK)
    low = tl.minimum(tl.maximum(low, reached // BLOCK_K * BLOCK_K), whole_high)
    whole_low = tl.maximum(whole_low, low)
    grad_q_block = tl.zeros([BLOCK_Q, WIDTH], dtype=tl.float32)
    for masked in tl.static_range(2):
        grad_q_block = _query_span(
            grad_q_block, q_block, grad_block, lse_q, own_delta, k, v, stride_ks, stride_vs, low, whole_low,
            whole_high, high, seqlen_k, positions_q, codes, codes_q, starts_q, slope, begin, frame, inner,
            outer, window, seed_value, head_of_all, dropout, HEAD_DIM, WIDTH, BLOCK_K, masked, HAS_ALIBI,
            HAS_DOCUMENTS, HAS_CODES, HAS_PREFIX, EXACT, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    store_rows(grad_q, grad_q_block * scale, begin, stride_ds, seqlen_q, BLOCK_Q, HEAD_DIM, WIDTH)


@triton.jit
def _key_bounds(
    bounds, plane, reach, begin, past, seqlen_q, seqlen_k, window,
    BLOCK_Q: constexpr, BLOCK_K: constexpr, REACH_BLOCK: constexpr, HAS_DOCUMENTS: constexpr,
    HAS_CODES: constexpr, HAS_PREFIX: constexpr, HAS_WINDOW: constexpr, SKIPS: constexpr,
):  # fmt: skip
    """The queries that see the keys [begin, begin + BLOCK_K), in multiples of BLOCK_Q.

    Returns:
        low, whole_low, whole_high, high: all queries in [whole_low, whole_high) see all the keys; no query
        outside [low, high) sees a relevant key.
    """
    last_position = tl.minimum(begin + BLOCK_K, seqlen_k) - 1
    low, whole_low = begin - past, tl.cdiv(tl.maximum(last_position - past, 0), BLOCK_Q) * BLOCK_Q
    high, whole_high = seqlen_q, seqlen_q
    if HAS_WINDOW:
        high = tl.minimum(high, last_position + window + 1 - past)
        whole_high = tl.minimum(whole_high, begin + window + 1 - past)
    if HAS_DOCUMENTS:
        if HAS_CODES:
            positions = begin + tl.arange(0, BLOCK_K)
            inside = positions < seqlen_k
            stops = tl.load(bounds + 3 * plane + positions, mask=inside, other=seqlen_k)
            first_stop = _uniform(tl.min(stops))
            last_stop = _uniform(tl.max(tl.load(bounds + plane + positions, mask=inside, other=0)))
            last_start = _uniform(tl.max(tl.load(bounds + 2 * plane + positions, mask=inside, other=0)))
        else:
            first_stop = tl.load(bounds + plane + begin)
            last_stop = tl.load(bounds + plane + last_position)
            last_start = tl.load(bounds + last_position)
        high = tl.minimum(high, last_stop - past)
        whole_high = tl.where(last_start <= begin, tl.minimum(whole_high, first_stop - past), 0)
        if HAS_PREFIX:
            first_start = tl.min(tl.load(bounds + positions, mask=inside, other=seqlen_k))
            low = tl.minimum(low, _uniform(first_start) - past)
            whole_high = 0
    if SKIPS:
        high = tl.minimum(high, _reached_by(reach, last_position, seqlen_q, REACH_BLOCK))
    low = tl.maximum(low, 0) // BLOCK_Q * BLOCK_Q
    high = tl.maximum(tl.cdiv(high, BLOCK_Q) * BLOCK_Q, low)
    whole_high = tl.minimum(whole_high // BLOCK_Q * BLOCK_Q, high)
    whole_low = tl.minimum(tl.maximum(whole_low, low), high)
    return low, whole_low, tl.maximum(whole_high, whole_low), high


@triton.jit
def _reached_by(reach, position, seqlen_q, REACH_BLOCK: constexpr):
    """The end of the last block of queries that visited a key at or before `position`."""
    number = tl.cdiv(seqlen_q, REACH_BLOCK)
    last = number * 0
    for start in range(0, number, 128):
        blocks = start + tl.arange(0, 128)
        first_visited = tl.load(reach + blocks, mask=blocks < number, other=2147483647)
        last = tl.maximum(last, tl.max(tl.where(first_visited <= position, blocks + 1, 0)))
    return _uniform(last) * REACH_BLOCK


@triton.jit
def _key_span(
    grad_k, grad_v, q, grad, lse, delta, k, v, stride_q, stride_g, low, whole_low, whole_high, high, seqlen_q,
    frame, past, positions_k, codes, codes_k, stops_k, slope, inner, outer, window, seed, head, dropout,
    HEAD_DIM: constexpr, WIDTH: constexpr, BLOCK_Q: constexpr, MASKED: constexpr,
    HAS_ALIBI: constexpr, HAS_DOCUMENTS: constexpr, HAS_CODES: constexpr, HAS_PREFIX: constexpr,
    EXACT: constexpr, HAS_WINDOW: constexpr, HAS_SOFTCAP: constexpr, HAS_DROPOUT: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """Add the query blocks' part of the keys' gradients: those in [whole_low, whole_high), or the others.

    All four bounds are multiples of BLOCK_Q. Scores and weights are transposed here, (keys, queries).
    """
    inner_queries = whole_high - whole_low
    for step in range((high - low - inner_queries if MASKED else inner_queries) // BLOCK_Q):
        start = (low if MASKED else whole_low) + step * BLOCK_Q
        if MASKED:
            start += tl.where(start >= whole_low, inner_queries, 0)
        rows = start + tl.arange(0, BLOCK_Q)
        positions_q = past + rows
        q_block = load_rows(q, start, stride_q, seqlen_q, BLOCK_Q, HEAD_DIM, WIDTH, MASKED)
        grad_block = load_rows(grad, start, stride_g, seqlen_q, BLOCK_Q, HEAD_DIM, WIDTH, MASKED)
        if MASKED:
            lse_q = tl.load(lse + rows, mask=rows < seqlen_q, other=float("inf"))
        else:
            lse_q = tl.load(lse + rows)
        lse_q += shift_of(slope, positions_q, frame, EXACT)
        # Both products come first: the second is computed while the softmax of the first is.
        products = tl.dot(k, tl.trans(q_block), input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(grad_block), input_precision=PRECISION)
        scores = scores_of(products, inner, outer, HAS_SOFTCAP)
        biased = scores
        if HAS_ALIBI:
            biased += bias_of(slope, positions_q[None, :], positions_k[:, None], frame, EXACT)
        if MASKED:
            codes_q = positions_q
            if HAS_CODES:
                codes_q = codes_of_queries(codes, positions_q, rows < seqlen_q)
            in_document = positions_q[None, :] < stops_k[:, None] if HAS_DOCUMENTS else True
            visible = is_visible(
                positions_q[None, :], positions_k[:, None], codes_q[None, :], codes_k[:, None], in_document,
                window, HAS_CODES, HAS_PREFIX, HAS_WINDOW,
            )  # fmt: skip
            biased = tl.where(visible, biased, MINUS_INFINITY)
        weights = tl.exp2(biased - lse_q[None, :])
        kept = True
        if HAS_DROPOUT:
            kept = is_kept(seed, head, frame, start, dropout, positions_k.shape[0], BLOCK_Q, False)
        passed = tl.where(kept, weights / (1 - dropout), 0.0) if HAS_DROPOUT else weights
        grad_v = tl.dot(passed.to(grad_block.dtype), grad_block, grad_v, input_precision=PRECISION)
        # Read this late, delta takes no registers while the softmax is computed.
        if MASKED:
            own_delta = tl.load(delta + rows, mask=rows < seqlen_q, other=0.0)
        else:
            own_delta = tl.load(delta + rows)
        grad_products = _softmax_gradient(scores, weights, grad_weights, own_delta[None, :], kept, outer,
                                          dropout, HAS_SOFTCAP, HAS_DROPOUT)  # fmt: skip
        grad_k = tl.dot(grad_products.to(q_block.dtype), q_block, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "plane", "blocks"])
def backward_key_kernel(
    grad, q, k, v, lse, reach, slopes, codes, bounds, seed, delta, grad_k, grad_v,
    stride_gb, stride_gs, stride_gh, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_db, stride_ds,
    seqlen_q, seqlen_k, plane, n_heads, blocks, scale, inner, outer, window, dropout,
    GROUP: constexpr, HEAD_DIM: constexpr, WIDTH: constexpr, BLOCK_Q: constexpr,
    BLOCK_K: constexpr, REACH_BLOCK: constexpr, HAS_ALIBI: constexpr, HAS_DOCUMENTS: constexpr,
    HAS_CODES: constexpr, HAS_PREFIX: constexpr, EXACT: constexpr, HAS_WINDOW: constexpr,
    HAS_SOFTCAP: constexpr, HAS_DROPOUT: constexpr, SKIPS: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """One block of one key head: its keys' and values' gradients, (batch, keys, kv_heads, head_dim), heads
    side by side."""
    block, kv_head_of_all = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    kv_heads = n_heads // GROUP
    row, kv_head = kv_head_of_all // kv_heads, kv_head_of_all % kv_heads
    past, begin = seqlen_k - seqlen_q, block * BLOCK_K
    k += row.to(tl.int64) * stride_kb + kv_head * stride_kh
    v += row.to(tl.int64) * stride_vb + kv_head * stride_vh
    codes += row * seqlen_k
    bounds += row * seqlen_k
    positions_k = begin + tl.arange(0, BLOCK_K)
    codes_k = positions_k
    if HAS_CODES:
        codes_k = tl.load(codes + positions_k, mask=positions_k < seqlen_k, other=-1)
    stops_k = positions_k
    if HAS_DOCUMENTS:
        stops_k = tl.load(bounds + plane + positions_k, mask=positions_k < seqlen_k, other=0)
    seed_value = tl.load(seed) if HAS_DROPOUT else 0
    k_block = load_rows(k, begin, stride_ks, seqlen_k, BLOCK_K, HEAD_DIM, WIDTH, True)
    v_block = load_rows(v, begin, stride_vs, seqlen_k, BLOCK_K, HEAD_DIM, WIDTH, True)
    grad_k_block = tl.zeros([BLOCK_K, WIDTH], dtype=tl.float32)
    grad_v_block = tl.zeros([BLOCK_K, WIDTH], dtype=tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_of_all = row * n_heads + head
        slope = tl.load(slopes + head) * 1.4426950408889634 if HAS_ALIBI else 0.0
        own_q = q + row.to(tl.int64) * stride_qb + head * stride_qh
        own_grad = grad + row.to(tl.int64) * stride_gb + head * stride_gh
        own_lse = lse + head_of_all.to(tl.int64) * seqlen_q
        own_delta = delta + head_of_all.to(tl.int64) * seqlen_q
        own_reach = reach + head_of_all * tl.cdiv(seqlen_q, REACH_BLOCK)
        low, whole_low, whole_high, high = _key_bounds(
            bounds, plane, own_reach, begin, past, seqlen_q, seqlen_k, window, BLOCK_Q, BLOCK_K, REACH_BLOCK,
            HAS_DOCUMENTS, HAS_CODES, HAS_PREFIX, HAS_WINDOW, SKIPS,
        )  # fmt: skip
        for masked in tl.static_range(2):
            grad_k_block, grad_v_block = _key_span(
                grad_k_block, grad_v_block, own_q, own_grad, own_lse, own_delta, k_block, v_block, stride_qs,
                stride_gs, low, whole_low, whole_high, high, seqlen_q, begin, past, positions_k, codes,
                codes_k, stops_k, slope, inner, outer, window, seed_value, head_of_all, dropout, HEAD_DIM,
                WIDTH, BLOCK_Q, masked, HAS_ALIBI, HAS_DOCUMENTS, HAS_CODES, HAS_PREFIX, EXACT, HAS_WINDOW,
                HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
    offset = row.to(tl.int64) * stride_db + kv_head * HEAD_DIM
    store_rows(grad_k + offset, grad_k_block * scale, begin, stride_ds, seqlen_k, BLOCK_K, HEAD_DIM, WIDTH)
    store_rows(grad_v + offset, grad_v_block, begin, stride_ds, seqlen_k, BLOCK_K, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "parts", "keys_of_part", "stride_mb"])
def decode_kernel(
    q, k, v, partial, partial_lse, slopes, codes,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_mb, seqlen_q, seqlen_k, parts, keys_of_part, n_heads, inner, outer, window, GROUP: constexpr,
    HEAD_DIM: constexpr, WIDTH: constexpr, ROWS: constexpr, BLOCK_K: constexpr, HAS_ALIBI: constexpr,
    HAS_CODES: constexpr, HAS_PREFIX: constexpr, EXACT: constexpr, HAS_WINDOW: constexpr,
    HAS_SOFTCAP: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """All queries of one key head against one part of the keys.

    Writes partial (batch, parts, n_heads, seq, head_dim) float32 and partial_lse (batch, parts, n_heads,
    seq), the logsumexp in base 2.
    """
    part = tl.program_id(0) % parts
    kv_heads = n_heads // GROUP
    row, kv_head = tl.program_id(0) // parts // kv_heads, tl.program_id(0) // parts % kv_heads
    past = seqlen_k - seqlen_q
    q += row.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
    k += row.to(tl.int64) * stride_kb + kv_head * stride_kh
    v += row.to(tl.int64) * stride_vb + kv_head * stride_vh
    codes += row.to(tl.int64) * stride_mb

    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    members, queries = rows // seqlen_q, rows % seqlen_q
    inside = rows < GROUP * seqlen_q
    positions_q = past + queries
    q_block = tl.load(q + members[:, None] * stride_qh + queries[:, None] * stride_qs + columns[None, :],
                      mask=inside[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)  # fmt: skip
    slope = tl.zeros([ROWS], dtype=tl.float32)
    if HAS_ALIBI:
        slope = tl.load(slopes + kv_head * GROUP + members, mask=inside, other=0.0) * 1.4426950408889634
    codes_q = codes_of_queries(codes, positions_q, inside) if HAS_CODES else positions_q

    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    row_sum = tl.zeros([ROWS], dtype=tl.float32)
    row_max = tl.full([ROWS], LOWEST, dtype=tl.float32)
    begin, end = part * keys_of_part, tl.minimum((part + 1) * keys_of_part, seqlen_k)
    for step in range(tl.cdiv(end - begin, BLOCK_K)):
        start = begin + step * BLOCK_K
        positions_k = start + tl.arange(0, BLOCK_K)
        k_block = load_rows(k, start, stride_ks, end, BLOCK_K, HEAD_DIM, WIDTH, True)
        v_block = load_rows(v, start, stride_vs, end, BLOCK_K, HEAD_DIM, WIDTH, True)
        scores = scores_of(
            tl.dot(q_block, tl.trans(k_block), input_precision=PRECISION), inner, outer, HAS_SOFTCAP
        )
        if HAS_ALIBI:
            scores += bias_of(slope[:, None], positions_q[:, None], positions_k[None, :], past, EXACT)
        codes_k = tl.load(codes + positions_k, mask=positions_k < end, other=-1) if HAS_CODES else positions_k
        visible = is_visible(
            positions_q[:, None], positions_k[None, :], codes_q[:, None], codes_k[None, :], True, window,
            HAS_CODES, HAS_PREFIX, HAS_WINDOW,
        )  # fmt: skip
        scores = tl.where(visible, scores, MINUS_INFINITY)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights, rescale = tl.exp2(scores - new_max[:, None]), tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_block.dtype), v_block, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max

    sees = row_sum > 0
    safe = tl.where(sees, row_sum, 1.0)
    offset = (row * parts + part).to(tl.int64) * n_heads * seqlen_q + kv_head * GROUP * seqlen_q + rows
    tl.store(partial_lse + offset, tl.where(sees, row_max + tl.log2(safe), LOWEST), mask=inside)
    tl.store(partial + offset[:, None] * HEAD_DIM + columns[None, :], acc / safe[:, None],
             mask=inside[:, None] & (columns < HEAD_DIM)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["seqlen_q", "parts"])
def join_kernel(
    partial, partial_lse, out, seqlen_q, parts, n_heads,
    HEAD_DIM: constexpr, WIDTH: constexpr, PARTS: constexpr,
):  # fmt: skip
    """Combine a query's parts for one head into out (batch, seq, n_heads, head_dim); zero without a key."""
    row, rest = tl.program_id(0) // (n_heads * seqlen_q), tl.program_id(0) % (n_heads * seqlen_q)
    head, query = rest // seqlen_q, rest % seqlen_q
    number, columns = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    positions = (row * parts + number).to(tl.int64) * n_heads * seqlen_q + rest
    lse_parts = tl.load(partial_lse + positions, mask=number < parts, other=LOWEST)
    row_max = tl.max(lse_parts)
    weights = tl.exp2(lse_parts - row_max)
    row_sum = tl.sum(weights)
    inside = (number < parts)[:, None] & (columns < HEAD_DIM)[None, :]
    block = tl.load(partial + positions[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    joined = tl.sum(block * weights[:, None], 0) / tl.where(row_sum > 0, row_sum, 1.0)
    offset = ((row * seqlen_q + query).to(tl.int64) * n_heads + head) * HEAD_DIM
    tl.store(out + offset + columns, joined.to(out.dtype.element_ty), mask=columns < HEAD_DIM)
