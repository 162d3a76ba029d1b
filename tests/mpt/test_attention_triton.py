"""The operator of the Triton kernels as PyTorch sees it, and networks and a training that run on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from mptfoundry.mpt import attention_triton
from mptfoundry.mpt.attention_triton import attend, attend_joined
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.network import KVCache

from .cases import DEVICE, SMALL_TILES, Calls, Case, make_case, on_device, use_tiles

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("triton_runs")]

OPERATORS = getattr(torch.ops, attention_triton._NAMESPACE)
MIX: dict[str, Any] = {
    "seq": 20,
    "bias_max": 8,
    "n_heads": 2,
    "kv_heads": 1,
    "documents": ((16,), (3, 7)),
    "softcap": 5.0,
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, SMALL_TILES[1])


def leaves_of(case: Case) -> list[torch.Tensor]:
    return [x.to(DEVICE).requires_grad_() for x in case[0]]


def learn(case: Case, function: Callable[..., torch.Tensor] = attend) -> list[torch.Tensor]:
    """The output and the gradients of queries, keys and values."""
    leaves = leaves_of(case)
    out = function(*leaves, on_device(case[2]))
    return [out.detach(), *torch.autograd.grad(out, leaves, case[1].to(DEVICE))]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_the_operators_are_what_pytorch_takes_them_for() -> None:
    case = make_case(**{**MIX, "seq": 9}, dropout=0.2)
    with Calls() as calls:
        learn(case)
        with torch.no_grad():
            attend(*leaves_of(case), dataclasses.replace(on_device(case[2]), cache=object(), dropout=0.0))
    for name in ("attention", "attention_backward", "decode"):
        arguments = tree_map_only(torch.Tensor, torch.Tensor.detach, list(calls.arguments[name]))
        if name == "attention":
            arguments[0] = [x.requires_grad_() for x in arguments[0]]
        torch.library.opcheck(getattr(OPERATORS, name).default, tuple(arguments))


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.soak), 0.3])
def test_compiled_it_is_one_node_in_each_direction(dropout: float) -> None:
    case, recorded = make_case(**MIX, dropout=dropout), AotEagerAndRecordGraphs()
    compiled = torch.compile(attend, fullgraph=True, backend=recorded)
    torch.manual_seed(3)
    eager = learn(case)
    torch.manual_seed(3)
    assert equal(learn(case, compiled), eager)
    (forward,), (backward,) = recorded.fw_graphs, recorded.bw_graphs
    assert _ours(forward) == [OPERATORS.attention.default]
    assert _ours(backward) == [OPERATORS.attention_backward.default]


def _ours(graph: torch.fx.GraphModule) -> list[Any]:
    namespace = attention_triton._NAMESPACE
    return [node.target for node in graph.graph.nodes if getattr(node.target, "namespace", "") == namespace]


def test_flops_are_counted_as_pytorch_counts_its_own_attention() -> None:
    case = make_case(past=12, **MIX)
    with FlopCounterMode(display=False) as counter:
        leaves = leaves_of(case)
        out = attend(*leaves, on_device(case[2]))
        forward = counter.get_total_flops()
        out.backward(case[1].to(DEVICE))
    assert forward == 4 * 2 * 2 * 20 * 32 * 16
    assert counter.get_total_flops() - forward == 10 * 2 * 2 * 20 * 32 * 16


@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpointing_policy_can_save_it_or_compute_it_anew(saved: bool) -> None:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        mine = operator == OPERATORS.attention.default and saved
        return CheckpointPolicy.MUST_SAVE if mine else CheckpointPolicy.PREFER_RECOMPUTE

    options = {"context_fn": partial(create_selective_checkpoint_contexts, policy), "use_reentrant": False}
    case = make_case(**MIX, dropout=0.3)
    torch.manual_seed(3)
    plain = learn(case)
    torch.manual_seed(3)
    with Calls() as calls:
        again = learn(case, lambda *x: checkpoint(attend, *x, **options))
    assert equal(again, plain)
    assert calls.names.count("attention") == (1 if saved else 2)


def test_gradients_are_the_same_every_time() -> None:
    case = make_case(**MIX)
    assert equal(learn(case), learn(case))


def test_dropout_follows_pytorchs_seed() -> None:
    case = make_case(**MIX, dropout=0.3)
    torch.manual_seed(3)
    first, second = learn(case), learn(case)
    torch.manual_seed(3)
    assert equal(first, learn(case)) and not torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    "storage",
    [
        pytest.param("one fused matrix", marks=pytest.mark.soak),
        pytest.param("a cache", marks=pytest.mark.soak),
        "columns that lie apart",
    ],
)
def test_inputs_are_read_where_they_lie(storage: str) -> None:
    case = make_case(**{**MIX, "n_heads": 4, "kv_heads": 2})
    inputs, context = [x.to(DEVICE) for x in case[0]], on_device(case[2])
    expected = attend(*inputs, context)
    if storage == "one fused matrix":
        views = list(torch.cat(inputs, dim=2).split([4, 2, 2], dim=2))
    elif storage == "a cache":
        config = MPTConfig(n_heads=2, n_layers=1, head_dim=16)
        cache = KVCache(config, 2, 50, device=DEVICE, dtype=torch.float32)
        views = [inputs[0], *cache.append(0, *inputs[1:])]
    else:
        views = [torch.stack([x, x], dim=-1)[..., 0] for x in inputs]
    assert not any(x.is_contiguous() for x in views[1:])
    with Calls() as calls:
        assert torch.equal(attend(*views, context), expected)
    copies = calls.names.count("clone")
    assert copies == (3 if storage == "columns that lie apart" else 0)
    leaves = [x.detach().requires_grad_() for x in views]
    grad = case[1].to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)
    found = torch.autograd.grad(attend(*leaves, context), leaves, grad)
    assert equal(list(found), learn(case)[1:])


def test_a_fused_projection_gets_one_gradient() -> None:
    case = make_case(**{**MIX, "n_heads": 4, "kv_heads": 2}, dropout=0.3)
    context = on_device(case[2])
    torch.manual_seed(3)
    expected = learn(case)
    joined = torch.cat([x.to(DEVICE) for x in case[0]], dim=2).requires_grad_()
    torch.manual_seed(3)
    out = attend_joined(joined, 4, context)
    with Calls() as calls:
        (grad,) = torch.autograd.grad(out, joined, case[1].to(DEVICE))
    assert equal([out.detach(), *grad.split([4, 2, 2], dim=2)], expected)
    assert set(calls.names) == {"attention_backward", "detach"}


def test_a_gradient_of_its_gradient_is_refused() -> None:
    leaves = leaves_of(make_case(seq=5))
    out = attend(*leaves, make_case(seq=5)[2])
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()
