from __future__ import annotations

from pathlib import Path

import pytest

from mptfoundry.config.load import load_train_config
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import ConfigError
from mptfoundry.mpt import backends
from mptfoundry.plan.devices import GIB, Device
from mptfoundry.plan.resolve import (
    USABLE,
    device_batch,
    estimate_memory,
    largest_microbatch,
    refuse_lacking,
    resolve_auto,
)

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = Device("cpu", "CPU", memory=16 * GIB)
LAPTOP_GPU = Device("gpu", "NVIDIA T4", memory=16 * GIB)


def gpus(count: int = 1, gib: int = 80) -> Device:
    return Device("gpu", "GPU", count, min(count, 8), gib * GIB, has_bf16=True, cores=8)


def load(name: str, *words: str) -> TrainConfig:
    return load_train_config(CONFIGS / f"{name}.yaml", words)[0]


def test_a_cpu_computes_in_fp32_without_readers() -> None:
    resolved = resolve_auto(load("mpt-tiny"), CPU)
    assert resolved.precision == "fp32"
    assert resolved.fsdp_version is None and resolved.init_device == "cpu"
    assert resolved.device_train_microbatch_size == resolved.device_eval_batch_size == 16
    assert resolved.num_workers == {"train": 0, "code": 0, "docstrings": 0, "documentation": 0}


def test_a_gpu_computes_in_bf16_and_shards_with_version_2() -> None:
    resolved = resolve_auto(load("mpt-7b"), gpus(440, 40))
    assert resolved.precision == "amp_bf16"
    assert resolved.fsdp_version == 2 and resolved.init_device == "meta"
    assert resolved.num_workers["train"] > 0


def test_a_gpu_without_bf16_computes_in_fp32() -> None:
    assert resolve_auto(load("mpt-tiny"), LAPTOP_GPU).precision == "fp32"


def test_every_auto_has_its_reason_and_what_was_given_has_none() -> None:
    auto = resolve_auto(load("mpt-7b"), gpus(8))
    assert set(auto.reasons) == {
        "precision",
        "device_train_microbatch_size",
        "device_eval_batch_size",
        "model.attn_config.attn_impl",
        "model.loss_fn",
        "model.init_device",
        "fsdp_config.version",
        "num_workers",
    }
    words = ["precision=amp_fp16", "device_train_microbatch_size=4", "fsdp_config.version=1"]
    given = resolve_auto(load("mpt-7b", *words, "train_loader.num_workers=7"), gpus(8))
    assert (given.precision, given.device_train_microbatch_size, given.fsdp_version) == ("amp_fp16", 4, 1)
    assert given.num_workers["train"] == 7
    assert not {"precision", "device_train_microbatch_size", "fsdp_config.version"} & set(given.reasons)


@pytest.fixture
def all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of all backends are here."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setattr(backends, "_FLASH_IS_MISSING", None)


@pytest.mark.usefixtures("all_backends")
def test_the_attention_backend_is_the_networks_own_choice() -> None:
    key = "model.attn_config.attn_impl"
    on_cpu, on_gpu = resolve_auto(load("mpt-tiny"), CPU), resolve_auto(load("mpt-tiny"), gpus())
    assert (on_cpu.attn_impl, on_gpu.attn_impl) == ("torch", "triton")
    assert on_gpu.reasons[key] == "serves this model in bfloat16 on cuda"
    given = resolve_auto(load("mpt-tiny", f"{key}=flash", "precision=amp_fp16"), gpus())
    assert given.attn_impl == "flash" and key not in given.reasons


@pytest.mark.usefixtures("all_backends")
def test_a_backend_that_cannot_serve_is_refused_before_anything_is_built() -> None:
    flash = "model.attn_config.attn_impl=flash"
    on_cpu = resolve_auto(load("mpt-tiny", flash), CPU)
    assert on_cpu.attn_impl == "flash"
    with pytest.raises(ConfigError) as error:
        refuse_lacking(on_cpu)
    assert str(error.value) == (
        "model.attn_config.attn_impl: flash can't be used: it needs a GPU. "
        "Use auto or torch; all give the same mathematics."
    )
    with pytest.raises(ConfigError, match=r"not in float32\. Use auto or torch or triton;"):
        refuse_lacking(resolve_auto(load("mpt-tiny", flash), LAPTOP_GPU))


def test_the_same_config_always_resolves_to_the_same_values() -> None:
    config = load("mpt-125m")
    assert resolve_auto(config, CPU) == resolve_auto(config, CPU)


def test_a_batch_that_does_not_split_is_refused_with_its_neighbours() -> None:
    config = load("mpt-7b", "global_train_batch_size=250")
    with pytest.raises(ConfigError) as error:
        device_batch(config, gpus(8))
    assert str(error.value) == (
        "global_train_batch_size: 250 does not split over 8 devices. Use a multiple of 8: 248 or 256."
    )


def test_a_batch_smaller_than_the_devices_is_told_the_smallest() -> None:
    with pytest.raises(ConfigError, match=r"Use a multiple of 64: 64\."):
        device_batch(load("mpt-7b", "global_train_batch_size=8"), gpus(64))


