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
    """The sharding, or None if every device holds all weights (DDP); and what it is, in words.

    Raises:
        ConfigError: Replicas * shards is not the number of devices.
    """
    replicas, shards = replicas_and_shards(config, devices=device.count, per_node=device.per_node)
    notes = ["NO_SHARD is DDP" if config.sharding_strategy == "NO_SHARD" else "FSDP2"]
    if config.version == 1:
        notes.append("version: 1 means FSDP2 here, too")
    if ignored := [name for name in WITHOUT_EFFECT if getattr(config, name) is not None]:
        notes.append(f"no effect: {', '.join(ignored)}")
    is_sharded = config.sharding_strategy != "NO_SHARD"
    return (Sharding(replicas, shards, config.reshards) if is_sharded else None), "; ".join(notes)
