"""The settings that a run could have on a cluster: sharding, activation checkpointing, microbatch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mptfoundry.config.optim import choice_of
from mptfoundry.config.parallel import FSDPConfig, recomputed_parts
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import ConfigError
from mptfoundry.forecast.hardware import Hardware
from mptfoundry.forecast.step_time import OPTIMIZER_BYTES, Rates, Step, StepTime, step_time
from mptfoundry.mpt.flops import attention_activations, block_activations, ffn_activations
from mptfoundry.plan.fsdp import Sharding, plan_sharding
from mptfoundry.plan.memory import FP32, MOMENT_BYTES, Memory, estimate_memory
from mptfoundry.plan.plan import USABLE, Plan

KEPT, RECOMPUTED, OFFLOADED = "kept", "recomputed", "recomputed, inputs offloaded"
# Activation policies as (activation_checkpointing, activation_cpu_offload).
POLICIES = {KEPT: (False, False), RECOMPUTED: (True, False), OFFLOADED: (True, True)}
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD")


@dataclass(frozen=True)
class Setting:
    """One way to run a config on a device.

    Attributes:
        fsdp: Its `fsdp_config`; None: no sharding.
        policy: What happens to activations.
        microbatch: Sequences at once; the largest that fits, or the config's own.
        memory: The estimated memory of a device.
        fits: Whether that leaves the reserve for fragmentation.
        step: What a device computes.
        time: The estimated time of a step; None if nothing is known about the device.
    """

    fsdp: FSDPConfig | None
    policy: str
    microbatch: int
    memory: Memory
    fits: bool
    step: Step
    time: StepTime | None

    @property
    def strategy(self) -> str:
        """Its sharding, as the key names it."""
        return "none" if self.fsdp is None else self.fsdp.sharding_strategy or "FULL_SHARD"


def settings_of(
    config: TrainConfig, plan: Plan, hardware: Hardware | None, rates: Rates
) -> Iterator[Setting]:
    """All settings of a run on the plan's devices: strategies, and policies for activations."""
    for fsdp in _strategies(config, plan):
        for policy in POLICIES:
            if setting := setting_of(config, plan, fsdp, policy, hardware, rates):
                yield setting


def own_setting(config: TrainConfig, plan: Plan, hardware: Hardware | None, rates: Rates) -> Setting:
    """The setting that the config asks for, with its microbatch or the largest that fits."""
    fsdp = config.fsdp_config
    policy = next(
        (name for name, switches in POLICIES.items() if fsdp is not None and switches == _switches(fsdp)),
        KEPT,
    )
    setting = setting_of(config, plan, fsdp, policy, hardware, rates, plan.device_train_microbatch_size)
    assert setting is not None
    return setting


def best_setting(settings: list[Setting]) -> Setting | None:
    """The fastest of the settings that fit; offloading takes time that is not estimated."""
    fitting = [each for each in settings if each.fits and each.policy != OFFLOADED]
    return min(fitting, key=lambda each: each.time.total if each.time else 1 / each.microbatch, default=None)


def words_of(setting: Setting, config: TrainConfig) -> list[str]:
    """The words that give a config this setting, without those that it has already."""
    words = []
    if config.device_train_microbatch_size != setting.microbatch:
        words.append(f"device_train_microbatch_size={setting.microbatch}")
    if setting.fsdp is not None:
        before = config.fsdp_config or FSDPConfig()
        for key in ("sharding_strategy", "activation_checkpointing", "activation_cpu_offload"):
            value = getattr(setting.fsdp, key)
            if value is not None and value != getattr(before, key):
                words.append(f"fsdp_config.{key}={str(value).lower() if isinstance(value, bool) else value}")
        if before.reshard_after_forward is not None and setting.fsdp.reshard_after_forward is None:
            words.append("fsdp_config.reshard_after_forward=null")
    if setting.policy == KEPT and config.model.activation_checkpointing_target is not None:
        words.append("model.activation_checkpointing_target=null")
    return words