def test_a_microbatch_is_never_more_than_a_device_has() -> None:
    config = load("mpt-125m", "global_train_batch_size=4", "device_train_microbatch_size=16")
    assert resolve_auto(config, CPU).device_train_microbatch_size == 4


@pytest.mark.parametrize("gib", [8, 16, 40, 80])
def test_the_microbatch_is_the_largest_divisor_that_fits(gib: int) -> None:
    config = load("mpt-125m", "global_train_batch_size=96")
    device = Device("gpu", "GPU", memory=gib * GIB, has_bf16=True)
    size, _ = largest_microbatch(config, device, "amp_bf16")
    larger = [n for n in range(size + 1, 97) if 96 % n == 0]
    room = USABLE["gpu"] * device.memory if device.memory else 0
    assert 96 % size == 0
    assert estimate_memory(config, device, size, "amp_bf16").total <= room
    assert all(estimate_memory(config, device, n, "amp_bf16").total > room for n in larger[:1])


def test_what_cannot_fit_says_so_rather_than_pretend() -> None:
    size, reason = largest_microbatch(load("mpt-7b"), CPU, "fp32")
    assert size == 1
    assert reason.endswith("where 9.6 GiB of 16.0 GiB can be planned with")


def test_unknown_memory_is_no_ground_to_guess() -> None:
    device = Device("gpu", "GPU", memory=None)
    assert largest_microbatch(load("mpt-125m"), device, "amp_bf16") == (
        1,
        "the device's memory is not known",
    )


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
    need = estimate_memory(config, device, microbatch, "amp_bf16").total
    assert 0.4 * device.memory < need < USABLE["gpu"] * device.memory


def test_sharding_divides_weights_gradients_and_optimizer() -> None:
    one, eight = (estimate_memory(load("mpt-7b"), gpus(n), 1, "amp_bf16") for n in (1, 8))
    assert one.weights == 4 * 6_649_286_656
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eight, part) == getattr(one, part) // 8


def test_hybrid_sharding_divides_within_a_node() -> None:
    config = load("mpt-7b", "fsdp_config.sharding_strategy=HYBRID_SHARD")
    memory = estimate_memory(config, gpus(64), 1, "amp_bf16")
    assert memory.weights == 4 * 6_649_286_656 // 8


def test_adamw_keeps_twice_what_lion_keeps() -> None:
    lion, adamw = (
        estimate_memory(load("mpt-125m", f"optimizer.name={name}"), CPU, 1, "fp32")
        for name in ("decoupled_lionw", "decoupled_adamw")
    )
    assert adamw.optimizer == 2 * lion.optimizer


def test_checkpointing_keeps_a_blocks_input_alone() -> None:
    words = "global_train_batch_size=8"
    plain = load("mpt-7b", words)
    checkpointed = load("mpt-7b", words, "fsdp_config.activation_checkpointing=true")
    device = gpus(8)
    tokens, width, layers = 2048, 4096, 32
    kept = estimate_memory(plain, device, 1, "amp_bf16").activations
    recomputed = estimate_memory(checkpointed, device, 1, "amp_bf16").activations
    assert kept == tokens * layers * 32 * width
    assert recomputed == tokens * (layers * 2 * width + 32 * width)


def test_the_estimate_follows_what_is_recomputed_and_offloaded() -> None:
    """In widths, of which a block keeps 16: the attention 4, the MLP 8 beside their inputs, 1 for its own."""

    def kept(target: str, *words: str) -> float:
        given = ["fsdp_config.activation_checkpointing=true", *words]
        target_word = f"model.activation_checkpointing_target={target}"
        config = load("mpt-7b", "global_train_batch_size=8", target_word, *given)
        number = estimate_memory(config, gpus(8), 1, "amp_bf16").activations
        return number / (2048 * 4096 * 2)

    assert kept("{block: every-2}") == 16 * 16 + 16 * 1 + 16
    assert kept("mlp") == 32 * 8 + 8
    assert kept("[attention,mlp]") == 32 * 4 + 8
    assert kept("norm") == 32 * 16
    assert kept("block", "fsdp_config.activation_cpu_offload=true") == 16


def test_where_weights_are_made_follows_from_the_sharding() -> None:
    device = gpus(8)

    def made(*words: str) -> str:
        return resolve_auto(load("mpt-7b", *words), device).init_device

    assert made() == "meta"
    assert made("fsdp_config.sharding_strategy=NO_SHARD", "fsdp_config.state_dict_type=full") == "cpu"
    rank_0 = ["fsdp_config.load_monolith_rank0_only=true", "fsdp_config.state_dict_type=full"]
    assert made(*rank_0) == "mixed"
    with pytest.raises(ConfigError, match="sync_module_states: has to be true"):
        made("model.init_device=mixed", "fsdp_config.version=1")
    with pytest.raises(ConfigError, match=r"model.init_device.*Use mixed"):
        made("model.init_device=meta", *rank_0)
