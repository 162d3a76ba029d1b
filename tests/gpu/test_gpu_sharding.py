"""What only a GPU can show of sharding and of recomputed activations; run by `make gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mptfoundry.config.load import load_train_config
from mptfoundry.models.activation_checkpointing import checkpoint_activations
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.train import train
from tests.conftest import losses

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; `make gpu` runs it where there is one"
)
PLAIN = ("model.resid_pdrop=0", "model.d_model=64", "precision=fp32", "max_duration=4ba")
RECOMPUTED = "activation_checkpointing: true, activation_cpu_offload: true"
# One device is sharded only for checkpoints in shards.
SHARDED = {
    "plain": "{activation_checkpointing: true, state_dict_type: sharded}",
    "gathered ahead": f"{{forward_prefetch: true, backward_prefetch_limit: 2, {RECOMPUTED}, "
    "state_dict_type: sharded}",
    "kept after forward": "{sharding_strategy: SHARD_GRAD_OP, state_dict_type: sharded}",
}


@pytest.fixture
def plain(tiny_run: Path, tmp_path: Path) -> list[float]:
    train(load_train_config(tiny_run, ["run_name=plain", *PLAIN])[0])
    return losses(tmp_path / "plain")


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_run_has_the_losses_of_a_plain_one(
    name: str, plain: list[float], tiny_run: Path, tmp_path: Path
) -> None:
    train(load_train_config(tiny_run, ["run_name=sharded", *PLAIN, f"fsdp_config={SHARDED[name]}"])[0])
    assert losses(tmp_path / "sharded") == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("mixed", ["DEFAULT", "PURE", "FULL"])
def test_mixed_precision_trains(mixed: str, tiny_run: Path, tmp_path: Path) -> None:
    words = [
        f"fsdp_config={{mixed_precision: {mixed}, state_dict_type: sharded}}",
        f"run_name={mixed}",
    ]
    train(load_train_config(tiny_run, [*PLAIN, *words, "precision=amp_bf16"])[0])
    found = losses(tmp_path / mixed)
    assert found[-1] < found[0]


def peak(parts: str | None, offload: bool = False) -> tuple[int, torch.Tensor]:
    """The most bytes of a step, and a gradient."""
    config = MPTConfig(
        d_model=512,
        n_heads=8,
        n_layers=8,
        max_seq_len=2048,
        vocab_size=1024,
        no_bias=True,
        resid_pdrop=0.1,
        attn_config=AttnConfig(alibi=True),
    )
    network = MPT(config, seed=0).cuda().train()
    if parts:
        checkpoint_activations(network, {parts: range(8)}, offload=offload)
    ids = torch.randint(1024, (4, 2048), generator=torch.Generator().manual_seed(0)).cuda()
    torch.manual_seed(1)
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = network(ids, labels=ids).loss
    loss.backward()
    return torch.cuda.max_memory_allocated(), network.transformer.blocks[0].attn.Wqkv.weight.grad


def test_recomputing_and_offloading_take_less_memory_and_give_the_same_gradient() -> None:
    everything, gradient = peak(None)
    attention, _ = peak("attention")
    blocks, again = peak("block")
    offloaded, once_more = peak("block", offload=True)
    assert everything > attention > blocks > offloaded
    for found in (again, once_more):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())
