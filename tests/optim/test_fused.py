"""Steps in one pass against the plain ones and, by the house rule, against float64."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from composer.core import Event, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.optim import DecoupledAdamW
from torch._inductor.exc import InvalidCxxCompiler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from mptfoundry.errors import TrainingError
from mptfoundry.optim import adamw_fused, lion_compiled, lion_fused
from mptfoundry.optim.bf16_weights import Copy
from mptfoundry.optim.clipping import GradientClipping
from mptfoundry.optim.lion import DecoupledLionW
from mptfoundry.optim.momentum import GROUP

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LION = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 1e-3}
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 1e-3, "eps": 1e-6}
SHAPES = ((40, 55), (7,), (), (3, 700), (0, 4))


def make(kind: Any, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in SHAPES]
    return kind([torch.nn.Parameter(weight) for weight in weights], **options)


def weights_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return optimizer.param_groups[0]["params"]


def take_steps(optimizer: Any, steps: Sequence[int] = range(4)) -> list[torch.Tensor]:
    """Steps with gradients that also hold zeros, along a schedule; returns weights and state."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in weights_of(optimizer):
            gradient = torch.randn(param.shape, generator=generator)
            gradient[gradient.abs() < 0.2] = 0
            param.grad = gradient.to(param)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"] * (step + 1) / 4
        optimizer.step()
    states = [optimizer.state[param] for param in weights_of(optimizer)]
    return [*weights_of(optimizer), *(state[name] for state in states for name in sorted(state))]


def error(some: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    differences = [(one.double() - true).flatten() for one, true in zip(some, truth, strict=True)]
    return torch.cat(differences).square().mean().sqrt().item()


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.3, 0.4)])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
def test_lion_in_one_pass_is_as_near_the_truth_as_the_plain_step(
    betas: tuple[float, float], weight_decay: float
) -> None:
    options = LION | {"betas": betas, "weight_decay": weight_decay}
    plain = take_steps(make(DecoupledLionW, options))
    truth = take_steps(make(DecoupledLionW, options, torch.float64))
    ours = take_steps(make(lion_fused.DecoupledLionW, options))
    assert error(ours, truth) <= 2 * error(plain, truth)
    if DEVICE == "cpu" and betas[0] > 0.5:  # the interpreter rounds as PyTorch's kernels for a CPU, or nearer
        assert error(ours, plain) < 1e-7


@pytest.mark.usefixtures("triton_runs", "rounds_as_a_gpu")
def test_lion_in_one_pass_rounds_a_bfloat16_momentum_as_the_plain_step() -> None:
    options = LION | {"momentum_dtype": torch.bfloat16}
    results = [take_steps(make(kind, options)) for kind in (DecoupledLionW, lion_fused.DecoupledLionW)]
    for plain, ours in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        # A sum that is rounded once and not twice may fall on the other side of the middle of two numbers.
        torch.testing.assert_close(ours, plain, rtol=2**-7 if ours.dtype == torch.bfloat16 else 1e-6, atol=0)
        assert (ours == plain).float().mean() > 0.99 or not ours.numel()


def check_int8_momenta_of_the_plain_and_the_fused_step() -> None:
    """A matrix in groups, more of them than a program of the kernel has, and a vector without."""
    results = []
    for kind in (DecoupledLionW, lion_fused.DecoupledLionW):
        generator = torch.Generator().manual_seed(0)
        shapes = ((37, 2 * GROUP), (2 * GROUP,), (3, GROUP + 1))
        weights = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
        optimizer = kind(map(torch.nn.Parameter, weights), **LION, momentum_dtype=torch.int8)
        take_steps(optimizer)
        params = weights_of(optimizer)
        results.append([(param.data, *optimizer.state[param].values()) for param in params])
    (plain, plain_integers, plain_scales), *plain_others = results[0]
    (fused, integers, scales), *others = results[1]
    assert integers.dtype == plain_integers.dtype == torch.int8 and scales.shape == (37, 2)
    torch.testing.assert_close(scales, plain_scales, rtol=1e-6, atol=0)
    # A number halfway between two integers may go to the other one, once in thousands.
    differences = (integers.int() - plain_integers.int()).abs()
    assert differences.max() <= 1 and differences.float().mean() < 1e-3
    assert integers.int().abs().amax() == 127
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=2.5e-2 * (differences.sum() > 0).item())
    for one, other in zip(plain_others, others, strict=True):
        for some, same in zip(one, other, strict=True):
            torch.testing.assert_close(some, same, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("triton_runs")
def test_lion_in_one_pass_stores_an_int8_momentum_as_the_plain_step() -> None:
    check_int8_momenta_of_the_plain_and_the_fused_step()


@pytest.mark.usefixtures("triton_runs")
def test_what_is_not_a_number_stays_one() -> None:
    results = []
    for kind in (DecoupledLionW, lion_fused.DecoupledLionW):
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, float("nan")], device=DEVICE))
        optimizer = kind([weight], **LION)
        weight.grad = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0], device=DEVICE)
        optimizer.step()
        results.append((weight.data, optimizer.state[weight]["exp_avg"]))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, equal_nan=True)


