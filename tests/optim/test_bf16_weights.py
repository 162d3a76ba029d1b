"""Copies of the matrices in bfloat16 change no number of training under autocast."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from composer.optim import DecoupledAdamW

from mptfoundry.models.activation_checkpointing import checkpoint_activations
from mptfoundry.mpt.config import AttnConfig, FFNConfig, MPTConfig
from mptfoundry.mpt.linear import Linear
from mptfoundry.mpt.network import MPT
from mptfoundry.optim import adamw_fused, lion_fused
from mptfoundry.optim.bf16_weights import use_bf16_weights
from mptfoundry.optim.gradients import clamp, global_norm, scale_for_norm, scale_to_norm
from mptfoundry.optim.lion import DecoupledLionW

needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch has no Tensor.grad_dtype"
)
LION = {"lr": 1e-2, "weight_decay": 1e-3}
ADAMW = {"lr": 1e-2, "weight_decay": 1e-3, "eps": 1e-6}


def network(seed: int = 1, **keys: Any) -> MPT:
    attention = AttnConfig(alibi=True, attn_impl="torch")
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 8, "vocab_size": 64}
    return MPT(MPTConfig(**(sizes | keys), attn_config=attention), seed=seed).train()


def loss_of(net: MPT, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net(ids, labels=ids).loss
    assert loss is not None
    return loss


def batches(microbatches: int, steps: int = 3) -> Iterator[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        yield torch.randint(64, (2 * microbatches, 8), generator=generator).split(2)


def train(
    net: MPT, optimizer: Any, microbatches: int = 1, clipping: str | None = None, steps: int = 3
) -> list[torch.Tensor]:
    """Some steps; returns weights, the optimizer's state and the gradients' norms."""
    norms = []
    for step in batches(microbatches, steps):
        for ids in step:
            (loss_of(net, ids) / microbatches).backward()
        gradients = [each.grad for each in net.parameters() if each.grad is not None]
        norms.append(global_norm(gradients))
        if clipping == "value":
            clamp(net.parameters(), 1e-3)
        elif clipping == "norm" and hasattr(optimizer, "gradient_scale"):
            optimizer.gradient_scale = scale_for_norm(norms[-1], 0.1)
        elif clipping == "norm":
            scale_to_norm(gradients, norms[-1], 0.1)
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()["state"].values()
    values = [value for each in state for value in each.values() if isinstance(value, torch.Tensor)]
    return [*(each.detach() for each in net.parameters()), *values, *norms]


def both_ways(
    kind: Any, options: dict[str, Any], bf16_gradients: bool = False, recomputed: str = "", **how: Any
) -> None:
    """Train a network plainly and with copies, and compare everything bit for bit."""
    keys = {key: how.pop(key) for key in list(how) if key not in ("microbatches", "clipping")}
    results = []
    for has_copies in (False, True):
        net = network(**keys)
        if recomputed:
            checkpoint_activations(net, {recomputed: range(2)})
        optimizer = kind(net.parameters(), **options)
        if has_copies:
            use_bf16_weights(net, optimizer, bf16_gradients=bf16_gradients)
        results.append(train(net, optimizer, **how))
    assert all(torch.equal(plain, ours) for plain, ours in zip(*results, strict=True))


@pytest.mark.parametrize(("kind", "options", "clipping", "microbatches"), [
    (DecoupledLionW, LION, None, 1),
    (DecoupledLionW, LION, "norm", 2),
    (DecoupledLionW, LION, "value", 3),
    (DecoupledAdamW, ADAMW, "norm", 1),
    (DecoupledAdamW, ADAMW, "value", 2),
    (adamw_fused.DecoupledAdamW, ADAMW, "norm", 2),
])  # fmt: skip
def test_training_is_bit_for_bit_that_of_autocast(
    kind: Any, options: dict[str, Any], clipping: str | None, microbatches: int
) -> None:
    both_ways(kind, options, clipping=clipping, microbatches=microbatches)


@pytest.mark.parametrize("keys", [
    {"tie_word_embeddings": False, "norm_type": "layernorm"},
    {"no_bias": False, "ffn_config": FFNConfig(ffn_type="mptglu")},
    {"recomputed": "block"},
    {"recomputed": "norm"},
])  # fmt: skip
def test_so_is_that_of_other_networks(keys: dict[str, Any]) -> None:
    both_ways(DecoupledLionW, LION, microbatches=2, **keys)


@needs_grad_dtype
@pytest.mark.parametrize(("kind", "options", "microbatches", "keys"), [
    (DecoupledLionW, LION, 1, {}),
    (DecoupledLionW, LION, 2, {"tie_word_embeddings": False}),
    (DecoupledLionW, LION, 3, {"recomputed": "block"}),
    (DecoupledAdamW, ADAMW, 1, {"recomputed": "mlp"}),
])  # fmt: skip
def test_gradients_may_stay_in_bfloat16(
    kind: Any, options: dict[str, Any], microbatches: int, keys: dict[str, Any]
) -> None:
    both_ways(kind, options, bf16_gradients=True, microbatches=microbatches, **keys)


@needs_grad_dtype
@pytest.mark.skipif(torch.cuda.is_available(), reason="the network is on the CPU, and Triton's kernel is not")
@pytest.mark.usefixtures("rounds_as_a_gpu")
def test_a_fused_lion_writes_the_copies_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    results, copied = [], []
    copy_all = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists: copied.append(lists) or copy_all(*lists))
    for has_copies in (False, True):
        net = network(n_layers=1)
        optimizer = lion_fused.DecoupledLionW(net.parameters(), **LION)
        if has_copies:
            use_bf16_weights(net, optimizer, bf16_gradients=True)
        results.append(train(net, optimizer, steps=2, clipping="norm"))
    assert all(torch.equal(plain, ours) for plain, ours in zip(*results, strict=True))
    assert len(copied) == 1  # before the first step
    layers = [layer for layer in net.modules() if isinstance(layer, Linear)]
    assert len(layers) == 4
    assert all(torch.equal(layer.compute_weight, layer.weight.bfloat16()) for layer in layers)


@needs_grad_dtype
@pytest.mark.parametrize(("microbatches", "dtype"), [(1, torch.bfloat16), (2, torch.float32)])
def test_only_the_gradient_of_a_single_microbatch_is_bfloat16(microbatches: int, dtype: torch.dtype) -> None:
    net = network()
    use_bf16_weights(net, DecoupledLionW(net.parameters(), **LION), bf16_gradients=True)
    for ids in next(batches(microbatches)):
        loss_of(net, ids).backward()
    layers = {f"{name}.weight" for name, layer in net.named_modules() if isinstance(layer, Linear)}
    for name, parameter in net.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == (
            dtype if name in layers else torch.float32
        )


def test_copies_follow_weights_that_something_else_changes() -> None:
    ids = torch.arange(8)[None]
    net, other = network(), network(seed=2)
    use_bf16_weights(net, DecoupledLionW(net.parameters(), **LION), bf16_gradients=False)
    loss_of(net, ids).backward()
    net.load_state_dict(other.state_dict())
    assert torch.equal(loss_of(net, ids), loss_of(other, ids))
    layer = net.transformer.blocks[0].ffn.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight))
    other.transformer.blocks[0].ffn.up_proj.weight.data.zero_()
    assert torch.equal(loss_of(net, ids), loss_of(other, ids))


def test_without_autocast_the_weights_themselves_are_used() -> None:
    ids, net, plain = torch.arange(8)[None], network(), network()
    use_bf16_weights(net, DecoupledLionW(net.parameters(), **LION), bf16_gradients=False)
    loss_of(net, ids)
    assert torch.equal(net(ids).logits, plain(ids).logits)
    assert net.state_dict().keys() == plain.state_dict().keys()
    twin = copy.deepcopy(net)
    assert torch.equal(loss_of(twin, ids), loss_of(plain, ids))


def test_a_first_evaluation_without_gradients_leaves_copies_that_train() -> None:
    net = network()
    use_bf16_weights(net, DecoupledLionW(net.parameters(), **LION), bf16_gradients=False)
    with torch.inference_mode():
        loss_of(net, torch.zeros(1, 8, dtype=torch.int64))
    loss_of(net, torch.zeros(1, 8, dtype=torch.int64)).backward()
    assert net.transformer.blocks[1].ffn.down_proj.weight.grad is not None


def test_frozen_matrices_have_copies_and_no_gradients() -> None:
    net = network()
    frozen = net.transformer.blocks[0].attn.Wqkv
    frozen.weight.requires_grad_(False)
    use_bf16_weights(net, DecoupledLionW(net.parameters(), **LION), bf16_gradients=False)
    loss_of(net, torch.zeros(1, 8, dtype=torch.int64)).backward()
    assert frozen.weight.grad is None and not frozen.compute_weight.requires_grad


def test_a_network_is_freed_with_its_copies() -> None:
    net = network()
    use_bf16_weights(net, DecoupledLionW(net.parameters(), **LION), bf16_gradients=False)
    loss_of(net, torch.zeros(1, 8, dtype=torch.int64)).backward()
    gone = weakref.ref(net.transformer.blocks[0].ffn.up_proj.compute_weight)
    del net
    gc.collect()
    assert gone() is None
