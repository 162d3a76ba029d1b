from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mptfoundry.config.load import load_train_config
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import ConfigError
from mptfoundry.mpt import backends
from mptfoundry.plan.devices import GIB, Device
from mptfoundry.plan.gpu_support import SETS, TorchBuild
from mptfoundry.plan.gpus import GPU
from mptfoundry.plan.plan import USABLE, Choice, Plan, device_batch, make_plan, refuse_missing

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = Device("cpu", "CPU", memory=16 * GIB, found="no GPU found")
LAPTOP_GPU = Device("gpu", "NVIDIA T4", memory=16 * GIB)


def gpus(count: int = 1, gib: int = 80) -> Device:
    return Device("gpu", "GPU", count, min(count, 8), gib * GIB, has_bf16=True, cores=8)


def a100s(count: int) -> Device:
    return Device("gpu", "A100", count, 8, 40 * GIB, 312e12, True)


def load(name: str, *words: str) -> TrainConfig:
    return load_train_config(CONFIGS / f"{name}.yaml", words)[0]


def plan_of(name: str, device: Device, *words: str) -> Plan:
    return make_plan(load(name, *words), device)


def test_mpt_7b_is_planned_as_it_was_published() -> None:
    plan = make_plan(load("mpt-7b"), a100s(440))
    assert plan.parameters == 6_649_286_656
    assert plan.tokens_per_batch == 1760 * 2048
    assert plan.batches == -(-(10**12) // (1760 * 2048))
    assert plan.flops_per_token == 6 * 6_649_286_656 + 12 * 32 * 4096 * 2048
    assert plan.causal_flops_per_token == 6 * 6_649_286_656 + 6 * 32 * 4096 * 2048
    assert plan.tokens is not None and plan.flops == plan.tokens * plan.flops_per_token


def test_published_days_follow_from_a_usual_utilisation() -> None:
    """9.5 days on 440 A100-40GB is an MFU of 38 %."""
    seconds = make_plan(load("mpt-7b"), a100s(440)).seconds(0.38)
    assert seconds is not None and seconds / 86400 == pytest.approx(9.5, rel=0.02)


def test_no_time_is_known_where_the_peak_of_the_device_is_not() -> None:
    assert make_plan(load("mpt-tiny", "max_duration=100ba"), CPU).seconds(0.4) is None


@pytest.mark.parametrize(
    ("duration", "batches"),
    [("100ba", 100), ("409600tok", 100), ("409601tok", 101), ("1600sp", 100), ("2ep", None), ("60sec", None)],
)
def test_batches_follow_from_every_unit_that_does_not_need_the_data(
    duration: str, batches: int | None
) -> None:
    assert make_plan(load("mpt-tiny", f"max_duration={duration}"), CPU).batches == batches


def test_epochs_of_a_given_size_have_a_known_length() -> None:
    for size in ("1000", "1k"):
        config = load("mpt-tiny", "max_duration=2ep", f"train_loader.dataset.epoch_size={size}")
        assert make_plan(config, CPU).batches == 2 * 62


def test_a_cpu_computes_in_fp32_without_readers() -> None:
    plan = make_plan(load("mpt-tiny"), CPU)
    assert plan.precision == "fp32"
    assert plan.sharding is None and plan.init_device == "cpu"
    assert plan.device_train_microbatch_size == plan.device_eval_batch_size == 16
    assert plan.num_workers == {"train": 0, "code": 0, "docstrings": 0, "documentation": 0}


def test_a_gpu_computes_in_bf16_and_shards() -> None:
    plan = make_plan(load("mpt-7b"), gpus(440, 40))
    assert plan.precision == "amp_bf16"
    assert str(plan.sharding) == "440 shards" and plan.init_device == "meta"
    assert plan.num_workers["train"] > 0


def test_a_gpu_without_bf16_computes_in_fp32() -> None:
    assert make_plan(load("mpt-tiny"), LAPTOP_GPU).precision == "fp32"


def test_every_auto_has_its_reason_and_what_was_given_has_none() -> None:
    auto = make_plan(load("mpt-7b"), gpus(8))
    assert set(auto.choices) == {
        "precision",
        "device_train_microbatch_size",
        "device_eval_batch_size",
        "model.attn_config.attn_impl",
        "model.loss_fn",
        "model.init_device",
        "fsdp_config",
        "num_workers",
        "optimizer.fused",
        "optimizer.bf16_weights",
    }
    words = ["precision=amp_fp16", "device_train_microbatch_size=4"]
    given = make_plan(load("mpt-7b", *words, "train_loader.num_workers=7"), gpus(8))
    assert (given.precision, given.device_train_microbatch_size) == ("amp_fp16", 4)
    assert given.num_workers["train"] == 7
    assert not {"precision", "device_train_microbatch_size"} & set(given.choices)


@pytest.fixture
def all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of all backends are here."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setattr(backends, "_FLASH_IS_MISSING", None)


@pytest.mark.usefixtures("all_backends")
def test_the_attention_backend_is_the_networks_own_choice() -> None:
    key = "model.attn_config.attn_impl"
    on_cpu, on_gpu = make_plan(load("mpt-tiny"), CPU), make_plan(load("mpt-tiny"), gpus())
    assert (on_cpu.attn_impl, on_gpu.attn_impl) == ("torch", "triton")
    assert on_gpu.choices[key].reason == "serves this model in bfloat16 on cuda"
    given = make_plan(load("mpt-tiny", f"{key}=flash", "precision=amp_fp16"), gpus())
    assert given.attn_impl == "flash" and key not in given.choices


ADAMW = "optimizer={name: decoupled_adamw, lr: 1e-3}"


@pytest.mark.usefixtures("all_backends")
def test_the_optimizers_step_is_one_pass_on_a_gpu_that_can() -> None:
    assert not make_plan(load("mpt-tiny"), CPU).fused
    assert make_plan(load("mpt-tiny"), gpus()).fused and make_plan(load("mpt-tiny", ADAMW), gpus()).fused
    assert not make_plan(load("mpt-tiny", "optimizer.fused=false"), gpus()).fused
    old_gpu = replace(LAPTOP_GPU, gpus=(GPU("NVIDIA T4", capability=(7, 5)),))
    old = make_plan(load("mpt-tiny"), old_gpu)
    assert not old.fused and "compute capability 8.0" in old.choices["optimizer.fused"].reason
    assert make_plan(load("mpt-tiny", ADAMW, "optimizer.fused=true"), CPU).missing == {}
    lacking = make_plan(load("mpt-tiny", "optimizer.fused=true"), old_gpu).missing
    assert "compute capability 8.0" in lacking["optimizer.fused"]
    assert lacking["optimizer.fused"].endswith("Use auto or false.")


BF16 = "optimizer.bf16_weights"


@pytest.mark.usefixtures("all_backends")
def test_matrices_stay_in_bfloat16_next_to_a_fused_lion_on_one_gpu() -> None:
    plan = make_plan(load("mpt-tiny"), gpus())
    assert plan.bf16_weights and "no microbatch casts weights" in plan.choices[BF16].reason
    assert not make_plan(load("mpt-tiny", f"{BF16}=false"), gpus()).bf16_weights
    reasons = {
        "DDP averages": (load("mpt-tiny"), gpus(2)),
        "FSDP casts each shard": (load("mpt-7b"), gpus(8)),
        "pays where a fused LION": (load("mpt-tiny", ADAMW), gpus()),
        "it pays where": (load("mpt-tiny", "callbacks.optimizer_monitor={}"), gpus()),
    }
    for said, (config, device) in reasons.items():
        plan = make_plan(config, device)
        assert not plan.bf16_weights and said in plan.choices[BF16].reason
    assert BF16 not in make_plan(load("mpt-tiny"), CPU).choices
    assert make_plan(load("mpt-tiny", ADAMW, f"{BF16}=true"), gpus()).bf16_weights
    assert make_plan(load("mpt-tiny", ADAMW, f"{BF16}=true"), gpus()).missing == {}
    lacking = make_plan(load("mpt-tiny", f"{BF16}=true"), CPU).missing[BF16]
    assert lacking.startswith("true can't be used: weights are cast") and lacking.endswith(
        "Use auto or false."
    )


@pytest.mark.usefixtures("all_backends")
def test_copies_that_would_not_fit_are_left_out() -> None:
    words = ["model.n_layers=4", "max_seq_len=65536", "global_train_batch_size=1"]
    words += ["fsdp_config.state_dict_type=full", "fsdp_config.activation_checkpointing=true"]
    plain, ours = (
        make_plan(load("mpt-7b", *words, f"{BF16}={choice}"), gpus()).memory.total
        for choice in ("false", "true")
    )
    assert ours > plain
    between = replace(gpus(), memory=int((plain + ours) / 2 / USABLE["gpu"]))
    plan = make_plan(load("mpt-7b", *words), between)
    assert not plan.bf16_weights and plan.choices[BF16].reason == "with them the microbatch would not fit"


@pytest.mark.usefixtures("all_backends")
def test_the_loss_is_one_kernel_on_a_gpu_that_can() -> None:
    assert make_plan(load("mpt-tiny"), CPU).loss_fn == "torch_crossentropy"
    assert make_plan(load("mpt-tiny"), gpus()).loss_fn == "fused_crossentropy"
    old = replace(LAPTOP_GPU, gpus=(GPU("NVIDIA T4", capability=(7, 5)),))
    assert make_plan(load("mpt-tiny"), old).loss_fn == "torch_crossentropy"
    given = make_plan(load("mpt-tiny", "model.loss_fn=torch_crossentropy"), gpus())
    assert given.loss_fn == "torch_crossentropy" and "model.loss_fn" not in given.choices


@pytest.mark.usefixtures("all_backends")
def test_a_backend_that_cannot_serve_is_refused_before_anything_is_built() -> None:
    flash = "model.attn_config.attn_impl=flash"
    on_cpu = make_plan(load("mpt-tiny", flash), CPU)
    assert on_cpu.attn_impl == "flash"
    with pytest.raises(ConfigError) as error:
        refuse_missing(on_cpu)
    assert str(error.value) == (
        "model.attn_config.attn_impl: flash can't be used: it needs a GPU. "
        "Use auto or torch; all give the same mathematics."
    )
    with pytest.raises(ConfigError, match=r"not in float32\. Use auto or torch or triton;"):
        refuse_missing(make_plan(load("mpt-tiny", flash), LAPTOP_GPU))


def test_the_same_config_always_resolves_to_the_same_values() -> None:
    config = load("mpt-125m")
    assert make_plan(config, CPU) == make_plan(config, CPU)


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
    assert make_plan(config, CPU).device_train_microbatch_size == 4


@pytest.mark.parametrize("gib", [8, 16, 40, 80])
def test_the_microbatch_is_the_largest_divisor_that_fits(gib: int) -> None:
    device = Device("gpu", "GPU", memory=gib * GIB, has_bf16=True)
    words, room = "global_train_batch_size=96", USABLE["gpu"] * gib * GIB
    plan = plan_of("mpt-125m", device, words)
    size = plan.device_train_microbatch_size
    larger = [n for n in range(size + 1, 97) if 96 % n == 0]
    assert 96 % size == 0 and plan.memory.total <= room
    for n in larger[:1]:
        assert plan_of("mpt-125m", device, words, f"device_train_microbatch_size={n}").memory.total > room


def test_what_cannot_fit_says_so_rather_than_pretend() -> None:
    plan = plan_of("mpt-7b", CPU)
    assert plan.device_train_microbatch_size == 1
    reason = plan.choices["device_train_microbatch_size"].reason
    assert reason.startswith("none fits: 1 needs about ")
    assert reason.endswith(" GiB, and 9.6 of 16.0 GiB are usable")


def test_unknown_memory_is_no_ground_to_guess() -> None:
    plan = plan_of("mpt-125m", Device("gpu", "GPU", memory=None))
    assert plan.device_train_microbatch_size == 1
    assert plan.choices["device_train_microbatch_size"].reason == "the device's memory is not known"


def test_what_fsdp_config_says_in_older_words_is_told() -> None:
    older = (
        "fsdp_config.version=1",
        "fsdp_config.limit_all_gathers=true",
        "fsdp_config.use_orig_params=false",
    )
    plan, words = plan_of("mpt-7b", gpus(8)), plan_of("mpt-7b", gpus(8), *older)
    assert words.sharding == plan.sharding
    assert words.choices["fsdp_config"].reason == (
        "FSDP2; version: 1 means FSDP2 here, too; no effect: limit_all_gathers, use_orig_params"
    )
    strategy = ("fsdp_config.sharding_strategy=_HYBRID_SHARD_ZERO2", "global_train_batch_size=64")
    hybrid = plan_of("mpt-7b", gpus(64), *strategy).sharding
    assert hybrid is not None and hybrid.reshard_after_forward is False
    assert str(hybrid) == "8 replicas of 8 shards"


def test_one_device_is_not_sharded_and_the_plan_says_so() -> None:
    words = ["global_train_batch_size=8", "fsdp_config.state_dict_type=full"]
    alone = plan_of("mpt-7b", gpus(1), *words)
    assert alone.sharding is None and alone.init_device == "cpu"
    assert alone.choices["fsdp_config"] == Choice(
        "not sharded",
        "one device has nothing to shard with, so FSDP is left out: it would only copy the weights",
    )
    pure = plan_of("mpt-7b", gpus(1), *words, "fsdp_config.mixed_precision=PURE")
    assert pure.choices["fsdp_config"].reason.endswith("; no effect: mixed_precision: PURE")
    shards = plan_of("mpt-7b", gpus(1), *words[:1])  # of which the checkpoints are sharded
    assert str(shards.sharding) == "1 shard"
    assert "on one device only for checkpoints in shards" in shards.choices["fsdp_config"].reason


def test_where_weights_are_made_follows_from_the_sharding() -> None:
    device = gpus(8)

    def made(*words: str) -> str:
        return make_plan(load("mpt-7b", *words), device).init_device

    assert made() == "meta"
    assert made("fsdp_config.sharding_strategy=NO_SHARD", "fsdp_config.state_dict_type=full") == "cpu"
    rank_0 = ["fsdp_config.load_monolith_rank0_only=true", "fsdp_config.state_dict_type=full"]
    assert made(*rank_0) == "mixed"
    assert made("model.init_device=mixed") == "mixed"
    with pytest.raises(ConfigError, match=r"model.init_device.*Use mixed"):
        made("model.init_device=meta", *rank_0)


def v100() -> Device:
    gpu = GPU("Tesla V100-SXM2-32GB", 32 * GIB, (7, 0), "570.86.15")
    return Device("gpu", gpu.name, memory=gpu.memory, cores=8, gpus=(gpu,))


def test_a_gpu_without_bf16_computes_in_fp32_or_fp16() -> None:
    config = load("mpt-tiny", "precision=amp_bf16")
    assert make_plan(config, v100()).missing["precision"] == (
        "amp_bf16 needs a GPU with bfloat16 units (compute capability 8.0 or newer), which the Tesla "
        "V100-SXM2-32GB doesn't have. Use auto, fp32 or amp_fp16."
    )
    assert "precision" not in make_plan(load("mpt-tiny", "precision=amp_fp16"), v100()).missing
    on_v100 = plan_of("mpt-tiny", v100())
    assert (on_v100.precision, on_v100.attn_impl) == ("fp32", "torch")
    assert (
        plan_of("mpt-tiny", LAPTOP_GPU)
        .choices["precision"]
        .reason.endswith("not known to have bfloat16 units")
    )


def test_a_gpu_that_torch_cannot_use_is_planned_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    current = SETS[0]
    build = TorchBuild("2.14.1+cu130", current.cuda, current.architectures)
    monkeypatch.setattr("mptfoundry.plan.gpu_support.installed_torch", lambda: build)
    plan = plan_of("mpt-tiny", v100())
    assert set(plan.missing) == {"torch"}
    with pytest.raises(ConfigError, match=r"no code for the Tesla V100.*make install SET=composer-pins"):
        refuse_missing(plan)
