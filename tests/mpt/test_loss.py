from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mptfoundry.mpt import loss as loss_module
from mptfoundry.mpt.loss import linear_cross_entropy

from .reference import assert_as_exact, rounding, with_gradients


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets)


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 24, generator=generator)
    weight = torch.randn(61, 24, generator=generator)
    targets = torch.randint(0, 61, (50,), generator=generator)
    targets[::7] = -100
    return hidden, weight, targets


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module._CHUNK_LOGITS, "cpu", 17 * 61)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_value_and_gradients_are_those_of_cross_entropy(softcap: float | None) -> None:
    hidden, weight, targets = case()
    grad = torch.tensor(0.37)
    truth = with_gradients(lambda h, w: plain(h, w, targets, softcap), (hidden, weight), grad, torch.float64)
    yardstick = with_gradients(
        lambda h, w: plain(h, w, targets, softcap), (hidden, weight), grad, torch.float32
    )

    def fused(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, w, targets, softcap)[0]

    fast = with_gradients(fused, (hidden, weight), grad, torch.float32)
    # One number is no average: the mean has the rounding of its sum and of its quotient.
    assert abs(fast[0] - truth[0]) <= 2 * rounding(truth[0].item(), torch.float32)
    assert_as_exact(fast[1:], yardstick[1:], truth[1:])
    exact = with_gradients(fused, (hidden, weight), grad, torch.float64)
    for some, true in zip(exact[1:], truth[1:], strict=True):
        torch.testing.assert_close(some, true)


@pytest.mark.parametrize("with_grad", [True, False])
def test_each_token_has_its_loss(with_grad: bool) -> None:
    hidden, weight, targets = case()
    with torch.set_grad_enabled(with_grad):
        mean, losses, _ = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    expected = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
    assert losses.dtype == torch.float32 and not losses.requires_grad
    torch.testing.assert_close(losses, expected.float())
    torch.testing.assert_close(mean, expected.sum().float() / (targets != -100).sum())
    assert (losses[::7] == 0).all()


def test_nothing_to_learn_gives_zero_loss_and_zero_gradients() -> None:
    hidden, weight, targets = case()
    hidden.requires_grad_(), weight.requires_grad_()
    loss, losses, _ = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0 and not losses.any() and not hidden.grad.any() and not weight.grad.any()


def test_a_hopeless_token_has_a_large_and_finite_loss() -> None:
    weight = torch.tensor([[500.0], [-500.0]], requires_grad=True)
    loss, _, _ = linear_cross_entropy(torch.ones(1, 1), weight, torch.tensor([1]))
    loss.backward()
    assert loss == 1000 and weight.grad.flatten().tolist() == [1, -1]


def test_a_frozen_matrix_gets_no_gradient() -> None:
    hidden, weight, targets = case()
    linear_cross_entropy(hidden.requires_grad_(), weight, targets)[0].backward()
    assert hidden.grad is not None and weight.grad is None


def test_tied_weights_get_both_gradients() -> None:
    _, weight, targets = case()
    ids = targets.clamp(min=0)
    fused, parts = (weight.clone().requires_grad_() for _ in range(2))
    linear_cross_entropy(fused[ids], fused, targets)[0].backward()
    plain(parts[ids], parts, targets, None).backward()
    torch.testing.assert_close(fused.grad, parts.grad)


def test_gradients_are_the_same_under_checkpointing() -> None:
    hidden, weight, targets = case()
    results = []
    for reentrant in (None, True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]

        def run(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy(h * 2, w, targets)[0]

        loss = run(*leaves) if reentrant is None else checkpoint(run, *leaves, use_reentrant=reentrant)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_log_softmax_over_a_whole_vocabulary_may_be_written_over_its_input() -> None:
    logits = torch.randn(16, 50_432, generator=torch.Generator().manual_seed(0)) * 10
    apart = torch.log_softmax(logits, -1)
    assert torch.equal(torch.log_softmax(logits, -1, out=logits), apart)


def test_under_autocast_logits_are_low_precision_and_sums_are_not() -> None:
    hidden, weight, targets = case()
    fast, slow = (([hidden.clone().requires_grad_(), weight.clone().requires_grad_()]) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(*fast, targets)[0].backward()
        F.cross_entropy((slow[0] @ slow[1].T).float(), targets).backward()
    truth = with_gradients(
        lambda h, w: plain(h, w, targets, None), (hidden, weight), torch.tensor(1.0), torch.float64
    )
    assert fast[0].grad.dtype == fast[1].grad.dtype == torch.float32
    assert_as_exact([x.grad for x in fast], [x.grad for x in slow], truth[1:])


def test_a_second_backward_is_refused() -> None:
    hidden, weight, targets = case()
    loss, _, _ = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_a_target_is_correct_where_its_logit_is_the_highest() -> None:
    hidden, weight, targets = case()
    targets[3] = -100
    likeliest = (hidden @ weight.T).argmax(-1)
    targets[::2] = likeliest[::2]
    with torch.no_grad():
        correct = linear_cross_entropy(hidden, weight, targets)[2]
    assert torch.equal(correct, likeliest == targets) and correct.any() and not correct.all()
    assert linear_cross_entropy(hidden.requires_grad_(), weight, targets)[2] is None
