from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mptfoundry.mpt import attention_chunks
from mptfoundry.mpt.attention_blocks import _cut, attend_by_blocks, find_segments
from mptfoundry.mpt.attention_chunks import attend_by_chunks
from mptfoundry.mpt.attention_torch import _attend_by_kernel, attend
from mptfoundry.mpt.position import AttentionContext, alibi_slopes
from tests.marks import some_of

from .reference import assert_as_exact, assert_attention_as_exact, attend_plainly, with_gradients

DOCUMENTS = torch.tensor([[0] * 37 + [1] * 263 + [2] * 20, [-1] * 11 + [0] * 300 + [-1] * 9])
PREFIX = torch.tensor([[True] * 50 + [False] * 270, [False] * 11 + [True] * 100 + [False] * 209])

FEATURES = {
    "plain": {},
    "alibi": {"slopes": 8},
    "alibi, 12 heads": {"slopes": 8, "n_heads": 12},
    "steep alibi, a scale": {"slopes": 16, "scale": 0.3},
    "documents": {"documents": DOCUMENTS},
    "alibi, documents": {"slopes": 8, "documents": DOCUMENTS},
    "grouped queries": {"kv_heads": 2},
    "alibi, one key head, documents": {"slopes": 8, "kv_heads": 1, "documents": DOCUMENTS},
    "window": {"window": 30},
    "alibi, window, documents": {"slopes": 8, "window": 100, "documents": DOCUMENTS},
    "softcap": {"softcap": 2.0},
    "alibi, softcap, documents": {"slopes": 8, "softcap": 1.0, "documents": DOCUMENTS},
    "prefix": {"prefix": PREFIX},
    "alibi, prefix, documents": {"slopes": 8, "prefix": PREFIX, "documents": DOCUMENTS},
    "all": {
        "slopes": 8,
        "kv_heads": 2,
        "window": 60,
        "softcap": 3.0,
        "prefix": PREFIX,
        "documents": DOCUMENTS,
        "scale": 0.2,
    },
}


def case(
    seq: int = 320,
    n_heads: int = 4,
    kv_heads: int | None = None,
    slopes: int | None = None,
    scale: float = 0.25,
    head_dim: int = 16,
    **rest: object,
) -> tuple[list[torch.Tensor], torch.Tensor, AttentionContext]:
    """Inputs read from one fused matrix, a gradient of the output, and a context."""
    kv_heads = kv_heads or n_heads
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(2, seq, n_heads + 2 * kv_heads, head_dim, generator=generator)
    grad = torch.randn(2, seq, n_heads, head_dim, generator=generator)
    context = AttentionContext(
        scale=scale,
        slopes=None if slopes is None else alibi_slopes(n_heads, slopes),
        **rest,  # type: ignore[arg-type]
    )
    return list(fused.split([n_heads, kv_heads, kv_heads], dim=2)), grad, context


def real(tensors: list[torch.Tensor], context: AttentionContext) -> list[torch.Tensor]:
    """Without the rows of padding, which mean nothing."""
    if context.documents is None:
        return tensors
    return [x[context.documents != -1] for x in tensors]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("chunk_scores", [2**20, 2**10])
def test_every_feature_is_as_exact_as_the_plain_formula(
    feature: str, chunk_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention_chunks._CHUNK_SCORES, "cpu", chunk_scores)
    inputs, grad, context = case(**FEATURES[feature])
    if context.documents is not None:
        grad = grad * (context.documents != -1)[..., None, None]

    def run(function: object, dtype: torch.dtype) -> list[torch.Tensor]:
        fresh = dataclasses.replace(context, _made={})
        return real(with_gradients(lambda *x: function(*x, fresh), inputs, grad, dtype), context)

    truth = run(attend_plainly, torch.float64)
    assert_attention_as_exact(run(attend, torch.float32), run(attend_plainly, torch.float32), truth, context)
    assert_attention_as_exact(
        run(attend_by_chunks, torch.float32), run(attend_plainly, torch.float32), truth, context
    )
    for some, true in zip(run(attend, torch.float64), truth, strict=True):
        torch.testing.assert_close(some, true)


