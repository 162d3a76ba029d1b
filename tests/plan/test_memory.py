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


def test_sharding_divides_weights_gradients_and_optimizer() -> None:
    one, eight = (memory_of(load("mpt-7b"), gpus(n), 1) for n in (1, 8))
    assert one.weights == 4 * 6_649_286_656
    for part in ("weights", "gradients", "optimizer"):
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


def test_checkpointing_keeps_a_blocks_input_alone() -> None:
    words = "global_train_batch_size=8"
    plain = load("mpt-7b", words)
    checkpointed = load("mpt-7b", words, "fsdp_config.activation_checkpointing=true")
    device = gpus(8)
    tokens, width, layers = 2048, 4096, 32
    kept = memory_of(plain, device, 1).activations
    recomputed = memory_of(checkpointed, device, 1).activations
    assert kept == tokens * layers * 32 * width
    assert recomputed == tokens * (layers * 2 * width + 32 * width)


def test_the_estimate_follows_what_is_recomputed_and_offloaded() -> None:
    """In widths, of which a block keeps 16: the attention 4, the MLP 8 beside their inputs, 1 for its own."""

    def kept(target: str, *words: str) -> float:
        given = ["fsdp_config.activation_checkpointing=true", *words]
        target_word = f"model.activation_checkpointing_target={target}"
        config = load("mpt-7b", "global_train_batch_size=8", target_word, *given)
        number = memory_of(config, gpus(8), 1).activations
        return number / (2048 * 4096 * 2)

    assert kept("{block: every-2}") == 16 * 16 + 16 * 1 + 16
    assert kept("mlp") == 32 * 8 + 8
    assert kept("[attention,mlp]") == 32 * 4 + 8
    assert kept("norm") == 32 * 16
    assert kept("block", "fsdp_config.activation_cpu_offload=true") == 16
