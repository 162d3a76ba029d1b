"""The Triton kernels with the tiles that ship, in every dtype and at full length; run by `make gpu`.

Letters of the shapes: keys = tokens in the cache + seq.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mptfoundry.mpt.attention_triton import attend
from mptfoundry.mpt.backends import why_not
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.network import KVCache
from mptfoundry.mpt.position import AttentionContext, alibi_slopes
from tests.mpt.cases import Calls, assert_kernels_as_exact, make_case, on_device, padding_of, plainly
from tests.mpt.reference import assert_as_exact

_REASON = why_not("triton", MPTConfig(), "cuda", "bfloat16") if torch.cuda.is_available() else "needs a GPU"
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"{_REASON}; run by `make gpu`")

HEAD_DIMS = [32, 64, 80, 96, 112, 128, 192, 256]
# More queries than a block has, and no multiple of one; sixteen heads, as models have, for integers that are
# multiples of sixteen get kernels of their own.
COMMON: dict[str, Any] = {"seq": 300, "n_heads": 16, "bias_max": 8}
PACKED: dict[str, Any] = {"documents": ((100, 131), (290,)), "left": 9}
MIXES: dict[str, dict[str, Any]] = {
    "causal": {"bias_max": None},
    "alibi": {},
    "packed": PACKED,
    "grouped queries": {**PACKED, "kv_heads": 4},
    "past": {"past": 200},
    "window": {"window": 64},
    "softcap": {"softcap": 2.0},
    "prefix": {"prefix": ((0, 150), (40, 190))},
    "everything": {**PACKED, "kv_heads": 4, "window": 160, "softcap": 2.0, "prefix": ((0, 150), (40, 190))},
}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_width_in_bf16_is_as_exact_as_the_plain_formula(head_dim: int) -> None:
    assert_kernels_as_exact(make_case(**COMMON, **PACKED, head_dim=head_dim), torch.bfloat16)


@pytest.mark.parametrize("mix", MIXES)
def test_every_feature_in_bf16_is_as_exact_as_the_plain_formula(mix: str) -> None:
    assert_kernels_as_exact(make_case(**{**COMMON, **MIXES[mix], "head_dim": 128}), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_other_dtypes_are_as_exact_as_the_plain_formula(head_dim: int, dtype: torch.dtype) -> None:
    assert_kernels_as_exact(make_case(**COMMON, **PACKED, head_dim=head_dim), dtype)


@pytest.mark.parametrize("seq", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_decoding_against_a_long_cache_is_as_exact_as_the_plain_formula(head_dim: int, seq: int) -> None:
    inputs, grad, context = make_case(
        **{**COMMON, "seq": seq, "past": 5000, "kv_heads": 4, "left": 77, "head_dim": head_dim}
    )
    case = [x.bfloat16() for x in inputs], grad.bfloat16(), context
    config = MPTConfig(n_heads=4, n_layers=1, head_dim=head_dim)
    cache = KVCache(config, 2, 6000, device="cuda", dtype=torch.bfloat16)
    query, key, value = (x.cuda() for x in case[0])
    there = dataclasses.replace(on_device(context), cache=cache)
    with torch.no_grad(), Calls() as calls:
        out = attend(query, *cache.append(0, key, value), there)
    assert "decode" in calls.names
    assert not out.cpu()[padding_of(context, grad)].any()
    truth = plainly(*case, torch.float64)[:1]
    assert_as_exact([out.cpu()], plainly(*case, torch.bfloat16)[:1], truth)


LONG = 65_536


@pytest.fixture(scope="module")
def long() -> dict[str, Any]:
    """A row of 65,536 tokens in a steep head and a flat one; its truth and the plain formula's results."""
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value, grad = (
        torch.randn(1, LONG, 2, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    )
    slopes = alibi_slopes(32, 8, "cuda")[[0, 31]]
    documents = (torch.arange(LONG, device="cuda") >= 10_000).long()[None]
    inputs = (query, key, value)
    return {
        "inputs": inputs,
        "grad": grad,
        "context": AttentionContext(128**-0.5, slopes, documents),
        "truth": by_rows(inputs, grad, slopes, documents[0], torch.float64),
        "plain": by_rows(inputs, grad, slopes, documents[0], torch.bfloat16),
    }


def by_rows(
    inputs: tuple[torch.Tensor, ...],
    grad: torch.Tensor,
    slopes: torch.Tensor,
    documents: torch.Tensor,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Output and gradients of the formula for some queries at a time; products in ``dtype``, sums wider."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    results = [torch.zeros_like(x, dtype=sums) for x in (grad, *inputs)]
    places, step = torch.arange(LONG, device=grad.device), 1024
    for head, slope in enumerate(slopes.to(sums)):
        q, k, v, g = (x[0, :, head].to(dtype) for x in (*inputs, grad))
        out, grad_q, grad_k, grad_v = (x[0, :, head] for x in results)
        for begin in range(0, LONG, step):
            own, end = slice(begin, begin + step), begin + step
            distance = places[own, None] - places[:end]
            hidden = (distance < 0) | (documents[own, None] != documents[:end])
            scores = (q[own] @ k[:end].mT).to(sums) * 128**-0.5 - slope * distance
            weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
            out[own] = (weights.to(dtype) @ v[:end]).to(sums)
            grad_weights = (g[own] @ v[:end].mT).to(sums)
            delta = (g[own].to(sums) * out[own]).sum(-1, keepdim=True)
            grad_scores = (weights * (grad_weights - delta) * 128**-0.5).to(dtype)
            grad_q[own] = (grad_scores @ k[:end]).to(sums)
            grad_k[:end] += (grad_scores.mT @ q[own]).to(sums)
            grad_v[:end] += (weights.to(dtype).mT @ g[own]).to(sums)
    return [x.double() for x in results]


@pytest.mark.parametrize("skips", [True, False])
def test_65536_tokens_are_as_exact_as_the_plain_formula(skips: bool, long: dict[str, Any]) -> None:
    leaves = [x.clone().requires_grad_() for x in long["inputs"]]
    with Calls() as calls:
        out = attend(*leaves, dataclasses.replace(long["context"], skips=skips, _made={}))
    found = [out, *torch.autograd.grad(out, leaves, long["grad"])]
    for head in range(2):
        results = ([x[:, :, head] for x in result] for result in (found, long["plain"], long["truth"]))
        assert_as_exact(*results)
    first_visited = calls.results["attention"][2][0, 0, -1].item()
    assert first_visited > LONG - 2000 if skips else first_visited <= 10_000


def test_no_kernel_is_compiled_twice_for_other_lengths_and_batches() -> None:
    from mptfoundry.mpt.attention_kernels import backward_key_kernel, backward_query_kernel, forward_kernel

    def step(batch: int, seq: int, past: int) -> None:
        fused = torch.randn(batch, past + seq, 3, 16, 64, device="cuda", dtype=torch.bfloat16)
        query, key, value = (x.requires_grad_() for x in fused.unbind(2))
        documents = torch.zeros(batch, past + seq, dtype=torch.int64, device="cuda")
        context = AttentionContext(0.125, alibi_slopes(16, 8, "cuda"), documents)
        attend(query[:, past:], key, value, context).float().sum().backward()

    def count() -> int:
        kernels = (forward_kernel, backward_query_kernel, backward_key_kernel)
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    step(2, 512, 0)
    before = count()
    for sizes in ((1, 512, 0), (3, 500, 0), (2, 17, 1), (2, 1, 100)):
        step(*sizes)
    assert count() == before