@pytest.mark.parametrize("seq", [1, 2, 255, 256, 257, 600, 1100])
@pytest.mark.parametrize("slopes", [None, 8])
def test_any_length_is_cut_into_pieces_that_join_exactly(seq: int, slopes: int | None) -> None:
    inputs, grad, context = case(seq=seq, slopes=slopes, head_dim=8)

    def run(function: object, dtype: torch.dtype) -> list[torch.Tensor]:
        return with_gradients(lambda *x: function(*x, context), inputs, grad, dtype)

    def by_blocks(*inputs: torch.Tensor) -> torch.Tensor:
        return attend_by_blocks(*inputs, ((0, 2, 0, seq),))

    assert_attention_as_exact(
        run(by_blocks, torch.float32),
        run(attend_plainly, torch.float32),
        run(attend_plainly, torch.float64),
        context,
    )


def computed(inputs: list[torch.Tensor], context: AttentionContext) -> float:
    """The share of the scores left of the small triangles that is computed."""
    query, key = (x.transpose(1, 2) for x in inputs[:2])
    n_heads, seq = query.shape[1:3]
    pieces = _cut(query, key, ((0, 2, 0, seq),), context)
    sizes = [
        (piece.heads.stop - piece.heads.start) * piece.queries[1] * piece.keys[1] * piece.number
        for piece in pieces
        if not piece.is_triangle
    ]
    return sum(sizes) / (n_heads * seq * (seq - 256) / 2)


def test_keys_too_far_to_count_are_not_computed() -> None:
    inputs, _, context = case(seq=1024, slopes=8, n_heads=8, head_dim=4)
    assert computed(inputs, context) < 0.9
    assert computed([10 * x for x in inputs], context) == 1
    assert computed([x * torch.nan for x in inputs], context) == 1
    assert computed(inputs, AttentionContext(context.scale, torch.full((8,), 1e-4))) == 1


def test_a_far_key_that_outweighs_its_distance_counts() -> None:
    inputs, grad, context = case(seq=600, slopes=8)
    query, key, _ = inputs
    query[:, 590], key[:, 3] = 15, 15

    def run(function: object, dtype: torch.dtype) -> list[torch.Tensor]:
        return with_gradients(lambda *x: function(*x, context), inputs, grad, dtype)

    truth = run(attend_plainly, torch.float64)
    torch.testing.assert_close(truth[0][:, 590, 0], inputs[2][:, 3, 0].double())
    assert_attention_as_exact(run(attend, torch.float32), run(attend_plainly, torch.float32), truth, context)


def test_three_tokens_by_hand() -> None:
    # One head of slope 1/2, scale 1, all products of queries and keys zero: weights are exp(-distance / 2).
    query = torch.zeros(1, 3, 1, 1)
    value = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
    context = AttentionContext(scale=1.0, slopes=torch.tensor([0.5]))
    half, one = 0.6065306597, 0.3678794412
    expected = [1.0, (half + 10) / (half + 1), (one + 10 * half + 100) / (one + half + 1)]
    for function in (attend, attend_by_chunks):
        out = function(query, query, value, context).flatten()
        torch.testing.assert_close(out, torch.tensor(expected))


def test_low_precision_is_as_exact_as_the_plain_formula() -> None:
    inputs, grad, context = case(slopes=8, documents=DOCUMENTS)
    grad = grad * (DOCUMENTS != -1)[..., None, None]
    truth = with_gradients(lambda *x: attend_plainly(*x, context), inputs, grad, torch.float64)
    plain = with_gradients(lambda *x: attend_plainly(*x, context), inputs, grad, torch.bfloat16)
    fast = with_gradients(lambda *x: attend(*x, context), inputs, grad, torch.bfloat16)
    assert_attention_as_exact(*(real(results, context) for results in (fast, plain, truth)), context)


