"""What only a GPU can show; run by `make gpu`."""

from __future__ import annotations

import math

import pytest
import torch

from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; `make gpu` runs it where there is one"
)


def small_network(**attention: object) -> MPT:
    config = MPTConfig(
        d_model=256,
        n_heads=4,
        n_layers=2,
        max_seq_len=512,
        vocab_size=1024,
        no_bias=True,
        attn_config=AttnConfig(alibi=True, **attention),  # type: ignore[arg-type]
    )
    return MPT(config, seed=1)


def rows(count: int = 4, seq_len: int = 512) -> torch.Tensor:
    return torch.randint(1024, (count, seq_len), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attention", [{}, {"sliding_window_size": 64}, {"attn_logit_softcapping": 20.0}])
def test_loss_and_gradients_on_the_gpu_equal_the_cpus(attention: dict[str, object]) -> None:
    ids = rows()
    exact, network = small_network(**attention).double().train(), small_network(**attention).cuda().train()
    plain = small_network(**attention).train()
    for model, device in ((exact, "cpu"), (network, "cuda"), (plain, "cpu")):
        model(ids.to(device), labels=ids.to(device)).loss.backward()
    truth = exact.transformer.blocks[0].attn.Wqkv.weight.grad
    distance = (network.transformer.blocks[0].attn.Wqkv.weight.grad.cpu().double() - truth).norm()
    rounding = (plain.transformer.blocks[0].attn.Wqkv.weight.grad.double() - truth).norm()
    assert distance <= 2 * rounding + 1e-6 * truth.norm()


def test_a_bf16_training_step_lowers_the_loss() -> None:
    network, ids = small_network().cuda().train(), rows().cuda()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = network(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0]