@pytest.mark.usefixtures("triton_runs")
def test_a_gradient_of_another_dtype_or_layout_is_read() -> None:
    gradient = torch.randn(30, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for each in (gradient, gradient.t().contiguous().t()):
        weight = torch.nn.Parameter(torch.ones(30, 20, device=DEVICE))
        weight.grad = each
        lion_fused.DecoupledLionW([weight], **LION).step()
        results.append(weight.data)
    assert torch.equal(*results)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes the compiled step, and not Triton's interpreter."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("PyTorch needs a C++ compiler, and there is none")
    monkeypatch.delenv("TRITON_INTERPRET")


@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes the kernel")
def test_the_compiled_lion_is_as_near_the_truth_as_the_plain_step_and_is_compiled_once() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for options in (LION, LION | {"betas": (0.3, 0.4), "weight_decay": 0.0}):
        plain = take_steps(make(DecoupledLionW, options))
        truth = take_steps(make(DecoupledLionW, options, torch.float64))
        ours = take_steps(make(lion_fused.DecoupledLionW, options))
        assert error(ours, truth) <= 2 * error(plain, truth)
    # Once for all shapes, rates and coefficients; a tensor of one number is a program of its own.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes the kernel")
def test_the_compiled_lion_clips_copies_and_rounds_the_momentum_in_its_pass() -> None:
    results = []
    for kind in (DecoupledLionW, lion_fused.DecoupledLionW):
        optimizer = make(kind, LION | {"momentum_dtype": torch.bfloat16})
        weight = weights_of(optimizer)[0]
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        weight.grad = gradient if kind is lion_fused.DecoupledLionW else gradient * 0.25
        copied = Copy(torch.empty_like(weight, dtype=torch.bfloat16))
        if kind is lion_fused.DecoupledLionW:
            optimizer.gradient_scale, optimizer.bf16_copies = torch.tensor(0.25), {weight: copied}
        optimizer.step()
        if kind is lion_fused.DecoupledLionW:
            assert torch.equal(copied.tensor, weight.bfloat16()) and copied.version == weight._version
        results.append((weight.data, optimizer.state[weight]["exp_avg"]))
    (plain, plain_momentum), (ours, momentum) = results
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(momentum, plain_momentum, rtol=2**-7, atol=0)


@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes the kernel")
def test_the_compiled_lion_stores_an_int8_momentum_as_the_plain_step() -> None:
    check_int8_momenta_of_the_plain_and_the_fused_step()


@pytest.mark.usefixtures("compiled")
def test_a_compiler_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr(lion_compiled, "_compiled", lambda: fails)
    with pytest.raises(TrainingError, match=r"^optimizer.fused: PyTorch can't compile the step on this mach"):
        take_steps(make(lion_fused.DecoupledLionW, LION))


class Weights(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(2, 2, device=DEVICE)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs.sum()


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("threshold", [1.0, 20.0])
def test_clipping_by_norm_is_part_of_the_pass(threshold: float) -> None:
    results = []
    for kind in (DecoupledLionW, lion_fused.DecoupledLionW):
        torch.manual_seed(0)
        module = Weights()
        optimizer = kind(module.parameters(), **LION)
        module.model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, -4.0]], device=DEVICE)
        module.model.bias.grad = torch.tensor([12.0, 0.0], device=DEVICE)
        state = State(
            module,
            rank_zero_seed=0,
            run_name="test",
            device=DeviceCPU(),
            device_train_microbatch_size=1,
            optimizers=optimizer,
        )
        clipping = GradientClipping("norm", threshold)
        clipping.apply(Event.AFTER_TRAIN_BATCH, state, Logger(state))
        assert clipping.grad_norm == 13.0
        optimizer.step()
        results.append([*module.parameters(), *(s["exp_avg"] for s in optimizer.state.values())])
        is_whole = module.model.bias.grad[0].item() == 12.0
        assert is_whole == (kind is lion_fused.DecoupledLionW or threshold > 13)
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("lr", [1e-2, 0.0])
def test_fused_adamw_has_composers_numbers(amsgrad: bool, lr: float) -> None:
    options = ADAMW | {"amsgrad": amsgrad, "lr": lr}
    plain = take_steps(make(DecoupledAdamW, options))
    truth = take_steps(make(DecoupledAdamW, options, torch.float64))
    ours = take_steps(make(adamw_fused.DecoupledAdamW, options))
    assert error(ours, truth) <= 2 * error(plain, truth)