def test_packed_documents_equal_the_same_documents_alone() -> None:
    inputs, _, context = case(slopes=8, documents=DOCUMENTS)
    packed = attend(*inputs, context)
    for row, start, stop in ((0, 0, 37), (0, 37, 300), (0, 300, 320), (1, 11, 311)):
        alone = attend(
            *(x[row : row + 1, start:stop] for x in inputs),
            AttentionContext(context.scale, context.slopes),
        )
        torch.testing.assert_close(packed[row, start:stop], alone[0])


@pytest.mark.parametrize("function", [attend, attend_by_chunks])
def test_padding_is_finite_and_changes_nothing_real(function: object) -> None:
    inputs, grad, context = case(slopes=8, documents=DOCUMENTS)
    for x in inputs:
        x[DOCUMENTS == -1] *= 1e4
    before = with_gradients(lambda *x: function(*x, context), inputs, grad, torch.float32)
    assert all(x.isfinite().all() for x in before)
    for x in inputs:
        x[DOCUMENTS == -1] *= -2
    after = function(*inputs, dataclasses.replace(context, _made={}))
    assert torch.equal(after[DOCUMENTS != -1], before[0][DOCUMENTS != -1])


def test_grouped_queries_equal_expanded_keys_and_values() -> None:
    for context in (AttentionContext(0.25, alibi_slopes(4, 8)), AttentionContext(0.25, window=20)):
        (query, key, value), _, _ = case(kv_heads=2)
        expanded = (x.repeat_interleave(2, dim=2) for x in (key, value))
        torch.testing.assert_close(attend(query, key, value, context), attend(query, *expanded, context))


@pytest.mark.parametrize("feature", ["plain", "grouped queries"])
def test_pytorchs_kernel_is_given_the_right_arguments(feature: str) -> None:
    # On a CPU it is not what attend chooses, but takes the same arguments.
    inputs, _, context = case(**FEATURES[feature])
    torch.testing.assert_close(_attend_by_kernel(*inputs, context), attend_plainly(*inputs, context))


def test_pytorchs_kernel_groups_heads_in_half_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _, context = case(kv_heads=2)
    calls = []

    def recorded(query: torch.Tensor, key: torch.Tensor, *_: object, **options: object) -> torch.Tensor:
        calls.append((key.shape[1], options["enable_gqa"]))
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    for dtype in (torch.float32, torch.bfloat16):
        _attend_by_kernel(*(x.to(dtype) for x in inputs), context)
    assert calls == [(4, False), (2, True)]


def test_segments_leave_out_padding_and_are_shared_by_rows_that_are_alike() -> None:
    documents = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [-1, 0, 0, 0], [0, 0, -1, -1]])
    assert find_segments(documents, 4, 4) == (
        (0, 2, 0, 2),
        (0, 2, 2, 4),
        (2, 3, 1, 4),
        (3, 4, 0, 2),
    )
    assert find_segments(None, 3, 7) == ((0, 3, 0, 7),)
    assert find_segments(torch.tensor([[0, -1, 0]]), 1, 3) is None


