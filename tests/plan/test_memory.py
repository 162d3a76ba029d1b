from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mptfoundry.config.load import load_train_config
from mptfoundry.config.run import TrainConfig
from mptfoundry.plan.devices import GIB, Device
from mptfoundry.plan.memory import Memory
from mptfoundry.plan.plan import USABLE, make_plan

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = Device("cpu", "CPU", memory=16 * GIB)


def gpus(count: int = 1, gib: int = 80) -> Device:
    return Device("gpu", "GPU", count, min(count, 8), gib * GIB, has_bf16=True, cores=8)


def load(name: str, *words: str) -> TrainConfig:
    return load_train_config(CONFIGS / f"{name}.yaml", words)[0]


def memory_of(config: TrainConfig, device: Device, microbatch: int) -> Memory:
    batch = device.count * microbatch
    config = replace(config, global_train_batch_size=batch, device_train_microbatch_size=microbatch)
    return make_plan(config, device).memory


# size, GPUs, GiB of each, sequences at once, checkpointing, strategy: runs that llm-foundry published, which
# did fit
PUBLISHED_RUNS = [
    ("1b", 16, 80, 20, False, "FULL_SHARD"),
    ("3b", 8, 80, 10, False, "FULL_SHARD"),
    ("3b", 128, 80, 8, False, "SHARD_GRAD_OP"),
    ("7b", 8, 80, 6, False, "FULL_SHARD"),
    ("7b", 8, 40, 12, True, "FULL_SHARD"),
    ("13b", 64, 80, 2, False, "FULL_SHARD"),
    ("30b", 8, 80, 3, True, "FULL_SHARD"),
    ("30b", 32, 40, 4, True, "FULL_SHARD"),
    ("70b", 128, 80, 8, True, "FULL_SHARD"),
]


@pytest.mark.parametrize("run", PUBLISHED_RUNS, ids=lambda run: "-".join(map(str, run)))
def test_runs_that_were_made_fit_by_the_estimate(run: tuple[str, int, int, int, bool, str]) -> None:
    size, count, gib, microbatch, checkpointing, strategy = run
    config = load(
        f"mpt-{size}",
        f"global_train_batch_size={count * microbatch}",
        f"fsdp_config.activation_checkpointing={str(checkpointing).lower()}",
        f"fsdp_config.sharding_strategy={strategy}",
    )
    device = gpus(count, gib)
    assert device.memory is not None
    need = memory_of(config, device, microbatch).total
    assert 0.4 * device.memory < need < USABLE["gpu"] * device.memory


def test_sharding_divides_weights_and_optimizer() -> None:
    one, eight = (memory_of(load("mpt-7b"), gpus(n), 1) for n in (1, 8))
    assert one.weights == 4 * 6_649_286_656
    for part in ("weights", "optimizer"):
        assert getattr(eight, part) == getattr(one, part) // 8


def test_hybrid_sharding_divides_within_a_node() -> None:
    config = load("mpt-7b", "fsdp_config.sharding_strategy=HYBRID_SHARD")
    memory = memory_of(config, gpus(64), 1)
    assert memory.weights == 4 * 6_649_286_656 // 8


def test_adamw_keeps_twice_what_lion_keeps() -> None:
    lion, adamw = (
        memory_of(load("mpt-125m", f"optimizer.name={name}"), CPU, 1)
        for name in ("decoupled_lionw", "decoupled_adamw")
    )
    assert adamw.optimizer == 2 * lion.optimizer


def test_a_bfloat16_momentum_takes_half_the_memory() -> None:
    float32, bfloat16 = (
        memory_of(load("mpt-7b", f"optimizer.momentum_dtype={dtype}"), gpus(8), 1)
        for dtype in ("float32", "bfloat16")
    )
    assert bfloat16.optimizer == float32.optimizer // 2
    assert float32.total - bfloat16.total == bfloat16.optimizer


def test_the_estimate_follows_what_is_recomputed_and_offloaded() -> None:
    """In widths of a token. A block keeps 16: the attention 4, the MLP 8 besides their inputs, 1 for its own.

    At the end of forward there are 3 more; in the last block 6 and what it recomputes; in the first block 5.
    Of every second block, the last one is kept.
    tests/pretended/test_memory.py compares the whole with the peak of a step.
    """

    def kept(*words: str) -> float:
        config = load("mpt-7b", "global_train_batch_size=64", *words)
        return memory_of(config, gpus(8), 8).activations / (8 * 2048 * 4096 * 2)

    def recomputed(target: str) -> tuple[str, str]:
        return "fsdp_config.activation_checkpointing=true", f"model.activation_checkpointing_target={target}"

    assert kept() == 32 * 16 + 3
    assert kept(*recomputed("block")) == 32 * 1 + 16 + 6
    assert kept(*recomputed("{block: every-2}")) == 16 * 16 + 16 * 1 + 3
    assert kept(*recomputed("mlp")) == 32 * 8 + 8 + 6
    assert kept(*recomputed("[attention,mlp]")) == 32 * 4 + 8 + 6
    assert kept(*recomputed("norm")) == 32 * 14 + 3
    assert kept(*recomputed("act_fn")) == 32 * 12 + 4 + 6
    assert kept(*recomputed("[norm,act_fn]")) == 32 * 10 + 4 + 6
    assert kept(*recomputed("block"), "fsdp_config.activation_cpu_offload=true") == 16 + 5


def test_gradients_count_next_to_all_activations_only_if_they_are_accumulated() -> None:
    def memory(microbatch: int) -> Memory:
        words = ["global_train_batch_size=8", f"device_train_microbatch_size={microbatch}"]
        return make_plan(load("mpt-1b", *words, "fsdp_config.state_dict_type=full"), gpus(1)).memory

    assert memory(8).gradients == 0 and memory(4).gradients == memory(4).weights