@pytest.mark.parametrize(("plain", "ours", "options"), [
    (DecoupledLionW, lion_fused.DecoupledLionW, LION),
    (DecoupledAdamW, adamw_fused.DecoupledAdamW, ADAMW),
])  # fmt: skip
@pytest.mark.usefixtures("triton_runs")
def test_a_state_is_the_same_for_both_and_goes_from_one_to_the_other(
    plain: Any, ours: Any, options: dict[str, Any]
) -> None:
    """Composer looks for an optimizer's state by the name of its class."""
    assert plain.__qualname__ == ours.__qualname__
    first, second = make(plain, options), make(ours, options)
    expected, _ = take_steps(first), take_steps(second, [0, 1])
    assert first.state_dict()["param_groups"][0].keys() == second.state_dict()["param_groups"][0].keys()
    third = make(plain, options)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    for param, other in zip(weights_of(third), weights_of(second), strict=True):
        param.data = other.data.clone()
    fourth = make(ours, options)
    take_steps(third, [2])
    fourth.load_state_dict(copy.deepcopy(third.state_dict()))
    for param, other in zip(weights_of(fourth), weights_of(third), strict=True):
        param.data = other.data.clone()
    for one, other in zip(take_steps(fourth, [3]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize(
    "kind", ["lion", "bf16 momentum", "plain bf16 momentum", "int8 momentum", "plain int8 momentum", "adamw"]
)
def test_a_rank_updates_its_own_shard(kind: str) -> None:
    narrow, narrowest = (LION | {"momentum_dtype": dtype} for dtype in (torch.bfloat16, torch.int8))
    ours, options = {
        "lion": (lion_fused.DecoupledLionW, LION),
        "bf16 momentum": (lion_fused.DecoupledLionW, narrow),
        "plain bf16 momentum": (DecoupledLionW, narrow),
        "int8 momentum": (lion_fused.DecoupledLionW, narrowest),
        "plain int8 momentum": (DecoupledLionW, narrowest),
        "adamw": (adamw_fused.DecoupledAdamW, ADAMW),
    }[kind]
    store = dist.HashStore()
    dist.init_process_group("gloo" if DEVICE == "cpu" else "nccl", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh(DEVICE, (1,))
        weight = torch.ones(6, GROUP, device=DEVICE)
        gradient = torch.linspace(-1, 1, weight.numel(), device=DEVICE).view_as(weight)
        sharded = torch.nn.Parameter(DTensor.from_local(weight.clone(), mesh, [Shard(0)]))
        sharded.grad = DTensor.from_local(gradient.clone(), mesh, [Shard(0)])
        whole = torch.nn.Parameter(weight.clone())
        whole.grad = gradient.clone()
        optimizer = ours([sharded], **options)
        optimizer.step()
        ours([whole], **options).step()
        before = dict(optimizer.state[sharded])
        assert before["exp_avg"].dtype == options.get("momentum_dtype", torch.float32)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for name, stored in before.items():
            if name != "step":
                loaded = optimizer.state[sharded][name]
                assert isinstance(stored, DTensor) and isinstance(loaded, DTensor)
                assert loaded.dtype == stored.dtype and torch.equal(loaded.to_local(), stored.to_local())
        assert torch.equal(sharded.data.to_local(), whole.data)
    finally:
        dist.destroy_process_group()
