from __future__ import annotations

from typing import Any

import pytest
import torch

from mptfoundry.mpt import attention_flash
from mptfoundry.mpt.attention_flash import attend, bounds_of_runs, options_of
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT, KVCache
from mptfoundry.mpt.position import AttentionContext, alibi_slopes, number_documents

from .reference import assert_as_exact, assert_attention_as_exact, attend_plainly, with_gradients

Calls = list[dict[str, Any]]


def one_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    **rest: Any,
) -> torch.Tensor:
    """One sequence, (queries, n_heads, head_dim), as flash-attn describes its causal attention: the last
    query stands at the last key, ALiBi is -slope * distance, and a query that sees no key gives zero."""
    assert rest["causal"] is True and rest["deterministic"] is True and rest["dropout_p"] == 0
    assert alibi_slopes is None or alibi_slopes.dtype == torch.float32
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    left, right = window_size
    hidden = distance < 0
    if left >= 0:
        hidden = hidden | (distance > left)
    if right >= 0:
        hidden = hidden | (-distance > right)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[:, None, None] * distance.abs()
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("hqk,khd->qhd", weights, v)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.stack([one_sequence(*row, **options) for row in zip(q, k, v, strict=True)])


def of_various_lengths(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> torch.Tensor:
    sequences = [x.tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
    lengths = [x.diff() for x in (cu_seqlens_q, cu_seqlens_k)]
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert [bounds[0] for bounds in sequences] == [0, 0]
    assert [bounds[-1] for bounds in sequences] == [len(q), len(k)]
    assert max(lengths[0]) <= max_seqlen_q and max(lengths[1]) <= max_seqlen_k
    # It takes a shorter way for single queries of grouped heads, and there no sequence may be empty.
    assert max_seqlen_q > 1 or min(lengths[0]) == 1
    pieces = [x.split(each.tolist()) for x, each in zip((q, k, v), (*lengths, lengths[1]), strict=True)]
    return torch.cat([one_sequence(*piece, **options) for piece in zip(*pieces, strict=True)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """flash-attn's two functions, as its documentation describes them, and how they were called."""
    made: Calls = []
    for name, function in (("flash_attn_func", dense), ("flash_attn_varlen_func", of_various_lengths)):

        def recorded(*tensors: Any, _name: str = name, _function: Any = function, **options: Any) -> Any:
            made.append({"name": _name, "shapes": [tuple(x.shape) for x in tensors], **options})
            return _function(*tensors, **options)

        monkeypatch.setattr(attention_flash, name, recorded)
    return made


PACKED = torch.tensor([[0] * 5 + [1] * 20 + [2] + [3] * 14, [0] * 40])
RIGHT = torch.tensor([[0] * 29 + [-1] * 11, [0] * 40])
LEFT = torch.tensor([[-1] * 11 + [0] * 29, [0] * 40])
BOTH = torch.tensor([[-1] * 4 + [0] * 20 + [1] * 9 + [-1] * 7, [0] * 3 + [-1] * 37])

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("flash_attn_func", {}),
    "alibi": ("flash_attn_func", {"slopes": 4}),
    "grouped queries, alibi": ("flash_attn_func", {"slopes": 4, "kv_heads": 2}),
    "window": ("flash_attn_func", {"slopes": 4, "window": 7}),
    "window of itself": ("flash_attn_func", {"window": 0}),
    "softcap, scale": ("flash_attn_func", {"slopes": 4, "softcap": 1.5, "scale": 0.7}),
    "right padding, known": ("flash_attn_func", {"slopes": 4, "documents": RIGHT, "max_documents": 1}),
    "right padding": ("flash_attn_varlen_func", {"slopes": 4, "documents": RIGHT}),
    "left padding": ("flash_attn_varlen_func", {"slopes": 4, "documents": LEFT}),
    "packed, known": ("flash_attn_varlen_func", {"slopes": 4, "documents": PACKED, "max_documents": 4}),
    "packed, fewer than known": ("flash_attn_varlen_func", {"documents": PACKED, "max_documents": 9}),
    "packed": ("flash_attn_varlen_func", {"slopes": 4, "documents": PACKED}),
    "packed, padded at both ends": ("flash_attn_varlen_func", {"slopes": 4, "documents": BOTH}),
    "all": (
        "flash_attn_varlen_func",
        {"slopes": 4, "documents": BOTH, "kv_heads": 1, "window": 6, "softcap": 2.0, "scale": 0.3},
    ),
}


def case(
    seq: int = 40, slopes: int | None = None, kv_heads: int = 4, scale: float = 0.25, **rest: Any
) -> tuple[list[torch.Tensor], torch.Tensor, AttentionContext]:
    """Inputs read from one fused matrix, a gradient of the output, and a context."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(2, seq, (4 + 2 * kv_heads) * 8, generator=generator)
    inputs = [x.unflatten(-1, (-1, 8)) for x in fused.split([32, kv_heads * 8, kv_heads * 8], dim=-1)]
    context = AttentionContext(scale, None if slopes is None else alibi_slopes(slopes, 8), **rest)
    return inputs, torch.randn(2, seq, 4, 8, generator=generator), context


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_the_plain_formula(name: str, calls: Calls) -> None:
    function, features = CASES[name]
    inputs, grad, context = case(**features)
    real = torch.ones(2, 40, dtype=torch.bool) if context.documents is None else context.documents != -1

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        gradient = grad * real[..., None, None]
        results = with_gradients(lambda *x: function(*x, context), inputs, gradient, dtype)
        return [result[real] for result in results]

    plain, truth = run(attend_plainly, torch.float32), run(attend_plainly, torch.float64)
    assert_attention_as_exact(run(attend, torch.float32), plain, truth, context)
    assert [call["name"] for call in calls] == [function]


def test_nothing_is_copied_to_lay_rows_end_to_end(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    (query, key, value), _, context = case(documents=PACKED)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        attention_flash,
        "flash_attn_varlen_func",
        lambda *x, **options: seen.extend(x) or torch.zeros(80, 4, 8),
    )
    attend(query, key, value, context)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in (query, key, value)]


@pytest.mark.parametrize("past", [0, 1, 17])
@pytest.mark.parametrize("seq", [1, 2, 12])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("features", [{"slopes": 4}, {"kv_heads": 2}, {"slopes": 4, "window": 5}], ids=str)
def test_the_last_queries_see_what_is_in_a_cache(
    past: int, seq: int, padded: bool, features: dict[str, Any], calls: Calls
) -> None:
    documents = torch.zeros(2, past + seq, dtype=torch.int64)
    documents[1, : (past + seq) // 2] = -1
    (query, key, value), _, context = case(past + seq, documents=documents if padded else None, **features)
    query = query[:, past:]
    real = documents[:, past:] != -1
    results = [f(query, key, value, context)[real] for f in (attend, attend_plainly)]
    exact = attend_plainly(query.double(), key.double(), value.double(), context)[real]
    assert_as_exact(*[[x] for x in (*results, exact)])


def test_bounds_by_hand() -> None:
    documents = torch.tensor([[0, 0, 1, -1], [-1, 0, 0, 0]])
    bounds = bounds_of_runs(documents, 4, None)
    assert bounds["cu_seqlens_q"].tolist() == bounds["cu_seqlens_k"].tolist() == [0, 2, 3, 4, 5, 8]
    assert (bounds["max_seqlen_q"], bounds["max_seqlen_k"]) == (4, 4)
    known = bounds_of_runs(documents, 4, 2)
    assert known["cu_seqlens_k"].tolist() == [0, 2, 3, 4, 5, 8, 8]
    decoding = bounds_of_runs(documents, 1, None)
    assert decoding["cu_seqlens_q"].tolist() == [0, 0, 0, 1, 1, 2]
    assert decoding["cu_seqlens_k"].tolist() == [0, 2, 3, 4, 5, 8]
    assert decoding["max_seqlen_q"] == 2


def test_the_device_is_not_asked_where_the_batch_says_how_many_documents_there_are() -> None:
    with torch.device("meta"):
        documents = torch.empty(3, 50, dtype=torch.int64)
    bounds = bounds_of_runs(documents, 50, 6)
    assert bounds["cu_seqlens_q"].shape == bounds["cu_seqlens_k"].shape == (3 * (6 + 1) + 1,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bounds_of_runs(documents, 50, None)


def test_more_documents_than_were_said_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        bounds_of_runs(torch.arange(8)[None], 8, 5)


def test_padding_within_a_document_is_refused(calls: Calls) -> None:
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    documents = number_documents(mask, None)
    (query, key, value), _, context = case(4, documents=documents)
    with pytest.raises(ValueError) as caught:
        attend(query, key, value, context)
    assert str(caught.value) == (
        "attention_mask: padding stands between tokens of one document, which attn_impl: flash can't leave "
        "out. Pad at either end, or use attn_impl: torch or triton."
    )
    between = number_documents(mask, torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]]))
    attend(query, key, value, AttentionContext(0.25, documents=between))


def test_arguments_are_those_of_the_package() -> None:
    slopes = alibi_slopes(4, 8)
    assert options_of(AttentionContext(0.5)) == {
        "dropout_p": 0.0,
        "softmax_scale": 0.5,
        "causal": True,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": True,
    }
    given = options_of(AttentionContext(0.5, slopes, window=0, softcap=3.0, dropout=0.1))
    assert given["window_size"] == (0, 0) and given["alibi_slopes"] is slopes
    assert (given["softcap"], given["dropout_p"]) == (3.0, 0.1)


@pytest.mark.skipif(attention_flash.flash_attn_func is not None, reason="flash-attn is installed")
def test_without_the_package_it_says_so() -> None:
    (query, key, value), _, context = case(4)
    with pytest.raises(ValueError, match=r"flash can't be used: flash-attn can't be imported \(No module"):
        attend(query, key, value, context)


def test_a_network_gives_the_same_logits_and_continues_alike(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed and padded rows through all layers, and a left-padded prompt and single tokens with a cache."""
    monkeypatch.setattr("mptfoundry.mpt.attention.choose_backend", lambda *_: ("flash", "asked for"))
    config = MPTConfig(
        d_model=32, n_heads=4, n_layers=3, vocab_size=50, no_bias=True, attn_config=AttnConfig(alibi=True)
    )
    flash = MPT(config, seed=1)
    ids = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))

    def logits(documents: torch.Tensor, **known: int) -> torch.Tensor:
        real = documents != -1
        rows = {"attention_mask": real, "sequence_id": documents.clamp(min=0), **known}
        return flash(ids, **rows).logits[real]

    def continuation() -> torch.Tensor:
        cache = KVCache(config, 2, 20, device="cpu", dtype=torch.float32)
        mask = torch.ones(2, 20, dtype=torch.bool)
        mask[1, :6] = False
        pieces = [slice(0, 10), slice(10, 11), slice(11, 15), slice(15, 16)]
        with torch.no_grad():
            return torch.cat(
                [flash(ids[:, p], attention_mask=mask[:, : p.stop], cache=cache).logits for p in pieces], 1
            )[mask[:, :16]]

    found = [logits(BOTH), logits(PACKED, max_documents=4), logits(RIGHT, max_documents=1), continuation()]
    assert {call["name"] for call in calls} == {"flash_attn_func", "flash_attn_varlen_func"}
    made = len(calls)
    monkeypatch.setattr("mptfoundry.mpt.attention.choose_backend", lambda *_: ("torch", "asked for"))
    expected = [logits(BOTH), logits(PACKED), logits(RIGHT), continuation()]
    assert len(calls) == made
    for some, same in zip(found, expected, strict=True):
        torch.testing.assert_close(some, same)
