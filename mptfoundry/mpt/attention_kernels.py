"""FlashAttention for MPT in Triton: forward and backward.

After https://arxiv.org/abs/2307.08691: a program keeps one block of queries (or, in backward, of keys) on the
chip and visits the blocks of the other side one by one, so the matrix of scores never exists. All that MPT's
attention knows happens on the way: ALiBi, documents, window, prefix, grouped heads, softcapping, dropout.
Scores are kept in base 2, multiplied by log2(e), since `exp2` is what the hardware computes.

* Blocks that are visible as a whole are computed without a mask; those at an edge, with one. Blocks without
  a visible pair are not visited: the work follows the documents' own squares.
* ALiBi's share that all keys of a query have in common cancels in a softmax, so a key's bias is counted from
  the first token of the block that the program keeps, the *frame*: one number a key, and small where weights
  are not. In float32, and where a prefix sees both ways, it is the distance's own, one number a pair.
* Forward visits the edges first, and so the diagonal. After them the rows' highest scores are known, and
  with them where ALiBi has pushed all further keys below rounding: there it stops, and notes where, so that
  backward stops there, too.
* Backward computes the probabilities anew, once for the queries' gradients and once for the keys' and
  values': no atomic additions, so the same gradients every time.

Letters: seq = queries of a row, keys = tokens in the cache + seq, the queries being the last of them; a
*place* is a token's index among the keys. `marks` says of each token 2 * document + is-in-prefix, -1 for
padding; `bounds` where its document and the unbroken run of it begin and end (see attention_triton.py).
"""

from __future__ import annotations

try:  # An exported folder is loaded where triton is not installed, too.
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    raise

NOTHING = constexpr(float("-inf"))
LOWEST = constexpr(-1e30)  # what a row begins with: lower than any score, and its differences are numbers


@triton.jit
def load_rows(start_of, begin, stride, limit, ROWS: constexpr, HEAD_DIM: constexpr, WIDTH: constexpr,
               MASKED: constexpr):  # fmt: skip
    """Rows [begin, begin + ROWS) of a head, (ROWS, WIDTH); zero from row `limit` and column HEAD_DIM on."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    places = start_of + begin.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if MASKED:
        inside = (begin + rows < limit)[:, None]
        if WIDTH != HEAD_DIM:
            inside = inside & (columns < HEAD_DIM)[None, :]
        return tl.load(places, mask=inside, other=0.0)
    if WIDTH != HEAD_DIM:
        return tl.load(places, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    return tl.load(places)


@triton.jit
def store_rows(start_of, x, begin, stride, limit, ROWS: constexpr, HEAD_DIM: constexpr,
                WIDTH: constexpr):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    places = start_of + begin.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    inside = (begin + rows < limit)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(places, x.to(start_of.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    # Around zero a quotient of exponentials has lost half its digits; the series has not.
    squared = x * x
    series = 1 - squared * (1 / 3 - squared * (2 / 15 - squared * (17 / 315 - squared * (62 / 2835))))
    power = tl.exp2(-2.885390081777927 * tl.abs(x))
    quotient = (1 - power) / (1 + power)
    return tl.where(squared < 0.04, x * series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def scores_of(products, inner, outer, HAS_SOFTCAP: constexpr):
    """Base-2 scores before the bias: products * scale * log2(e), capped if that is asked for."""
    if HAS_SOFTCAP:
        return outer * _tanh(products * inner)
    return products * outer


@triton.jit
def bias_of(slope, places_q, places_k, frame, EXACT: constexpr):
    """ALiBi in base 2: by the distance, or what a key alone has of it, counted from the frame."""
    if EXACT:
        return -slope * tl.abs(places_q - places_k).to(tl.float32)
    else:  # noqa: RET505 (Triton compiles what comes after a return, too)
        return slope * (places_k - frame).to(tl.float32)


@triton.jit
def is_visible(
    places_q, places_k, marks_q, marks_k, window,
    HAS_MARKS: constexpr, HAS_PREFIX: constexpr, HAS_WINDOW: constexpr,
):  # fmt: skip
    """Which keys which queries see; all arguments are rows or columns of the result."""
    visible = places_q >= places_k
    if HAS_PREFIX:
        visible = visible | ((marks_q & marks_k & 1) == 1)
    if HAS_WINDOW:
        visible = visible & (tl.abs(places_q - places_k) <= window)
    if HAS_MARKS:
        visible = visible & ((marks_q >> 1) == (marks_k >> 1))
    return visible


@triton.jit
def marks_of_queries(marks, places, inside):
    """The queries' marks; padding's is none that a key has, so that it sees nothing."""
    marks_q = tl.load(marks + places, mask=inside, other=-1)
    return tl.where(marks_q < 0, -4, marks_q)


@triton.jit
def is_kept(seed, head, places_q, places_k, dropout):
    """Whether a weight survives dropout: a function of the seed and of where it stands, nothing else."""
    zero = places_q * 0 + places_k * 0
    drawn, _, _, _ = tl.philox(seed, places_q + zero, places_k + zero, zero + head, zero)
    return tl.uint_to_uniform_float(drawn) >= dropout


@triton.jit
def shift_of(slope, places_q, frame, EXACT: constexpr):
    """What a row's scores have too much by being counted from the frame."""
    if EXACT:
        return places_q * 0.0
    else:  # noqa: RET505
        return slope * (places_q - frame).to(tl.float32)


@triton.jit
def query_bounds(
    bounds, plane, begin, past, seq, keys, window,
    BLOCK_Q: constexpr, BLOCK_K: constexpr, HAS_MARKS: constexpr, HAS_PREFIX: constexpr,
    HAS_WINDOW: constexpr,
):  # fmt: skip
    """Which keys the queries [begin, begin + BLOCK_Q) see, in multiples of BLOCK_K.

    Returns:
        low, whole_low, whole_high, high: all queries see all keys of [whole_low, whole_high); none sees any
        outside [low, high).
    """
    first_place, last_place = past + begin, past + tl.minimum(begin + BLOCK_Q, seq) - 1
    low, whole_low, high = first_place * 0, first_place * 0, last_place + 1
    whole_high = first_place // BLOCK_K * BLOCK_K
    if HAS_WINDOW:
        low = tl.maximum(low, first_place - window)
        whole_low = tl.maximum(whole_low, last_place - window)
    if HAS_MARKS:
        rows = begin + tl.arange(0, BLOCK_Q)
        inside, places = rows < seq, past + rows
        low = tl.maximum(low, tl.min(tl.load(bounds + places, mask=inside, other=keys)))
        run = tl.load(bounds + 2 * plane + places, mask=inside, other=0)
        # Queries of several runs have no key that all of them see in the way the first does.
        whole_low = tl.where(tl.max(run) <= first_place, tl.maximum(whole_low, tl.max(run)), whole_high)
        if HAS_PREFIX:
            high = tl.maximum(high, tl.max(tl.load(bounds + plane + places, mask=inside, other=0)))
            whole_low = whole_high
    low, high = low // BLOCK_K * BLOCK_K, tl.cdiv(high, BLOCK_K) * BLOCK_K
    whole_low = tl.minimum(tl.cdiv(whole_low, BLOCK_K) * BLOCK_K, whole_high)
    whole_high = tl.maximum(whole_high, low)
    return low, tl.maximum(whole_low, low), whole_high, tl.maximum(high, whole_high)
