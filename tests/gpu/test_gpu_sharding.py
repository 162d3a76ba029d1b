"""What only a GPU can show of sharding and of recomputed activations; run by `make gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mptfoundry.config.load import load_train_config
from mptfoundry.models.activation_checkpointing import Recomputation, recompute
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.train import train
from tests.conftest import losses

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; `make gpu` runs it where there is one"
)
PLAIN = ("model.resid_pdrop=0", "model.d_model=64", "precision=fp32", "max_duration=4ba")
RECOMPUTED = "activation_checkpointing: true, activation_cpu_offload: true"
SHARDED = {
    "version 1": "{version: 1, activation_checkpointing: true}",
    "version 1, gathered ahead": f"{{version: 1, forward_prefetch: true, {RECOMPUTED}}}",
    "version 2": "{version: 2}",
    "version 2, gathered ahead": "{version: 2, forward_prefetch: true, backward_prefetch_limit: 2, "
    f"{RECOMPUTED}}}",
    "version 2, kept after forward": "{sharding_strategy: SHARD_GRAD_OP, state_dict_type: sharded}",
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


def test_mixed_precision_trains_through_both_versions(tiny_run: Path, tmp_path: Path) -> None:
    for version in (1, 2):
        for mixed in ("DEFAULT", "PURE", "FULL"):
            name = f"{mixed}-{version}"
            words = [f"fsdp_config={{version: {version}, mixed_precision: {mixed}}}", f"run_name={name}"]
            train(load_train_config(tiny_run, [*PLAIN, *words, "precision=amp_bf16"])[0])
            found = losses(tmp_path / name)
            assert found[-1] < found[0]


def peak(parts: str | None, how: Recomputation) -> tuple[int, torch.Tensor]:
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
        recompute(network, {parts: range(8)}, how)
    ids = torch.randint(1024, (4, 2048), generator=torch.Generator().manual_seed(0)).cuda()
    torch.manual_seed(1)
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = network(ids, labels=ids).loss
    loss.backward()
    return torch.cuda.max_memory_allocated(), network.transformer.blocks[0].attn.Wqkv.weight.grad


def test_recomputing_and_offloading_take_less_memory_and_give_the_same_gradient() -> None:
    everything, gradient = peak(None, Recomputation())
    attention, _ = peak("attention", Recomputation())
    blocks, again = peak("block", Recomputation())
    offloaded, once_more = peak("block", Recomputation(offloads=True))
    assert everything > attention > blocks > offloaded
    for found in (again, once_more):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())
