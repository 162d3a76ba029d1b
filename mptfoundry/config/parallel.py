"""The `fsdp_config` and `compile_config` sections: how a model is sharded over devices and compiled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mptfoundry.config.engine.schema import show
from mptfoundry.config.engine.section_rules import Limits, Problem, Rules, Section, only_one
from mptfoundry.errors import ConfigError

# Strategies that free the gathered weights after forward, and those with several replicas.
RESHARDING = ("FULL_SHARD", "HYBRID_SHARD")
HYBRID = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
# What these keys of PyTorch's first FSDP may say here: what FSDP2 always does. Then what helps instead.
_ALWAYS: dict[str, tuple[Any, str]] = {
    "activation_checkpointing_reentrant": (
        False,
        "Activations are recomputed without reentering autograd, with the same numbers. Remove it.",
    ),
    "backward_prefetch": (
        "BACKWARD_PRE",
        "FSDP2 gathers the next block's weights before this block's gradients: BACKWARD_PRE. Remove it.",
    ),
    "cpu_offload": (
        False,
        "These save memory, too: more shards, LoRA (model.peft_config), on a quantized base "
        "(model.load_in_8bit), or fsdp_config.activation_cpu_offload.",
    ),
    "auto_wrap": (True, "FSDP2 shards block by block. Remove it."),
    "keep_low_precision_grads": (
        False,
        "More shards and LoRA (model.peft_config) save memory, too. Remove it.",
    ),
    "sharded_ckpt_prefix_dir": (
        "ep{epoch}-ba{batch}",
        "A start finds sharded checkpoints by their name, ep{epoch}-ba{batch}. Remove it.",
    ),
}
# These make no difference, whatever they say.
WITHOUT_EFFECT = ("sync_module_states", "limit_all_gathers", "use_orig_params")


@dataclass(frozen=True, kw_only=True)
class FSDPConfig(Section):
    """Shard weights, gradients and optimizer state over all devices, with PyTorch's FSDP2
    (https://arxiv.org/abs/2304.11277).

    Keys of PyTorch's first FSDP are accepted where FSDP2 does the same, and refused elsewhere.

    Attributes:
        version: Accepted for older configs: it is always FSDP2.
        sharding_strategy: What is sharded: everything (`FULL_SHARD`), everything except the weights between
            forward and backward (`SHARD_GRAD_OP`), everything within each replica, by default a node
            (`HYBRID_SHARD`, `_HYBRID_SHARD_ZERO2`), or nothing (`NO_SHARD`: DDP).
        reshard_after_forward: Free the gathered weights between forward and backward; a number: keep them in
            groups of so many devices. Default: as `sharding_strategy` says.
        mixed_precision: `DEFAULT` computes in the low precision and sums gradients in float32, `PURE` does
            both in the low precision, `FULL` neither.
        activation_checkpointing: Recompute activations in backward instead of keeping them: those of each
            block, or of `model.activation_checkpointing_target`.
        activation_checkpointing_reentrant: Only `false`.
        activation_cpu_offload: Keep the activations of the same blocks or parts in the CPU's memory; with
            `activation_checkpointing`, their inputs.
        state_dict_type: `full`: a checkpoint is one file; `sharded`: a folder with one shard per rank.
        load_monolith_rank0_only: Read a whole checkpoint only on rank 0 and send it to the other ranks.
        sync_module_states: No effect: every rank starts from the same weights.
        limit_all_gathers: No effect: FSDP2 needs no such limit.
        backward_prefetch: Only `BACKWARD_PRE`: gather the next weights before this block's gradients.
        backward_prefetch_limit: How many blocks ahead to gather in backward.
        forward_prefetch: Gather the next blocks' weights before forward reaches them.
        forward_prefetch_limit: How many blocks ahead to gather in forward.
        cpu_offload: Only `false`.
        auto_wrap: Only `true`.
        use_orig_params: No effect: parameters always keep their own shapes.
        keep_low_precision_grads: Only `false`.
        data_parallel_shard_degree: Shards per replica; -1: the number of devices divided by the replicas.
        data_parallel_replicate_degree: Replicas, each with all weights.
        sharded_ckpt_prefix_dir: Only `ep{epoch}-ba{batch}`.
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

    limits: ClassVar = {"forward_prefetch_limit": Limits(1), "backward_prefetch_limit": Limits(1)}

    def rules(self) -> Rules:
        yield self._one_strategy()
        for name in _ALWAYS:
            yield self._always(name)
        yield self._whole_checkpoints()
        yield self._no_shards_to_save()
        yield self._no_shards_to_cut()
        for name in ("mixed_precision", "load_monolith_rank0_only", "forward_prefetch", "backward_prefetch"):
            yield self._only_for_shards(name)
        yield self._prefetch()

    def _one_strategy(self) -> Iterator[Problem]:
        reshard, strategy = self.reshard_after_forward, self.sharding_strategy
        if reshard is not None and strategy is not None and reshard != (strategy in RESHARDING):
            yield (
                "reshard_after_forward",
                f"{show(reshard)} is not what sharding_strategy: {strategy} means. Give one of them.",
            )

    def _always(self, name: str) -> Iterator[Problem]:
        value, (always, instead) = getattr(self, name), _ALWAYS[name]
        if value is not None and value != always:
            yield name, f"{show(value)} is only in PyTorch's first FSDP, and this is FSDP2. {instead}"

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
        if self.sharding_strategy == "NO_SHARD" and value not in (None, False, "DEFAULT", "FULL"):
            yield name, f"{show(value)} only applies to shards, and NO_SHARD has none (DDP). Remove it."

    def _prefetch(self) -> Iterator[Problem]:
        if self.forward_prefetch_limit is not None and not self.forward_prefetch:
            yield "forward_prefetch_limit", "has no effect without forward_prefetch: true."

    @property
    def saves_activations(self) -> bool:
        """Whether blocks keep less for backward on the device than they compute."""
        return self.activation_checkpointing or self.activation_cpu_offload

    @property
    def reshards(self) -> bool | int:
        """`reshard_after_forward`, or what `sharding_strategy` says of it."""
        if self.reshard_after_forward is not None:
            return self.reshard_after_forward
        return self.sharding_strategy is None or self.sharding_strategy in RESHARDING

    @property
    def prefetched_blocks(self) -> tuple[int, int]:
        """How many blocks ahead to gather in forward and in backward; 0 leaves it to FSDP2."""
        forward = (self.forward_prefetch_limit or 1) if self.forward_prefetch else 0
        backward = self.backward_prefetch_limit or (1 if self.backward_prefetch else 0)
        return forward, backward


@dataclass(frozen=True, kw_only=True)
class CompileConfig(Section):
    """`torch.compile` for each block of the model.

    Attributes:
        mode: How much compile time to spend, and on what. Default: PyTorch's.
        backend: The compiler.
        fullgraph: Fail if the compiler can't compile a block as one graph. Default: `true` if attention is
            `triton` or `flash`.
        dynamic: Compile for changing shapes. Default: PyTorch decides.
        options: Passed to the backend; can't be combined with `mode`.
    """

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    backend: str = "inductor"
    fullgraph: bool | None = None
    dynamic: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def rules(self) -> Rules:
        yield only_one(self, "are both given. torch.compile takes one of them.", "mode", "options")


def replicas_and_shards(config: FSDPConfig, *, devices: int, per_node: int) -> tuple[int, int]:
    """How often the weights exist over all devices, and into how many shards each replica is cut.

    Raises:
        ConfigError: Replicas times shards are not the devices.
    """
    if config.sharding_strategy == "NO_SHARD":
        return devices, 1
    replicas, shards = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
    if replicas in (None, -1) and shards in (None, -1):
        hybrid = config.sharding_strategy in HYBRID and devices % per_node == 0
        replicas = devices // per_node if hybrid else 1
    if replicas is None or replicas == -1:
        assert shards is not None
        replicas = devices // shards if shards > 0 else 0
    if shards is None or shards == -1:
        shards = devices // replicas if replicas > 0 else 0
    if replicas < 1 or shards < 1 or replicas * shards != devices:
        raise ConfigError(
            f"fsdp_config.data_parallel_replicate_degree: {replicas} replicas of {shards} shards are not the "
            f"{devices} devices of this run. Give one of data_parallel_replicate_degree and "
            f"data_parallel_shard_degree, a divisor of {devices}."
        )
    if shards == 1 < devices:
        raise ConfigError(
            "fsdp_config.data_parallel_shard_degree: 1 shards nothing. Set sharding_strategy: NO_SHARD."
        )
    return replicas, shards


BlockChoice = int | tuple[int | str, ...] | str
Target = dict[str, BlockChoice] | tuple[str, ...] | str

PARTS: dict[str, tuple[str, ...]] = {
    "block": ("mptblock",),
    "attention": ("multihead_attention", "multiquery_attention", "grouped_query_attention"),
    "mlp": ("mptmlp", "mptglu"),
    "norm": ("layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm", "triton_rmsnorm"),
    "act_fn": ("ffn_act_fn",),
}
_CONTAINED = (*((part, "block") for part in PARTS if part != "block"), ("act_fn", "mlp"))
_PART_OF = {name: part for part, names in PARTS.items() for name in (part, *names)}
_CHOICES = "first-N, last-N, middle-N, range-N-M (without M), every-K, or numbers of blocks"


def recomputed_parts(target: Target | None, n_layers: int) -> dict[str, frozenset[int]]:
    """The blocks of each part that `target` names: `block`, `mlp`, `act_fn`, ... -> numbers of blocks.

    Args:
        target: None: all blocks; a name or a list of them: in all blocks; else the blocks by name, as one
            text with commas, a list, or a number N for the first N.
        n_layers: Blocks of the model.

    Raises:
        ValueError: A name or a choice of blocks is unknown, a block does not exist, or a part is named for a
            block in which a larger part that contains it is named, too.
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
    for part, whole in _CONTAINED:
        if twice := parts.get(part, frozenset()) & parts.get(whole, frozenset()):
            name = f"block {min(twice)}" if whole == "block" else f"the {whole} of block {min(twice)}"
            raise ValueError(
                f"activation_checkpointing_target: {name} is recomputed whole, its {part} with it. Name one "
                "of them."
            )
    return parts


def target_problems(target: Target, n_layers: int) -> Iterator[Problem]:
    """The problem of a `target` that does not fit a model of this many blocks, if there is one."""
    try:
        recomputed_parts(target, n_layers)
    except ValueError as error:
        key, _, text = str(error).partition(": ")
        yield key, text


def _blocks(name: str, choice: BlockChoice, n_layers: int) -> frozenset[int]:
    where = f"activation_checkpointing_target.{name}"
    if isinstance(choice, int):
        choice = f"first-{choice}"
    entries: Sequence[int | str] = choice.replace(" ", "").split(",") if isinstance(choice, str) else choice
    numbers: set[int] = set()
    for entry in entries:
        blocks = range(entry, entry + 1) if isinstance(entry, int) else _range(where, entry, n_layers)
        if not blocks or blocks[0] < 0 or blocks[-1] >= n_layers:
            raise ValueError(f"{where}: {show(entry)} is not within the blocks 0 to {n_layers - 1}.")
        numbers.update(blocks)
    if not numbers:
        raise ValueError(f"{where}: names no blocks. Use {_CHOICES}.")
    return frozenset(numbers)


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
