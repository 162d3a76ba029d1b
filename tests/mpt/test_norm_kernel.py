"""The kernels that add to the residual stream and normalise it, against the plain formula by the house rule.

They run on a GPU, or without one by Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mptfoundry.mpt.block import Block
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.mpt.norm import Norm

from .cases import DEVICE
from .reference import assert_as_exact

pytestmark = pytest.mark.usefixtures("triton_runs")


def norm_of(norm_type: Any, width: int, no_bias: bool) -> Norm:
    config = MPTConfig(d_model=width, n_heads=1, n_layers=1, norm_type=norm_type, no_bias=no_bias)
    made = Norm(width, config, "cpu")
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return made.to(DEVICE)


def results(made: Norm, dtype: torch.dtype, has_delta: bool, *, fused: bool) -> list[torch.Tensor]:
    """The sum, its norm, and the gradients of x, delta, weight and bias, of inputs in bfloat16's numbers."""
    generator = torch.Generator().manual_seed(0)
    width = made.weight.shape[0]

    def draw(size: float = 1.0) -> torch.Tensor:
        return (size * torch.randn(3, 5, width, generator=generator)).bfloat16().to(DEVICE, dtype)

    x, delta = draw(2.0).requires_grad_(), draw().requires_grad_() if has_delta else None
    grads = draw(), draw()
    made = made.to(dtype) if dtype == torch.float64 else made
    made.zero_grad()
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        if fused:
            assert made.fuses(x)
            outs = made.add(x, delta)
        else:
            # The sum is rounded as the stream is, and its gradient isn't.
            total = x if delta is None else x + delta
            rounded = total + (total.bfloat16().to(total.dtype) - total).detach() if HALF else total
            outs = rounded, made(rounded)
    torch.autograd.backward(outs, grads)
    leaves = [each.grad for each in (x, delta, *made.parameters()) if each is not None]
    return [each.detach().clone() for each in (*outs, *leaves) if each is not None]


HALF = False


@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize("no_bias", [True, False])
@pytest.mark.parametrize("norm_type", ["low_precision_layernorm", "low_precision_rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_norms_and_gradients_are_as_near_the_truth_as_the_formula(
    dtype: torch.dtype, norm_type: str, no_bias: bool, has_delta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "HALF", dtype == torch.bfloat16)
    width = 96
    plain = results(norm_of(norm_type, width, no_bias), dtype, has_delta, fused=False)
    ours = results(norm_of(norm_type, width, no_bias), dtype, has_delta, fused=True)
    made = norm_of(norm_type, width, no_bias)
    if dtype == torch.bfloat16:  # its weights are read in that dtype
        for parameter in made.parameters():
            parameter.data = parameter.data.bfloat16().float()
    truth = results(made, torch.float64, has_delta, fused=False)
    assert [each.dtype for each in ours] == [each.dtype for each in plain]
    assert_as_exact(ours, plain, truth)


def test_rows_may_lie_apart() -> None:
    made, x = norm_of("low_precision_layernorm", 16, True), torch.randn(2, 3, 16, device=DEVICE)
    total, out = made.add(x[:, 1:2], x[:, 2:])
    torch.testing.assert_close(total, x[:, 1:2] + x[:, 2:])
    torch.testing.assert_close(out, made(total))


@pytest.mark.parametrize("norm_type", ["low_precision_layernorm", "low_precision_rmsnorm"])
def test_a_networks_loss_and_gradients_are_the_plain_blocks(
    norm_type: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MPTConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=61, max_seq_len=8, norm_type=norm_type)
    ids = torch.arange(16, device=DEVICE).view(2, 8)
    results = []
    for forward in (Block.forward, Block._forward_fused):
        monkeypatch.setattr(Block, "forward", forward)
        network = MPT(config, seed=0, device=DEVICE).train()
        loss = network(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in network.parameters())])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def test_a_norm_that_does_more_is_not_fused() -> None:
    made, x = norm_of("low_precision_layernorm", 16, True), torch.zeros(1, 16, device=DEVICE)
    assert made.fuses(x) and not norm_of("low_precision_layernorm", 16, True).to("meta").fuses(x)
    assert not norm_of("low_precision_layernorm", 2**14, True).fuses(torch.zeros(1, 2**14, device=DEVICE))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert made.fuses(x.bfloat16()) and not made.fuses(x)
        assert not norm_of("layernorm", 16, True).fuses(x.bfloat16())
    made.register_forward_hook(lambda *args: None)
    assert not made.fuses(x)
