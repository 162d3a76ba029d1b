"""The gradient's norm and clipping, through Composer's own loop."""

from __future__ import annotations

import pytest
import torch
from composer.core import Event, State
from composer.devices import DeviceCPU
from composer.loggers import InMemoryLogger, Logger
from composer.models import ComposerModel

from mptfoundry.optim.clipping import GradientClipping, clamp, global_norm, scale_to_norm


class Weights(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(2, 2)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs.sum()


def after_a_batch(algorithm: GradientClipping) -> tuple[torch.nn.Linear, InMemoryLogger]:
    """Gradients 3, 4 and 12 in three places, so their norm is 13, passed through the algorithm's events."""
    module = Weights()
    module.model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    module.model.bias.grad = torch.tensor([12.0, 0.0])
    state = State(
        module, rank_zero_seed=0, run_name="test", device=DeviceCPU(), device_train_microbatch_size=1
    )
    written = InMemoryLogger()
    logger = Logger(state, destinations=[written])
    written.init(state, logger)
    for event in (Event.AFTER_TRAIN_BATCH, Event.BATCH_END):
        assert algorithm.match(event, state)
        algorithm.apply(event, state, logger)
    return module.model, written


def test_the_norm_is_measured_and_logged_without_clipping() -> None:
    algorithm = GradientClipping()
    linear, logger = after_a_batch(algorithm)
    assert algorithm.grad_norm == 13.0
    assert logger.get_timeseries("grad_norm")["grad_norm"] == [13.0]
    assert torch.equal(linear.weight.grad, torch.tensor([[3.0, 0.0], [0.0, -4.0]]))


@pytest.mark.parametrize(("threshold", "norm_after"), [(1.0, 1.0), (6.5, 6.5), (20.0, 13.0)])
def test_clipping_by_norm_scales_all_gradients_alike(threshold: float, norm_after: float) -> None:
    algorithm = GradientClipping("norm", threshold)
    linear, _ = after_a_batch(algorithm)
    assert algorithm.grad_norm == 13.0
    assert global_norm([linear.weight.grad, linear.bias.grad]).item() == pytest.approx(norm_after, rel=1e-6)
    assert (linear.bias.grad[0] / linear.weight.grad[0, 0]).item() == pytest.approx(4.0)


def test_the_norm_of_gradients_in_two_dtypes_is_that_of_float32() -> None:
    gradients = [torch.randn(30, 20).bfloat16(), torch.randn(7), torch.randn(9, 9).bfloat16()]
    assert torch.equal(global_norm(gradients), global_norm([gradient.float() for gradient in gradients]))


def test_clipping_by_value_clamps_each_element() -> None:
    linear, _ = after_a_batch(GradientClipping("value", 3.5))
    assert torch.equal(linear.weight.grad, torch.tensor([[3.0, 0.0], [0.0, -3.5]]))
    assert torch.equal(linear.bias.grad, torch.tensor([3.5, 0.0]))


def test_adaptive_clipping_bounds_the_ratio_of_gradient_to_weight() -> None:
    linear, _ = after_a_batch(GradientClipping("adaptive", 0.01))
    ratio = linear.weight.grad.norm(dim=1) / linear.weight.norm(dim=1)
    torch.testing.assert_close(ratio, torch.full((2,), 0.01))


def test_the_norm_is_pytorchs_and_so_is_the_scaling() -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, n, generator=generator)) for n in (3, 40, 200)]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    ours = [param.grad.clone() for param in params if param.grad is not None]
    norm = global_norm(ours)
    scale_to_norm(ours, norm, 1.0)
    theirs = torch.nn.utils.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(norm, theirs)
    for own, param in zip(ours, params, strict=True):
        torch.testing.assert_close(own, param.grad)


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    assert global_norm([torch.tensor([1.0, float("nan")])]).isnan()
    assert global_norm([torch.tensor([1.0, float("inf")])]).isinf()


def test_nothing_to_clip_is_no_error() -> None:
    assert global_norm([]) == 0
    clamp([torch.nn.Parameter(torch.ones(2))], 1.0)
