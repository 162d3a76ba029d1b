"""The kernel of the loss against the plain formula, by the house rule, and the loss that is computed with it.

It runs on a GPU, or without one by Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mptfoundry.mpt import loss as loss_module
from mptfoundry.mpt.loss import IGNORED, linear_cross_entropy

from .cases import DEVICE
from .reference import assert_as_exact, with_gradients

pytestmark = pytest.mark.usefixtures("triton_runs")


def logits_of(rows: int, vocab: int, dtype: torch.dtype, size: float = 3.0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    logits = (size * torch.randn(rows, vocab, generator=generator)).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[::4] = IGNORED
    return logits, targets


def by_kernel(logits: torch.Tensor, targets: torch.Tensor, softcap: float | None = None) -> list[Any]:
    from mptfoundry.mpt.loss_kernel import cross_entropy

    gradient = logits.clone().to(DEVICE)
    losses = cross_entropy(gradient, targets.to(DEVICE), IGNORED, softcap or 0.0)
    return [losses.cpu(), gradient.cpu()]


def by_formula(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, dtype: torch.dtype
) -> list[Any]:
    """In ``dtype``; the gradient is rounded to the logits' own where that is narrower."""

    def losses_of(x: torch.Tensor) -> torch.Tensor:
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        return F.cross_entropy(x, targets, ignore_index=IGNORED, reduction="none")

    losses, gradient = with_gradients(losses_of, [logits], torch.ones(len(targets)), dtype)
    return [losses, gradient if dtype == torch.float64 else gradient.to(logits.dtype)]


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(9, 61), (5, 4096), (3, 50_432)])
def test_losses_and_gradients_are_as_near_the_truth_as_the_formula(
    rows: int, vocab: int, dtype: torch.dtype, softcap: float | None
) -> None:
    logits, targets = logits_of(rows, vocab, dtype)
    ours = by_kernel(logits, targets, softcap)
    plain = by_formula(logits, targets, softcap, torch.float32)
    assert_as_exact(ours, plain, by_formula(logits, targets, softcap, torch.float64))
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    assert not ours[0][::4].any() and not ours[1][::4].any()


@pytest.mark.filterwarnings("ignore:overflow")
def test_large_logits_neither_overflow_nor_vanish() -> None:
    logits = torch.tensor([[500.0, -500.0, 0.0], [3e38, 3e38, -3e38], [-1e4, -1e4, -2e4]])
    losses, gradient = by_kernel(logits, torch.tensor([1, 0, 2]))
    truth, slope = by_formula(logits, torch.tensor([1, 0, 2]), None, torch.float64)
    torch.testing.assert_close(losses, truth.float())
    torch.testing.assert_close(gradient, slope.float())


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_a_number_or_not_in_the_vocabulary_is_seen() -> None:
    logits = torch.zeros(4, 5)
    logits[0, 3], logits[1, 3] = float("nan"), float("inf")
    losses, gradient = by_kernel(logits, torch.tensor([1, 1, 5, 2]))
    assert losses.isnan().tolist() == gradient.isnan().any(1).tolist() == [True, True, True, False]


def fused(monkeypatch: pytest.MonkeyPatch, chunks: int, size: int) -> None:
    """The kernel runs wherever the interpreter can, and a case of ``size`` bytes has so many chunks."""
    monkeypatch.setattr(loss_module, "_has_kernel", lambda matrix: True)
    monkeypatch.setattr(loss_module, "_losses_and_grads", loss_module._fused_losses_and_grads)
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", -(-size // chunks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [1, 3])
def test_the_loss_of_a_projection_is_as_near_the_truth_as_the_plain_one(
    chunks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 24, generator=generator) for n in (50, 61))
    targets = torch.randint(0, 61, (50,), generator=generator)
    targets[::7] = IGNORED

    def losses_of(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        is_half = dtype == torch.bfloat16 and h.dtype == torch.float32
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=is_half):
            return linear_cross_entropy(h, w, targets.to(DEVICE), 6.0)[0]

    inputs = [hidden.to(DEVICE), weight.to(DEVICE)]
    truth = with_gradients(losses_of, inputs, torch.tensor(0.37, device=DEVICE), torch.float64)
    plain = with_gradients(losses_of, inputs, torch.tensor(0.37, device=DEVICE), torch.float32)
    fused(monkeypatch, chunks, 50 * 61 * dtype.itemsize)
    ours = with_gradients(losses_of, inputs, torch.tensor(0.37, device=DEVICE), torch.float32)
    torch.testing.assert_close(ours[0], plain[0])
    assert_as_exact(ours[1:], plain[1:], truth[1:])


def test_a_frozen_matrix_and_tokens_that_are_not_in_the_loss_get_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden = torch.randn(6, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(9, 4, device=DEVICE)
    fused(monkeypatch, 2, 6 * 9 * 4)
    nothing = torch.full((6,), IGNORED, device=DEVICE)
    loss, losses, _ = linear_cross_entropy(hidden, weight, nothing)
    loss.backward()
    assert loss == 0 and not losses.any() and weight.grad is None
    assert hidden.grad is not None and not hidden.grad.any()
