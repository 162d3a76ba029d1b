"""The `fsdp_config` and `compile_config` sections: how a model is sharded over devices and compiled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mptfoundry.config.engine.rules import Problem, Rules, at_least, only_one, refuse_problems
from mptfoundry.config.engine.schema import show
from mptfoundry.errors import ConfigError

# Strategies that free the gathered weights after forward, and those with several replicas.
RESHARDING = ("FULL_SHARD", "HYBRID_SHARD")
HYBRID = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
KEEPING = ("SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2")


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    """Shard weights, gradients and optimizer state over all devices (https://arxiv.org/abs/2304.11277).

    Some keys exist in only one version of FSDP; their default is that version's own.

    Attributes:
        version: PyTorch's first or second FSDP. `auto` is 2, or 1 if a given key needs it.
        sharding_strategy: What is sharded: everything (`FULL_SHARD`), everything except the weights between
            forward and backward (`SHARD_GRAD_OP`), everything within each replica, by default a node
            (`HYBRID_SHARD`, `_HYBRID_SHARD_ZERO2`), or nothing (`NO_SHARD`: DDP, or version 1's own).
        reshard_after_forward: Free the gathered weights between forward and backward. Version 2; in version 1
            `sharding_strategy` decides.
        mixed_precision: `DEFAULT` computes in the low precision and sums gradients in float32, `PURE` does
            both in the low precision, `FULL` neither.
        activation_checkpointing: Recompute activations in backward instead of keeping them: those of each
            block, or of `model.activation_checkpointing_target`.
        activation_checkpointing_reentrant: Recompute in PyTorch's older, reentrant way. Version 1.
        activation_cpu_offload: Keep the activations of the same blocks or parts in the CPU's memory; with
            `activation_checkpointing`, their inputs.
        state_dict_type: `full`: a checkpoint is one file; `sharded`: a folder with one shard per rank.
        load_monolith_rank0_only: Read a whole checkpoint only on rank 0 and send it to the other ranks.
        sync_module_states: Send rank 0's weights to all ranks at the start. Version 1.
        limit_all_gathers: Delay gathers that would not fit into memory. Version 1.
        backward_prefetch: When backward gathers the next weights: before this block's gradients, after them,
            or not ahead of time. Version 2 has only the first.
        backward_prefetch_limit: How many blocks ahead to gather in backward.
        forward_prefetch: Gather the next blocks' weights before forward reaches them.
        forward_prefetch_limit: How many blocks ahead to gather in forward.
        cpu_offload: Keep the shards in the CPU's memory. Version 1.
        auto_wrap: Shard block by block, as the model defines. Version 1; version 2 always does.
        use_orig_params: Keep the parameters' own shapes. Version 1; version 2 always does.
        keep_low_precision_grads: Keep gradients in the low precision. Version 1.
        data_parallel_shard_degree: Shards per replica; -1: the number of devices divided by the replicas.
        data_parallel_replicate_degree: Replicas, each a whole copy of the weights.
        sharded_ckpt_prefix_dir: Folder of a sharded checkpoint. Version 1; in version 2 its name is fixed.
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
        refuse_problems(self)

    def rules(self) -> Rules:
        """What has to hold."""
        yield self._one_strategy()
        yield self._groups_that_reshard()
        yield self._version_2()
        yield self._whole_checkpoints()
        yield self._no_shards_to_save()
        yield self._no_shards_to_cut()
        for name in ("mixed_precision", "load_monolith_rank0_only", "forward_prefetch", "backward_prefetch"):
            yield self._only_for_shards(name)
        yield from at_least(self, forward_prefetch_limit=1, backward_prefetch_limit=1)
        yield self._prefetch()

    def _one_strategy(self) -> Iterator[Problem]:
        reshard, strategy = self.reshard_after_forward, self.sharding_strategy
        if reshard is not None and strategy is not None and reshard != (strategy in RESHARDING):
            yield (
                "reshard_after_forward",
                f"{show(reshard)} is not what sharding_strategy: {strategy} means. Give one of them.",
            )

    def _groups_that_reshard(self) -> Iterator[Problem]:
        reshard = self.reshard_after_forward
        if self.version == 1 and reshard is not None and not isinstance(reshard, bool):
            yield "reshard_after_forward", f"{reshard}. A number is only in version 2."

    def _version_2(self) -> Iterator[Problem]:
        for name, value in needs_version_1(self).items() if self.version == 2 else ():
            yield name, f"{show(value)} is not in version 2. Remove it, or set version: auto or 1."

    def _whole_checkpoints(self) -> Iterator[Problem]:
        if self.load_monolith_rank0_only and self.state_dict_type != "full":
            yield (
                "load_monolith_rank0_only",
                "true reads whole checkpoints. Set state_dict_type: full.",
            )

    def _no_shards_to_save(self) -> Iterator[Problem]:
        if self.sharding_strategy == "NO_SHARD" and self.state_dict_type == "sharded":
            yield "state_dict_type", "sharded: NO_SHARD has no shards to save. Set it to full."

    def _no_shards_to_cut(self) -> Iterator[Problem]:
        degree = self.data_parallel_shard_degree
        if self.sharding_strategy == "NO_SHARD" and degree not in (None, 1, -1):
            yield "data_parallel_shard_degree", f"{degree}: NO_SHARD cuts nothing. Remove one of them."

    def _only_for_shards(self, name: str) -> Iterator[Problem]:
        value = getattr(self, name)
        is_ddp = self.sharding_strategy == "NO_SHARD" and self.version != 1 and not needs_version_1(self)
        if is_ddp and value not in (None, False, "DEFAULT", "FULL"):
            text = "whole copies (DDP) don't have it. Remove it, or set version: 1."
            yield name, f"{show(value)}: {text}"

    def _prefetch(self) -> Iterator[Problem]:
        if self.forward_prefetch_limit is not None and not self.forward_prefetch:
            yield "forward_prefetch_limit", "has no effect without forward_prefetch: true."

    @property
    def saves_activations(self) -> bool:
        """Whether blocks keep less for backward on the device than they compute."""
        return self.activation_checkpointing or self.activation_cpu_offload


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """`torch.compile` for each block of the model.

    Attributes:
        mode: How much compile time to spend, and on what. Default: PyTorch's.
        backend: The compiler.
        fullgraph: Fail if the compiler can't compile a block as one graph.
        dynamic: Compile for changing shapes. Default: PyTorch decides.
        options: Passed to the backend; can't be combined with `mode`.
    """

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    backend: str = "inductor"
    fullgraph: bool = False
    dynamic: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_problems(self)

    def rules(self) -> Rules:
        """What has to hold."""
        yield only_one(self, "are both given. torch.compile takes one of them.", "mode", "options")


def needs_version_1(config: FSDPConfig) -> dict[str, Any]:
    """The keys that were given a value that only PyTorch's first FSDP has."""
    in_both: dict[str, tuple[Any, ...]] = {
        "activation_checkpointing_reentrant": (False,),
        "backward_prefetch": ("BACKWARD_PRE",),
        "cpu_offload": (False,),
        "auto_wrap": (True,),
        "use_orig_params": (True,),
        "keep_low_precision_grads": (False,),
        "sharded_ckpt_prefix_dir": ("ep{epoch}-ba{batch}",),
    }
    given = {name: getattr(config, name) for name in in_both}
    return {name: value for name, value in given.items() if value is not None and value not in in_both[name]}


def copies_and_shards(config: FSDPConfig, *, devices: int, per_node: int) -> tuple[int, int]:
    """How often the weights exist over all devices, and into how many parts each copy is cut.

    Raises:
        ConfigError: That is not what the devices make.
    """
    if config.sharding_strategy == "NO_SHARD":
        return devices, 1
    copies, shards = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
    if copies in (None, -1) and shards in (None, -1):
        hybrid = config.sharding_strategy in HYBRID and devices % per_node == 0
        copies = devices // per_node if hybrid else 1
    if copies is None or copies == -1:
        assert shards is not None
        copies = devices // shards if shards > 0 else 0
    if shards is None or shards == -1:
        shards = devices // copies if copies > 0 else 0
    if copies < 1 or shards < 1 or copies * shards != devices:
        raise ConfigError(
            f"fsdp_config.data_parallel_replicate_degree: {copies} copies of {shards} shards are not the "
            f"{devices} devices of this run. Give one of data_parallel_replicate_degree and "
            f"data_parallel_shard_degree, a divisor of {devices}."
        )
    if shards == 1 < devices:
        raise ConfigError(
            "fsdp_config.data_parallel_shard_degree: 1 shards nothing. Set sharding_strategy: NO_SHARD."
        )
    return copies, shards


def prefetched_blocks(config: FSDPConfig) -> tuple[int, int]:
    """How many blocks ahead version 2 is told to gather in forward and in backward; 0: as it does itself."""
    forward = (config.forward_prefetch_limit or 1) if config.forward_prefetch else 0
    backward = config.backward_prefetch_limit or (1 if config.backward_prefetch else 0)
    return forward, backward


def resolve_fsdp(
    config: FSDPConfig, *, devices: int = 1, per_node: int = 1
) -> tuple[Literal[1, 2] | None, dict[str, Any], list[str]]:
    """Choose the version of FSDP and say the configuration in its words.

    Args:
        config: What was asked for.
        devices: Devices of the run.
        per_node: Devices of it on one machine.

    Returns:
        The version, or None for whole copies (DDP); the keyword arguments of Composer's `FSDPConfig` (1) or
        `FSDP2Config` (2), the latter with `copies` and `shards` where there are several copies; and notes on
        what decided and what has no effect.

    Raises:
        ConfigError: Copies and shards are not what the devices make.
    """
    reasons = [f"fsdp_config.{name}: {show(value)}" for name, value in needs_version_1(config).items()]
    version = config.version
    notes = []
    if version == "auto":
        version = 1 if reasons else 2
        notes += [f"version 1, for {', '.join(reasons)}"] if reasons else []
    copies, shards = copies_and_shards(config, devices=devices, per_node=per_node)
    if version == 1:
        return 1, _version_1(config, copies, shards), notes
    if config.limit_all_gathers is not None or config.sync_module_states is not None:
        notes.append(
            "limit_all_gathers and sync_module_states have no effect: version 2 always does as they ask"
        )
    if config.sharding_strategy == "NO_SHARD":
        return None, {}, [*notes, "NO_SHARD: every device holds a whole copy (DDP)"]
    if copies > 1:
        notes.append(f"{copies} copies, each of {shards} shards")
    return 2, _version_2(config, copies, shards), notes


def _shared(config: FSDPConfig) -> dict[str, Any]:
    names = ("state_dict_type", "load_monolith_rank0_only", "mixed_precision", "verbose")
    return {name: getattr(config, name) for name in names}


def _version_1(config: FSDPConfig, copies: int, shards: int) -> dict[str, Any]:
    strategy: str | None = config.sharding_strategy
    if strategy != "NO_SHARD":
        keeps = strategy in KEEPING or config.reshard_after_forward is False
        names = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2") if copies > 1 else ("FULL_SHARD", "SHARD_GRAD_OP")
        strategy = names[keeps]
    own = (
        *("sync_module_states", "limit_all_gathers", "backward_prefetch", "backward_prefetch_limit"),
        *("forward_prefetch", "forward_prefetch_limit", "cpu_offload", "auto_wrap", "use_orig_params"),
        *("keep_low_precision_grads", "sharded_ckpt_prefix_dir"),
    )
    given = {name: getattr(config, name) for name in own if getattr(config, name) is not None}
    if copies > 1 and strategy != "NO_SHARD":
        given |= {"data_parallel_replicate_degree": copies, "data_parallel_shard_degree": shards}
    return {**_shared(config), **given, "sharding_strategy": strategy}


def _version_2(config: FSDPConfig, copies: int, shards: int) -> dict[str, Any]:
    reshard = config.reshard_after_forward
    if reshard is None:
        reshard = config.sharding_strategy not in KEEPING
    hybrid = {"copies": copies, "shards": shards} if copies > 1 else {}
    return {**_shared(config), **hybrid, "reshard_after_forward": reshard}


BlockChoice = int | tuple[int | str, ...] | str
Target = dict[str, BlockChoice] | tuple[str, ...] | str

PARTS: dict[str, tuple[str, ...]] = {
    "block": ("mptblock",),
    "attention": ("multihead_attention", "multiquery_attention", "grouped_query_attention"),
    "mlp": ("mptmlp", "mptglu"),
    "norm": ("layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm", "triton_rmsnorm"),
}
_PART_OF = {name: part for part, names in PARTS.items() for name in (part, *names)}
_CHOICES = "first-N, last-N, middle-N, range-N-M (without M), every-K, or numbers of blocks"


def recomputed_parts(target: Target | None, n_layers: int) -> dict[str, frozenset[int]]:
    """The blocks of each part that `target` names: `block`, `attention`, `mlp`, `norm` -> numbers of blocks.

    Args:
        target: None: all blocks; a name or a list of them: in all blocks; else the blocks by name, as one
            text with commas, a list, or a number N for the first N.
        n_layers: Blocks of the model.

    Raises:
        ValueError: A name or a choice of blocks is unknown, a block does not exist, or a part is named for a
            block that is also named as a whole.
    """
    every = frozenset(range(n_layers))
    if not isinstance(target, Mapping):
        names = (target,) if isinstance(target, str) else target or ("block",)
        chosen = dict.fromkeys(names, every)
    else:
        chosen = {name: _blocks(name, choice, n_layers) for name, choice in target.items()}
    parts: dict[str, frozenset[int]] = {}
    for name, blocks in chosen.items():
        part = _PART_OF.get(name.lower())
        if part is None:
            known = "; ".join(f"{part} ({', '.join(names)})" for part, names in PARTS.items())
            raise ValueError(f"activation_checkpointing_target: {show(name)} is not a part. Use {known}.")
        parts[part] = parts.get(part, frozenset()) | blocks
    for part in parts.keys() - {"block"}:
        if twice := parts[part] & parts.get("block", frozenset()):
            raise ValueError(
                f"activation_checkpointing_target: block {min(twice)} is recomputed whole, its {part} with "
                "it. Name one of them."
            )
    return parts


def _blocks(name: str, choice: BlockChoice, n_layers: int) -> frozenset[int]:
    where = f"activation_checkpointing_target.{name}"
    if isinstance(choice, int):
        choice = f"first-{choice}"
    entries: Sequence[int | str] = choice.replace(" ", "").split(",") if isinstance(choice, str) else choice
    found: set[int] = set()
    for entry in entries:
        blocks = range(entry, entry + 1) if isinstance(entry, int) else _range(where, entry, n_layers)
        if not blocks or blocks[0] < 0 or blocks[-1] >= n_layers:
            raise ValueError(f"{where}: {show(entry)} is not within the blocks 0 to {n_layers - 1}.")
        found.update(blocks)
    if not found:
        raise ValueError(f"{where}: names no blocks. Use {_CHOICES}.")
    return frozenset(found)


def _range(where: str, entry: str, n_layers: int) -> range:
    match = re.fullmatch(r"(first|last|middle|every)-(\d+)|range-(\d+)-(\d+)|(\d+)", entry)
    if match is None:
        raise ValueError(f"{where}: {show(entry)} is not a choice of blocks. Use {_CHOICES}.")
    kind, size, start, stop, number = match.groups()
    if number is not None:
        return range(int(number), int(number) + 1)
    if kind is None:
        return range(int(start), int(stop))
    count = int(size)
    if kind == "every":
        return range(0, n_layers, count) if count else range(0)
    # The middle as llm-foundry counts it.
    first = {"first": 0, "last": n_layers - count, "middle": (n_layers - 1) // 2 - count // 2}[kind]
    return range(first, first + count)