def setting_of(
    config: TrainConfig,
    plan: Plan,
    fsdp: FSDPConfig | None,
    policy: str,
    hardware: Hardware | None,
    rates: Rates,
    microbatch: int | None = None,
) -> Setting | None:
    """One setting with its largest microbatch, or with this one; None if it can't be on these devices."""
    device = plan.device
    checkpointing, offload = POLICIES[policy]
    try:
        if fsdp is not None:
            fsdp = replace(fsdp, activation_checkpointing=checkpointing, activation_cpu_offload=offload)
        elif policy != KEPT:
            return None
        sharding = plan_sharding(fsdp, device)[0] if fsdp is not None else None
    except (ConfigError, ValueError):
        return None
    room = USABLE[device.kind] * (device.memory or 0)

    def memory(rows: int) -> Memory:
        args = (config, device, plan.precision, sharding, plan.trainable, rows)
        return estimate_memory(*args, fsdp)

    share = plan.device_train_batch_size
    if microbatch is None:
        divisors = [size for size in range(share, 0, -1) if share % size == 0]
        microbatch = next((size for size in divisors if memory(size).total <= room), 1)
    need = memory(microbatch)
    step = _step(config, plan, fsdp, sharding, microbatch)
    is_timed = hardware is not None and plan.precision != "fp32"
    time = step_time(step, hardware, rates) if is_timed and hardware is not None else None
    return Setting(fsdp, policy, microbatch, need, need.total <= room, step, time)


def _strategies(config: TrainConfig, plan: Plan) -> Iterator[FSDPConfig | None]:
    """The config's own sharding, and other strategies where the config does not say its degrees."""
    own, device = config.fsdp_config, plan.device
    yield own
    if device.count == 1 or (own is not None and _has_degrees(own)):
        return
    for strategy in STRATEGIES:
        if own is not None and strategy == (own.sharding_strategy or "FULL_SHARD"):
            continue
        if strategy == "HYBRID_SHARD" and device.count == device.per_node:
            continue
        changes = {"sharding_strategy": strategy, "reshard_after_forward": None}
        try:
            if strategy == "NO_SHARD" and own is not None and own.state_dict_type == "sharded":
                continue
            yield replace(own or FSDPConfig(), **changes)  # type: ignore[arg-type]
        except ValueError:
            continue


def _has_degrees(fsdp: FSDPConfig) -> bool:
    return fsdp.data_parallel_shard_degree is not None or fsdp.data_parallel_replicate_degree is not None


def _switches(fsdp: FSDPConfig) -> tuple[bool, bool]:
    return fsdp.activation_checkpointing, fsdp.activation_cpu_offload


def _step(
    config: TrainConfig, plan: Plan, fsdp: FSDPConfig | None, sharding: Sharding | None, microbatch: int
) -> Step:
    is_pure = fsdp is not None and fsdp.mixed_precision == "PURE"
    return Step(
        network=config.model.network(),
        seq_len=config.max_seq_len,
        microbatch=microbatch,
        microbatches=-(-plan.device_train_batch_size // microbatch),
        devices=plan.device.count,
        shards=1 if sharding is None else sharding.shards,
        is_sharded=sharding is not None,
        reshards=sharding is not None and sharding.reshard_after_forward is not False,
        recomputed=_recomputed_share(config, fsdp),
        reduced_bytes=2 if is_pure else 4,
        trainable=plan.trainable.parameters,
        adapters=plan.trainable.adapters,
        optimizer_bytes=OPTIMIZER_BYTES.get(config.optimizer.name, OPTIMIZER_BYTES["decoupled_adamw"])
        - 2 * (FP32 - MOMENT_BYTES.get(choice_of(config.optimizer, "momentum_dtype"), FP32)),
    )


def _recomputed_share(config: TrainConfig, fsdp: FSDPConfig | None) -> float:
    """The share of the blocks' arithmetic that backward computes again, by what each part keeps."""
    if fsdp is None or not fsdp.activation_checkpointing:
        return 0.0
    network = config.model.network()
    weight = {"attention": attention_activations(network), "mlp": ffn_activations(network)}
    whole = sum(weight.values())
    parts = recomputed_parts(config.model.activation_checkpointing_target, network.n_layers)
    share = sum(
        len(blocks) * (1.0 if part == "block" else weight.get(part, 0) / whole)
        for part, blocks in parts.items()
    )
    assert block_activations(network) >= whole
    return min(1.0, share / network.n_layers)
