"""The `fsdp_config` and `compile_config` sections: how a model is spread over devices and compiled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


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
