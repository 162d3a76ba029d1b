"""The decoding kernels: few queries against a cache, cut into parts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mptfoundry.mpt import attention_triton
from mptfoundry.mpt.attention_triton import attend
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.network import KVCache
from mptfoundry.mpt.position import AttentionContext

from .cases import (
    DEVICE,
    HALVES,
    SMALL_TILES,
    Calls,
    Case,
    make_case,
    on_device,
    padding_of,
    plainly,
    use_tiles,
)
from .reference import assert_as_exact

pytestmark = pytest.mark.usefixtures("triton_runs")

MIXES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "alibi": {"bias_max": 8},
    "alibi, left padding": {"bias_max": 8, "left": 37},
    "alibi, grouped queries, window": {"bias_max": 8, "n_heads": 6, "kv_heads": 2, "window": 30},
    "alibi, one key head, softcap": {"bias_max": 4, "n_heads": 4, "kv_heads": 1, "softcap": 2.0},
    "window of the token alone, left padding": {"window": 0, "left": 37},
    "prefix, scale": {"prefix": ((0, 40), (10, 80)), "scale": 0.5},
    "alibi, prefix, padding inside": {
        "bias_max": 8,
        "prefix": ((0, 40), (10, 80)),
        "inner": ((20, 61), (0, 33)),
    },
    "head_dim 80": {"bias_max": 8, "head_dim": 80},
}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two blocks of 16 keys."""
    monkeypatch.setattr(attention_triton, "keys_of_decoding", lambda *_: 16)
    monkeypatch.setattr(attention_triton, "_cut", lambda keys, *_: (32, -(-keys // 32)))


def decoded(case: Case) -> tuple[torch.Tensor, Calls]:
    """The outputs of queries against a cache that has room for more."""
    (query, key, value), _, context = case
    batch, keys, kv_heads, head_dim = key.shape
    config = MPTConfig(n_heads=kv_heads, n_layers=1, head_dim=head_dim)
    cache = KVCache(config, batch, keys + 9, device=DEVICE, dtype=key.dtype)
    key, value = cache.append(0, key.to(DEVICE), value.to(DEVICE))
    with torch.no_grad(), Calls() as calls:
        out = attend(query.to(DEVICE), key, value, dataclasses.replace(on_device(context), cache=cache))
    return out.cpu(), calls


def real_rows(
    results: list[torch.Tensor], context: AttentionContext, grad: torch.Tensor
) -> list[torch.Tensor]:
    return [x.masked_fill(padding_of(context, grad)[..., None, None], 0) for x in results]


# Each mix with each number of queries and each dtype; an ordinary run of the tests has two of the nine.
CASES = [
    pytest.param(mix, seq, dtype, marks=[] if (number + 3 * row + column) % 9 in (0, 4) else pytest.mark.soak)
    for number, mix in enumerate(MIXES)
    for row, seq in enumerate((1, 2, 7))
    for column, dtype in enumerate((torch.float32, *HALVES))
]


@pytest.mark.parametrize(("mix", "seq", "dtype"), CASES, ids=str)
def test_few_queries_against_a_cache_are_as_exact_as_the_plain_formula(
    mix: str, seq: int, dtype: torch.dtype, small_parts: None
) -> None:
    inputs, grad, context = make_case(seq=seq, past=97 - seq, **MIXES[mix])
    case = [x.to(dtype) for x in inputs], grad.to(dtype), context
    out, calls = decoded(case)
    assert "decode" in calls.names
    assert not out[padding_of(context, grad)].any()
    assert_as_exact([out], plainly(*case, dtype)[:1], plainly(*case, torch.float64)[:1])


@pytest.mark.parametrize("mix", MIXES)
def test_decoding_equals_the_forward_kernel(
    mix: str, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles(monkeypatch, SMALL_TILES[0])
    case = make_case(seq=5, past=92, **MIXES[mix])
    forward = attend(*(x.to(DEVICE) for x in case[0]), on_device(case[2])).cpu()
    torch.testing.assert_close(decoded(case)[0], forward)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 200])
def test_any_number_of_keys_is_cut_into_parts_that_join_exactly(keys: int) -> None:
    case = make_case(seq=1, past=keys - 1, bias_max=8, n_heads=4)
    assert_as_exact([decoded(case)[0]], plainly(*case, torch.float32)[:1], plainly(*case, torch.float64)[:1])


def test_a_long_chunk_and_one_that_learns_go_through_the_forward_kernel() -> None:
    long = make_case(seq=40, past=10, bias_max=8, n_heads=4, kv_heads=2)
    out, calls = decoded(long)
    assert "decode" not in calls.names and "attention" in calls.names
    assert_as_exact([out], plainly(*long, torch.float32)[:1], plainly(*long, torch.float64)[:1])
    (query, key, value), _, context = make_case(seq=2, past=10)
    context = dataclasses.replace(
        context, cache=KVCache(MPTConfig(n_heads=2), 1, 20, device="cpu", dtype=key.dtype)
    )
    for learned in range(3):  # a cache's keys alone are learned where peft tunes a prefix
        inputs = [x.detach().to(DEVICE) for x in (query, key, value)]
        inputs[learned].requires_grad_()
        attend(*inputs, context).sum().backward()
        assert inputs[learned].grad is not None


def test_dropout_is_not_left_out_with_a_cache() -> None:
    case = make_case(seq=2, past=60, dropout=0.5)
    assert (decoded(case)[0] - plainly(*case, torch.float32)[0]).abs().max() > 0.05
