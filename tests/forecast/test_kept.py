"""What autograd keeps, counted tensor by tensor, is what the plan says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mptfoundry.config.optim import DecoupledLionWConfig
from mptfoundry.config.parallel import recomputed_parts
from mptfoundry.models.activation_checkpointing import checkpoint_activations
from mptfoundry.mpt.config import AttnConfig, FFNConfig, MPTConfig
from mptfoundry.mpt.flops import attention_activations, block_activations, count_parameters, ffn_activations
from mptfoundry.mpt.network import MPT
from mptfoundry.optim.lion import DecoupledLionW
from mptfoundry.plan.memory import FP32, state_bytes

INT64 = 8
# Mean and inverse deviation of a norm's rows.
NORM_STATISTICS = 2
BATCH, LENGTH = 2, 32
SMALL: dict[str, Any] = {"d_model": 48, "n_heads": 3, "max_seq_len": LENGTH, "vocab_size": 97}
MODELS: dict[str, dict[str, Any]] = {
    "alibi": {"attn_config": AttnConfig(alibi=True), "no_bias": True},
    "learned positions": {},
    "gated": {"ffn_config": FFNConfig(ffn_type="mptglu")},
    "clipped": {"attn_config": AttnConfig(alibi=True, clip_qkv=6)},
}


def kept_bytes(
    network: MPTConfig, tokens: int, recomputed: Mapping[str, frozenset[int]] | None = None
) -> int:
    """Bytes that a forward over so many tokens keeps, its weights not included, from the plan's parts.

    In float32 on a CPU with the `torch` backend and layernorms, with ALiBi or learned positions; the plan
    leaves out the statistics of norms and attention.

    Args:
        network: The architecture.
        tokens: Tokens of the microbatch.
        recomputed: The blocks of each part that backward computes again: `recomputed_parts` of the config.
    """
    statistics = 2 * NORM_STATISTICS
    block = FP32 * (block_activations(network) + statistics + network.n_heads)
    saved = {
        "block": block - FP32 * network.d_model,
        "attention": FP32 * (attention_activations(network) + network.n_heads),
        "mlp": FP32 * ffn_activations(network),
        "norm": FP32 * 2 * network.d_model,  # the outputs
    }
    # The ids, the last norm's input and statistics, and the count of the tokens in the loss.
    around = INT64 + FP32 * (network.d_model + NORM_STATISTICS)
    if network.has_learned_positions:
        around += FP32
    per_token = network.n_layers * block + around
    per_token -= sum(saved[part] * len(blocks) for part, blocks in (recomputed or {}).items())
    return tokens * per_token + INT64


def counted(network: MPT) -> int:
    """Bytes of all tensors that a forward saves, without weights, each storage once."""
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    weights = {each.untyped_storage().data_ptr() for each in network.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(ids, labels=ids).loss
    del loss
    return sum(saved.values())


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_every_kept_byte_is_foretold(model: str, n_layers: int) -> None:
    config = MPTConfig(n_layers=n_layers, **{**SMALL, **MODELS[model]})
    assert counted(MPT(config, seed=0).train()) == kept_bytes(config, BATCH * LENGTH)


@pytest.mark.parametrize("target", ["block", "attention", "mlp", ("attention", "mlp"), {"block": "first-2"}])
def test_every_byte_that_is_recomputed_is_not_kept(target: Any) -> None:
    """Norms keep their tensors behind hooks of their own, which hide them from those of this test."""
    config = MPTConfig(n_layers=3, **SMALL, attn_config=AttnConfig(alibi=True))
    parts = recomputed_parts(target, 3)
    network = MPT(config, seed=0).train()
    checkpoint_activations(network, parts)
    assert counted(network) == kept_bytes(config, BATCH * LENGTH, parts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_and_the_optimizers_state_are_counted_exactly(
    dtype: Literal["float32", "bfloat16", "int8"],
) -> None:
    config = MPTConfig(n_layers=2, **SMALL | ({"d_model": 192} if dtype == "int8" else {}))
    network = MPT(config, seed=0)
    assert sum(each.nbytes for each in network.parameters()) == FP32 * count_parameters(config)
    optimizer = DecoupledLionW(network.parameters(), lr=0.1, momentum_dtype=getattr(torch, dtype))
    for each in network.parameters():
        each.grad = torch.zeros_like(each)
    optimizer.step()
    state = sum(value.nbytes for each in optimizer.state.values() for value in each.values())
    estimated = state_bytes(DecoupledLionWConfig(lr=0.1, momentum_dtype=dtype), count_parameters(config))
    # Vectors have a float32 momentum.
    vectors = sum(each.numel() for each in network.parameters() if each.ndim < 2) if dtype == "int8" else 0
    assert state == estimated + int(vectors * (3 - 4 / 64))