def test_padding_inside_a_document_is_stepped_over() -> None:
    documents = torch.tensor([[0] * 10 + [-1] * 5 + [0] * 305] * 2)
    inputs, _, context = case(slopes=8, documents=documents)
    out, expected = attend(*inputs, context), attend_plainly(*inputs, context)
    torch.testing.assert_close(out[documents == 0], expected[documents == 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("feature", ["plain", "alibi", "grouped queries", "window", "softcap", "padding"])
@pytest.mark.parametrize("new", [1, 7])
def test_queries_against_a_longer_cache_equal_the_last_rows(feature: str, new: int) -> None:
    padding = {"slopes": 8, "documents": torch.tensor([[0] * 320, [-1] * 11 + [0] * 309])}
    inputs, _, context = case(**{**FEATURES, "padding": padding}[feature])
    (query, key, value), exact = inputs, [x.double() for x in inputs]
    out = attend(query[:, -new:], key, value, context)
    truth = attend_plainly(*exact, context)[:, -new:]
    assert_as_exact([out], [attend_plainly(*inputs, context)[:, -new:]], [truth])


def test_dropout_drops_the_same_weights_in_backward() -> None:
    inputs, grad, context = case(seq=64, slopes=8, dropout=0.5, head_dim=4)
    state = torch.get_rng_state()
    leaves = [x.double().requires_grad_() for x in inputs]

    def run() -> torch.Tensor:
        torch.set_rng_state(state)
        return (attend(*leaves, context) * grad).sum()

    gradients = torch.autograd.grad(run(), leaves)
    with torch.no_grad():
        for leaf, gradient in zip(leaves, gradients, strict=True):
            direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)).double()
            leaf += 1e-6 * direction
            above = run()
            leaf -= 2e-6 * direction
            below = run()
            leaf += 1e-6 * direction
            torch.testing.assert_close(
                (above - below) / 2e-6, (gradient * direction).sum(), rtol=1e-6, atol=1e-6
            )


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    query = torch.zeros(1, 400, 8, 1)
    context = AttentionContext(1.0, dropout=0.25, window=0)
    torch.manual_seed(0)
    out = attend(query, query, torch.ones(1, 400, 8, 1), context)
    torch.testing.assert_close(out.unique(), torch.tensor([0, 4 / 3]))
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


class LargestTensor(TorchDispatchMode):
    """Counts the numbers of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(attention_chunks._CHUNK_SCORES, "cpu", 2**14)
    yield


@pytest.mark.parametrize(
    "feature",
    [
        pytest.param(name, marks=[] if name in ("plain", "alibi, documents", "all") else pytest.mark.soak)
        for name in FEATURES
        if "12" not in name
    ],
)
def test_memory_is_linear_in_the_sequence(feature: str, small_chunks: None) -> None:
    def largest(seq: int) -> int:
        features = dict(FEATURES[feature])
        for name in ("documents", "prefix"):
            if name in features:
                features[name] = features[name].repeat_interleave(seq // 320, 1)
        inputs, grad, context = case(seq=seq, head_dim=4, **features)
        with LargestTensor() as counter:
            with_gradients(lambda *x: attend(*x, context), inputs, grad, torch.float32)
        return counter.numbers

    # The matrix of scores would grow 16 times; small tables of a fixed size may make the ratio smaller.
    assert largest(2560) <= 4.1 * max(largest(640), 2**14)


@pytest.mark.parametrize("feature", FEATURES)
def test_saved_for_backward_is_linear_in_the_sequence(feature: str) -> None:
    inputs, _, context = case(**FEATURES[feature])
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        attend(*(x.requires_grad_() for x in inputs), context)
    rows = inputs[0].numel() // inputs[0].shape[-1]
    # Queries, keys, values and the output, and one logarithmic sum a row.
    assert sum(saved) <= 4 * inputs[0].numel() + rows


@pytest.mark.parametrize("feature", some_of(["plain", "alibi", "steep alibi, a scale", "even weights"]))
def test_one_query_is_exact_against_the_longest_cache(feature: str) -> None:
    keys, n_heads, head_dim = 83_968, 32, 8
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 1, n_heads, head_dim, generator=generator)
    stored = torch.randn(2, 1, n_heads, keys + 32, head_dim, generator=generator)
    key, value = (x.transpose(1, 2)[:, :keys] for x in stored)
    value += 1  # so that the sum of the weights counts
    if feature == "even weights":
        query = query * 0
    slopes = {"alibi": 16, "steep alibi, a scale": 8}.get(feature)
    context = AttentionContext(0.3, None if slopes is None else alibi_slopes(n_heads, slopes))
    inputs = [query, key, value]
    truth = attend_plainly(*(x.double() for x in inputs), context)
    assert_as_exact([attend(*inputs, context)], [attend_plainly(*inputs, context)], [truth])
