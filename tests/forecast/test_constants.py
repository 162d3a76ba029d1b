"""The model of a step, with the constants that ship, against what llm-foundry published."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mptfoundry.architecture.trainable import count_trainable
from mptfoundry.config.load import load_train_config
from mptfoundry.config.parallel import FSDPConfig
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import DataError
from mptfoundry.forecast.constants import (
    Measured,
    constants_for,
    fit,
    hardware_of_name,
    left_out_error,
    mean_error,
    predicted,
    published_steps,
    refitted,
)
from mptfoundry.forecast.step_time import Rates, Step, step_time
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.plan.devices import cluster_device
from mptfoundry.plan.fsdp import Sharding
from mptfoundry.plan.gpus import SHORT_NAMES
from mptfoundry.plan.memory import Memory, estimate_memory

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = published_steps()
OF_GPU = {gpu: [each for each in STEPS if each.gpu == gpu] for gpu in ("h100", "a100-80gb", "a100-40gb")}


def rates_of(gpu: str) -> Rates:
    return constants_for(SHORT_NAMES[gpu]).rates


@pytest.mark.parametrize(
    ("gpu", "rows", "limit"), [("h100", 70, 0.04), ("a100-80gb", 61, 0.06), ("a100-40gb", 78, 0.06)]
)
def test_published_throughput_is_reproduced(gpu: str, rows: int, limit: float) -> None:
    assert len(OF_GPU[gpu]) == rows
    assert mean_error(OF_GPU[gpu], rates_of(gpu)) < limit


@pytest.mark.long
@pytest.mark.parametrize(("gpu", "limit"), [("h100", 0.06), ("a100-80gb", 0.09), ("a100-40gb", 0.09)])
def test_a_model_that_no_constant_was_fitted_to_is_foretold(gpu: str, limit: float) -> None:
    assert left_out_error(OF_GPU[gpu], rates_of(gpu)) < limit


def test_the_constants_that_ship_are_what_a_fit_finds() -> None:
    """On a part of the rows, from the constants that ship: they hardly move."""
    some = OF_GPU["h100"][::4]
    found = fit(some, rates_of("h100"))
    assert mean_error(some, found) <= mean_error(some, rates_of("h100")) + 0.003


def test_a_fit_finds_the_constants_that_made_the_measurements() -> None:
    truth = Rates(matmul=0.6, attention=0.25, memory=0.5, exposed=0.4, latency=2e-4)
    made = [replace(each, tokens_per_second=predicted(each, truth)) for each in OF_GPU["h100"][::3]]
    assert asdict(fit(made)) == pytest.approx(asdict(truth), rel=0.05)


@cache
def base_of(model: str) -> TrainConfig:
    return load_train_config(CONFIGS / f"mpt-{model}.yaml", ["optimizer={name: decoupled_adamw, lr: 1e-4}"])[
        0
    ]


def memory_of(model: str, gpu: str, step: Step, checkpointing: bool, *, full_logits: bool) -> Memory:
    base = base_of(model)
    config: Any = SimpleNamespace(
        model=base.model,
        optimizer=base.optimizer,
        max_seq_len=step.seq_len,
        fsdp_config=None,
        global_train_batch_size=step.microbatches * step.microbatch * step.devices,
    )
    device = cluster_device(gpu, step.devices)
    trainable = count_trainable(base.model.network(), None, ())
    sharding = Sharding(1, step.shards, step.reshards)
    fsdp = FSDPConfig(activation_checkpointing=checkpointing)
    memory = estimate_memory(config, device, "amp_bf16", sharding, trainable, step.microbatch, fsdp)
    # llm-foundry's fused loss has all logits and their gradient at once, in bfloat16.
    logits = step.tokens * base.model.vocab_size * 4
    return replace(memory, logits=logits) if full_logits else memory


def room_of(gpu: str) -> int:
    memory = cluster_device(gpu, 8).memory
    assert memory is not None
    return memory


@pytest.mark.parametrize("gpu", OF_GPU)
def test_every_published_microbatch_fits_and_none_at_eight_times_the_length(gpu: str) -> None:
    for each in OF_GPU[gpu]:
        checkpointing = each.step.recomputed > 0
        need = memory_of(each.model, gpu, each.step, checkpointing, full_logits=True).total
        assert need < room_of(gpu), (each.model, each.step)
        longer = replace(each.step, seq_len=8 * each.step.seq_len)
        need = memory_of(each.model, gpu, longer, False, full_logits=True).total
        assert need > room_of(gpu), (each.model, each.step)


@pytest.mark.parametrize(
    ("model", "gpu", "gpus"), [("30b", "a100-40gb", 8), ("70b", "h100", 8), ("13b", "h100", 2)]
)
def test_a_state_that_alone_exceeds_the_gpu_does_not_fit(model: str, gpu: str, gpus: int) -> None:
    step = Step(base_of(model).model.network(), 2048, 1, devices=gpus, shards=gpus)
    memory = memory_of(model, gpu, step, True, full_logits=False)
    assert memory.weights + memory.gradients + memory.optimizer > room_of(gpu)


def test_logits_that_all_exist_at_once_do_not_fit_where_chunks_do() -> None:
    step = Step(base_of("125m").model.network(), 8192, 56, devices=8, shards=8)
    chunked, full = (memory_of("125m", "h100", step, True, full_logits=full).total for full in (False, True))
    assert chunked < room_of("h100") < full


def test_what_was_not_measured_is_called_an_estimate() -> None:
    for gpu in ("b200", "h200", "l40s"):
        constants = constants_for(SHORT_NAMES[gpu])
        assert "an estimate" in constants.source and constants.band == 0.3 and not constants.is_fitted
    assert "fitted to 70 steps" in constants_for(SHORT_NAMES["h100"]).source


NETWORK = MPTConfig(d_model=4096, n_heads=32, n_layers=32, max_seq_len=2048, vocab_size=50368)


def seconds(**changes: Any) -> float:
    step = replace(Step(NETWORK, 2048, 4, 2, devices=64, shards=64), **changes)
    return step_time(step, hardware_of_name("h100"), rates_of("h100")).total


def test_the_parts_of_a_step_follow_the_setting() -> None:
    assert 1.2 < seconds(recomputed=1.0) / seconds() < 4 / 3
    assert seconds(microbatches=4) / seconds() == pytest.approx(2, abs=0.02)
    assert seconds(reshards=False) < seconds()
    assert seconds(trainable=10**7, adapters=10**7) < 0.8 * seconds()
    windowed = replace(NETWORK, attn_config=replace(NETWORK.attn_config, sliding_window_size=128))
    assert seconds(network=windowed) < seconds()


def test_a_slow_network_binds_the_step() -> None:
    slow = replace(hardware_of_name("h100"), network=1e9)
    step = Step(NETWORK, 2048, 1, devices=64, shards=64)
    assert step_time(step, slow, rates_of("h100")).bound_by == "links"
    step = replace(step, microbatch=8)
    assert step_time(step, hardware_of_name("h100"), rates_of("h100")).bound_by == "arithmetic"


def bench_row(batch: int, speed: float) -> dict[str, Any]:
    network = {"d_model": 768, "n_heads": 12, "n_layers": 12, "max_seq_len": 2048, "vocab_size": 50368}
    return {
        "device": "NVIDIA B200",
        "network": network,
        "batch x seq_len": f"{batch} x 2048",
        "tokens per second": speed,
    }


def test_a_benchmark_moves_the_constants(tmp_path: Path) -> None:
    estimate = constants_for("NVIDIA B200")
    network = MPTConfig(**bench_row(8, 1)["network"])
    step = Step(network, 2048, 8, is_sharded=False, optimizer_bytes=24)
    speed = 0.8 * predicted(Measured(step, "b200", 1.0), estimate.rates)
    (tmp_path / "step.json").write_text(json.dumps([bench_row(8, speed)]))
    found = refitted(tmp_path / "step.json", "NVIDIA B200", estimate)
    assert found.is_fitted and found.band == 0.1 and "fitted to 1 measured step" in found.source
    assert predicted(Measured(step, "b200", speed), found.rates) == pytest.approx(speed, rel=0.05)
    with pytest.raises(DataError, match="has no step of NVIDIA H200"):
        refitted(tmp_path / "step.json", "NVIDIA H200", estimate)
    (tmp_path / "step.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not what a benchmark of steps writes|has no step"):
        refitted(tmp_path / "step.json", "NVIDIA B200", estimate)
