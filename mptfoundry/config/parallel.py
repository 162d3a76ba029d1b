"""The `fsdp_config` and `compile_config` sections: how a model is spread over devices and compiled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mptfoundry.config.schema import show
from mptfoundry.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    """Weights, gradients and optimizer state in shards over all devices (https://arxiv.org/abs/2304.11277).

    Some keys exist in one version of FSDP alone; their default is that version's own.

    Attributes:
        version: PyTorch's first or second FSDP. `auto` is 2, or 1 where a given key needs it.
        sharding_strategy: What is sharded: all (`FULL_SHARD`), all but the weights between forward and
            backward (`SHARD_GRAD_OP`), nothing (`NO_SHARD`), or all inside a node (`HYBRID_SHARD`).
            Version 1; version 2 says the first two as `reshard_after_forward`.
        reshard_after_forward: Free the gathered weights between forward and backward. Version 2.
        mixed_precision: `DEFAULT` computes in the low precision and sums gradients in float32, `PURE` does
            both in the low precision, `FULL` neither.
        activation_checkpointing: Recompute each block's activations in backward instead of keeping them.
        activation_checkpointing_reentrant: PyTorch's older way to recompute. Version 1.
        activation_cpu_offload: Keep activations in the CPU's memory.
        state_dict_type: One whole checkpoint file, or a folder of one shard a rank.
        load_monolith_rank0_only: Read a whole checkpoint on rank 0 alone and send it to the others.
        sync_module_states: Send rank 0's weights to all ranks at the start. Version 1.
        limit_all_gathers: Hold back gathers that memory could not take. Version 1.
        backward_prefetch: When the next weights are gathered in backward. Version 1.
        backward_prefetch_limit: How many gathers ahead, backward. Version 1.
        forward_prefetch: Gather the next weights ahead of the forward pass. Version 1.
        forward_prefetch_limit: How many gathers ahead, forward. Version 1.
        cpu_offload: Keep the shards in the CPU's memory. Version 1.
        auto_wrap: Shard block by block, as the model says. Version 1; version 2 always does.
        use_orig_params: Keep the parameters' own shapes. Version 1; version 2 always does.
        keep_low_precision_grads: Keep gradients in the low precision. Version 1.
        data_parallel_shard_degree: Devices that share one copy of the weights; -1: all. Version 1.
        data_parallel_replicate_degree: Copies of the weights. Version 1.
        sharded_ckpt_prefix_dir: Folder of a sharded checkpoint. Version 1; version 2 has this name fixed.
        te_checkpoint_wrapper: Only `false`: Transformer Engine isn't supported.
        te_shard_fp8_weight: Only `false`: Transformer Engine isn't supported.
        verbose: Print how the model was wrapped.
    """

    version: Literal["auto", 1, 2] = "auto"
    sharding_strategy: (
        Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"] | None
    ) = None
    reshard_after_forward: bool | int | None = None
    mixed_precision: Literal["DEFAULT", "PURE", "FULL"] = "DEFAULT"
    activation_checkpointing: bool = False
    activation_checkpointing_reentrant: bool | None = None
    activation_cpu_offload: bool = False
    state_dict_type: Literal["full", "sharded"] = "full"
    load_monolith_rank0_only: bool = False
    sync_module_states: bool | None = None
    limit_all_gathers: bool | None = None
    backward_prefetch: Literal["BACKWARD_PRE", "BACKWARD_POST", "NONE"] | None = None
    backward_prefetch_limit: int | None = None
    forward_prefetch: bool | None = None
    forward_prefetch_limit: int | None = None
    cpu_offload: bool | None = None
    auto_wrap: bool | None = None
    use_orig_params: bool | None = None
    keep_low_precision_grads: bool | None = None
    data_parallel_shard_degree: int | None = None
    data_parallel_replicate_degree: int | None = None
    sharded_ckpt_prefix_dir: str | None = None
    te_checkpoint_wrapper: Literal[False] = False
    te_shard_fp8_weight: Literal[False] = False
    verbose: bool = False

    def __post_init__(self) -> None:
        reshard, strategy = self.reshard_after_forward, self.sharding_strategy
        if reshard is not None and strategy is not None and reshard != (strategy == "FULL_SHARD"):
            raise ValueError(
                f"reshard_after_forward: {show(reshard)} is not what sharding_strategy: {strategy} means. "
                "Give one of them."
            )
        if self.version == 1 and reshard is not None and not isinstance(reshard, bool):
            raise ValueError(f"reshard_after_forward: {reshard}. A number is only in version 2.")
        if self.version == 2 and needs_version_1(self):
            name, value = next(iter(needs_version_1(self).items()))
            raise ValueError(
                f"{name}: {show(value)} is not in version 2. Remove it, or set version: auto or 1."
            )
        if self.load_monolith_rank0_only and self.state_dict_type != "full":
            raise ValueError(
                "load_monolith_rank0_only: true reads whole checkpoints. Set state_dict_type: full."
            )


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """`torch.compile` for each block of the model.

    Attributes:
        mode: What to spend compile time on. Default: PyTorch's.
        backend: Which compiler.
        fullgraph: An error where the compiler can't take a block whole.
        dynamic: Compile for changing shapes. Default: PyTorch decides.
        options: Passed to the backend; not together with `mode`.
    """

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    backend: str = "inductor"
    fullgraph: bool = False
    dynamic: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode is not None and self.options:
            raise ValueError("mode and options are both given. torch.compile takes one of them.")


def needs_version_1(config: FSDPConfig) -> dict[str, Any]:
    """The keys that were given a value that only PyTorch's first FSDP has."""
    in_both: dict[str, tuple[Any, ...]] = {
        "sharding_strategy": ("FULL_SHARD", "SHARD_GRAD_OP"),
        "activation_checkpointing_reentrant": (False,),
        "backward_prefetch": (),
        "backward_prefetch_limit": (),
        "forward_prefetch": (False,),
        "forward_prefetch_limit": (),
        "cpu_offload": (False,),
        "auto_wrap": (True,),
        "use_orig_params": (True,),
        "keep_low_precision_grads": (False,),
        "data_parallel_shard_degree": (-1,),
        "data_parallel_replicate_degree": (1,),
        "sharded_ckpt_prefix_dir": ("ep{epoch}-ba{batch}",),
    }
    given = {name: getattr(config, name) for name in in_both}
    return {name: value for name, value in given.items() if value is not None and value not in in_both[name]}


def resolve_fsdp(
    config: FSDPConfig, *, device_type: str, microbatch_auto: bool
) -> tuple[Literal[1, 2], dict[str, Any], list[str]]:
    """Choose the version of FSDP and say the configuration in its words.

    Args:
        config: What was asked for.
        device_type: `cpu`, or anything else for GPUs.
        microbatch_auto: Whether Composer searches for the microbatch size itself, which only version 1 can.

    Returns:
        The version, the keyword arguments of Composer's `FSDPConfig` (1) or `FSDP2Config` (2), and notes on
        what decided and what has no effect.

    Raises:
        ConfigError: The version can't do what was asked for, or not on this device.
    """
    reasons = [f"fsdp_config.{name}: {show(value)}" for name, value in needs_version_1(config).items()]
    if microbatch_auto:
        reasons.append("device_train_microbatch_size: auto")
    version = config.version
    notes = []
    if version == "auto":
        version = 1 if reasons else 2
        notes += [f"version 1, for {', '.join(reasons)}"] if reasons else []
    if version == 2 and reasons:
        raise ConfigError(
            [f"{reason} is not in version 2 of FSDP. Remove it, or set version: 1." for reason in reasons]
        )
    if version == 1 and device_type == "cpu":
        why = f", which {', '.join(reasons)} asks for," if reasons else ""
        raise ConfigError(f"fsdp_config.version: 1{why} needs GPUs. Version 2 runs on a CPU.")
    if version == 1:
        return 1, _version_1(config), notes
    if config.limit_all_gathers is not None or config.sync_module_states is not None:
        notes.append(
            "limit_all_gathers and sync_module_states have no effect: version 2 always does as they ask"
        )
    return 2, _version_2(config), notes


def _shared(config: FSDPConfig) -> dict[str, Any]:
    names = (
        "activation_checkpointing",
        "activation_cpu_offload",
        "state_dict_type",
        "load_monolith_rank0_only",
    )
    return {name: getattr(config, name) for name in (*names, "mixed_precision", "verbose")}


def _version_1(config: FSDPConfig) -> dict[str, Any]:
    keeps = config.reshard_after_forward is False
    strategy = config.sharding_strategy or ("SHARD_GRAD_OP" if keeps else "FULL_SHARD")
    own = (
        *("sync_module_states", "limit_all_gathers", "backward_prefetch", "backward_prefetch_limit"),
        *("forward_prefetch", "forward_prefetch_limit", "cpu_offload", "auto_wrap", "use_orig_params"),
        *("keep_low_precision_grads", "data_parallel_shard_degree", "data_parallel_replicate_degree"),
        "sharded_ckpt_prefix_dir",
    )
    given = {name: getattr(config, name) for name in own if getattr(config, name) is not None}
    reentrant = bool(config.activation_checkpointing_reentrant)
    return {
        **_shared(config),
        **given,
        "sharding_strategy": strategy,
        "activation_checkpointing_reentrant": reentrant,
    }


def _version_2(config: FSDPConfig) -> dict[str, Any]:
    reshard = config.reshard_after_forward
    if reshard is None:
        reshard = config.sharding_strategy != "SHARD_GRAD_OP"
    return {**_shared(config), "reshard_after_forward": reshard}
