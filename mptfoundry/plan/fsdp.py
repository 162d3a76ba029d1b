"""Plan how FSDP2 shards a model over the devices of a run."""

from __future__ import annotations

from dataclasses import dataclass

from mptfoundry.config.parallel import WITHOUT_EFFECT, FSDPConfig, replicas_and_shards
from mptfoundry.plan.devices import Device


@dataclass(frozen=True)
class Sharding:
    """How weights, gradients and optimizer state are sharded over a mesh of replicas and shards.

    Attributes:
        replicas: The number of copies of the weights.
        shards: The number of shards per replica; replicas * shards is the number of devices.
        reshard_after_forward: Whether the gathered weights are freed between forward and backward; an int:
            they are resharded over groups of this many devices.
    """

    replicas: int
    shards: int
    reshard_after_forward: bool | int

    def __str__(self) -> str:
        shards = f"{self.shards} shard{'s' * (self.shards > 1)}"
        return shards if self.replicas == 1 else f"{self.replicas} replicas of {shards}"


def plan_sharding(config: FSDPConfig, device: Device) -> tuple[Sharding | None, str]:
    """The sharding, or None if every device holds all weights (DDP, or one device); and what it is, in words.

    One device is sharded only for `state_dict_type: sharded`, whose checkpoints FSDP writes and reads.

    Raises:
        ConfigError: Replicas * shards is not the number of devices.
    """
    replicas, shards = replicas_and_shards(config, devices=device.count, per_node=device.per_node)
    if device.count == 1 and config.state_dict_type == "full":
        return None, _dropped(config)
    notes = ["NO_SHARD is DDP" if config.sharding_strategy == "NO_SHARD" else "FSDP2"]
    if device.count == 1 and config.sharding_strategy != "NO_SHARD":
        notes.append("on one device only for checkpoints in shards (state_dict_type: sharded)")
    if config.version == 1:
        notes.append("version: 1 means FSDP2 here, too")
    if ignored := [name for name in WITHOUT_EFFECT if getattr(config, name) is not None]:
        notes.append(f"no effect: {', '.join(ignored)}")
    is_sharded = config.sharding_strategy != "NO_SHARD"
    return (Sharding(replicas, shards, config.reshards) if is_sharded else None), "; ".join(notes)


def _dropped(config: FSDPConfig) -> str:
    """Why a single device runs without FSDP, and what is left of the section."""
    text = "one device has nothing to shard with, so FSDP is left out: it would only copy the weights"
    if config.mixed_precision != "DEFAULT":
        text += f"; no effect: mixed_precision: {config.mixed_precision}"
    return text
