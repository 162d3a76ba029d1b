"""LION: the equations by hand, the fast step against the plain one, and its state."""

from __future__ import annotations

import copy

import pytest
import torch

from mptfoundry.optim import lion
from mptfoundry.optim.lion import DecoupledLionW, lion_step
from mptfoundry.optim.momentum import GROUP, widen

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 1e-3}


def parameters(
    shapes: tuple[tuple[int, ...], ...] = ((5, 3), (7,), (2, 2, GROUP)),
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def test_one_step_by_hand() -> None:
    """m = 0.5, g = -2: c = 0.9 * 0.5 - 0.1 * 2 = 0.25, so the weight goes down by lr; m' = 0.495 - 0.02."""
    weight, momentum = lion_step(
        torch.tensor([1.0], dtype=torch.float64),
        torch.tensor([-2.0], dtype=torch.float64),
        torch.tensor([0.5], dtype=torch.float64),
        lr=0.01,
        initial_lr=0.02,
        weight_decay=0.1,
        betas=(0.9, 0.99),
    )
    assert weight.item() == pytest.approx(1 - 0.1 / 2 - 0.01, abs=1e-15)
    assert momentum.item() == pytest.approx(0.475, abs=1e-15)


def follow_the_plain_step(
    params: list[torch.nn.Parameter], optimizer: DecoupledLionW, steps: int = 5
) -> None:
    """Take steps along a schedule, each of which has to be the equations' bit for bit."""
    weights = [param.detach().clone() for param in params]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for step in range(steps):
        set_gradients(params, step)
        lr = OPTIONS["lr"] * (step + 1) / steps
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for i, param in enumerate(params):
            assert param.grad is not None
            weights[i], momenta[i] = lion_step(
                weights[i],
                param.grad,
                momenta[i],
                lr=lr,
                initial_lr=OPTIONS["lr"],
                weight_decay=OPTIONS["weight_decay"],
                betas=OPTIONS["betas"],
            )
            assert torch.equal(param, weights[i])
            assert torch.equal(optimizer.state[param]["exp_avg"], momenta[i])


@pytest.mark.parametrize("elements_at_once", [1, 6, 1 << 16])
def test_the_fast_step_is_the_plain_step_bit_for_bit(
    elements_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lion.ELEMENTS_AT_ONCE, "cpu", elements_at_once)
    params = parameters()
    follow_the_plain_step(params, DecoupledLionW(params, **OPTIONS))


def test_pieces_of_a_large_tensor_are_the_plain_step_bit_for_bit() -> None:
    params = parameters(((400, 401), (3, 5), (140_001,), (2, 9)))
    params[0].data = params[0].data.t()  # in no order that can be cut
    params[3].data = torch.zeros(2, 9)
    assert params[0].numel() > lion.ELEMENTS_AT_ONCE["cpu"]
    follow_the_plain_step(params, DecoupledLionW(params, **OPTIONS), steps=2)


@pytest.mark.parametrize("lr", [1e-5, 1e-1])
def test_the_decay_does_not_depend_on_the_size_of_the_learning_rate(lr: float) -> None:
    param = torch.nn.Parameter(torch.full((4,), 3.0, dtype=torch.float64))
    optimizer = DecoupledLionW([param], lr=lr, weight_decay=0.01)
    param.grad = torch.zeros_like(param)
    optimizer.param_groups[0]["lr"] = lr / 2
    optimizer.step()
    torch.testing.assert_close(param.data, torch.full_like(param, 3.0 * (1 - 0.01 / 2)), rtol=1e-15, atol=0)


def test_parameters_without_a_gradient_stay_and_have_no_state() -> None:
    params = parameters()
    optimizer = DecoupledLionW(params, **OPTIONS)
    set_gradients(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state


def test_the_state_goes_round_and_training_goes_on_the_same() -> None:
    params = parameters()
    optimizer = DecoupledLionW(params, **OPTIONS)
    set_gradients(params, 0)
    optimizer.step()
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = DecoupledLionW(others, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert set(optimizer.state_dict()["state"][0]) == {"exp_avg"}
    for each, own in ((optimizer, params), (resumed, others)):
        set_gradients(own, 1)
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_groups_have_options_of_their_own() -> None:
    params = parameters()
    optimizer = DecoupledLionW([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], **OPTIONS)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-2]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.5, 1e-2]


def test_the_closure_is_called_with_gradients_on() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = DecoupledLionW([param], lr=0.1)

    def closure() -> float:
        loss = (param**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert torch.equal(param.data, torch.full((3,), 0.9))


def test_a_group_made_in_the_middle_of_a_schedule_keeps_its_initial_rate() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = DecoupledLionW([{"params": [weight], "lr": 0.0, "initial_lr": 0.5}])
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    with pytest.raises(AssertionError):
        DecoupledLionW([torch.nn.Parameter(torch.ones(3))], lr=0.0)


@pytest.mark.parametrize("elements_at_once", [6, 1 << 16])
def test_a_bfloat16_momentum_is_the_float32_one_rounded_in_each_step(
    elements_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lion.ELEMENTS_AT_ONCE, "cpu", elements_at_once)
    params = parameters()
    params[0].data = params[0].data.t()  # in no order that can be cut
    optimizer = DecoupledLionW(params, **OPTIONS, momentum_dtype=torch.bfloat16)
    weights = [param.detach().clone() for param in params]
    momenta = [torch.zeros_like(weight, dtype=torch.bfloat16) for weight in weights]
    for step in range(4):
        set_gradients(params, step)
        optimizer.step()
        for i, param in enumerate(params):
            assert param.grad is not None
            keys = {"lr": OPTIONS["lr"], "initial_lr": OPTIONS["lr"], "betas": OPTIONS["betas"]}
            keys["weight_decay"] = OPTIONS["weight_decay"]
            weights[i], momentum = lion_step(weights[i], param.grad, momenta[i].float(), **keys)
            momenta[i] = momentum.bfloat16()
            assert torch.equal(param, weights[i])
            assert optimizer.state[param]["exp_avg"].dtype == torch.bfloat16
            assert torch.equal(optimizer.state[param]["exp_avg"], momenta[i])


def test_an_int8_momentum_is_the_nearest_of_255_numbers_for_each_group() -> None:
    params = [torch.nn.Parameter(torch.ones(5, 2 * GROUP))]
    optimizer = DecoupledLionW(params, **OPTIONS, momentum_dtype=torch.int8)
    expected = torch.zeros(5, 2, GROUP)
    for step in range(3):
        set_gradients(params, step)
        params[0].grad[0] = 0  # a group of zeros stays one
        optimizer.step()
        state = optimizer.state[params[0]]
        exact = expected.lerp(params[0].grad.view(5, 2, GROUP), 1 - OPTIONS["betas"][1])
        scales = exact.abs().amax(-1, keepdim=True) / 127
        expected = state["exp_avg"].view(5, 2, GROUP) * state["exp_avg_scale"].unsqueeze(-1)
        assert ((expected - exact).abs() <= 0.5001 * scales).all()
        assert state["exp_avg"].dtype == torch.int8 and not expected[0].any() and expected[1:].any()


def stepped(dtype: torch.dtype | None) -> tuple[list[torch.nn.Parameter], DecoupledLionW]:
    params = parameters()
    optimizer = DecoupledLionW(params, **OPTIONS, momentum_dtype=dtype)
    set_gradients(params, 0)
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_stored_momentum_goes_round_and_into_copies(dtype: torch.dtype) -> None:
    params, optimizer = stepped(dtype)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = DecoupledLionW(others, **OPTIONS, momentum_dtype=dtype)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin = copy.deepcopy(optimizer)
    copied = twin.param_groups[0]["params"]
    for each, own in ((optimizer, params), (resumed, others), (twin, copied)):
        set_gradients(own, 1)
        each.step()
    for param, other, third in zip(params, others, copied, strict=True):
        assert torch.equal(param, other) and torch.equal(param, third)
        for each, own in ((resumed, other), (twin, third)):
            assert each.state[own].keys() == optimizer.state[param].keys()
            for name, stored in optimizer.state[param].items():
                assert each.state[own][name].dtype == stored.dtype
                assert torch.equal(each.state[own][name], stored)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, torch.bfloat16),
        (torch.bfloat16, None),
        (None, torch.int8),
        (torch.int8, None),
        (torch.int8, torch.bfloat16),
    ],
)
def test_a_state_in_another_dtype_is_rounded_or_widened(
    before: torch.dtype | None, after: torch.dtype | None
) -> None:
    params, optimizer = stepped(before)
    resumed = DecoupledLionW(parameters(), **OPTIONS, momentum_dtype=after)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, other in zip(params, resumed.param_groups[0]["params"], strict=True):
        was, is_now = (
            widen(*each.state[own].values(), dtype=torch.float32)
            for each, own in ((optimizer, param), (resumed, other))
        )
        if after == torch.int8:
            torch.testing.assert_close(is_now, was, rtol=0, atol=0.51 / 127 * was.abs().max().item())
            assert resumed.state[other]["exp_avg"].dtype == (torch.int8 if param.ndim == 3 else torch.float32)
        else:
            assert resumed.state[other]["exp_avg"].dtype == (after or torch.float32)
            assert torch.equal(is_now, was.to(after or torch.float32).float())
