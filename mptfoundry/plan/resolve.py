"""What every `auto` of a config means on a device, and the memory estimate that this rests on.

Words: a step trains the global batch; a device computes its share of it in microbatches. Memory is in bytes
for one device, and an estimate. Nothing is built, and torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any, Literal

from mptfoundry.architecture.trainable import matrix_parameters
from mptfoundry.config.engine.schema import show
from mptfoundry.config.model import AnyModelConfig
from mptfoundry.config.parallel import (
    KEEPING,
    FSDPConfig,
    copies_and_shards,
    needs_version_1,
    recomputed_parts,
    resolve_fsdp,
)
from mptfoundry.config.rules import split_problem
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import ConfigError
from mptfoundry.mpt.backends import choose_backend, refusal, why_never, why_not
from mptfoundry.mpt.flops import (
    attention_activations,
    block_activations,
    block_parameters,
    count_parameters,
    ffn_activations,
)
from mptfoundry.mpt.head_config import HeadConfig
from mptfoundry.plan.devices import GIB, Device
from mptfoundry.plan.packages import missing_packages

FP32 = 4
STATE_BYTES = {"decoupled_lionw": FP32, "decoupled_adamw": 2 * FP32}  # of the optimizer, for one parameter
# What each precision computes in, as torch calls it.
COMPUTE_DTYPE = {"fp32": "float32", "amp_bf16": "bfloat16", "amp_fp16": "float16"}
LOSS_CHUNK_LOGITS = {"gpu": 2**27, "cpu": 2**24}
# What the driver, the libraries and the process itself take.
OVERHEAD = {"gpu": 2 * GIB, "cpu": GIB}
# The share of a device's memory to plan with: allocators leave gaps, and a CPU machine has other work.
USABLE = {"gpu": 0.85, "cpu": 0.6}
MOST_WORKERS = 4


@dataclass(frozen=True)
class Resolved:
    """What every `auto` of a config means on a device; what was given stands as it was given.

    Attributes:
        attn_impl: `model.attn_config.attn_impl`.
        loss_fn: `model.loss_fn`.
        init_device: `model.init_device`.
        precision: `precision`.
        fsdp_version: `fsdp_config.version`; None where every device holds a whole copy.
        device_train_microbatch_size: Sequences that a device trains at once.
        device_eval_batch_size: Sequences that a device evaluates at once.
        num_workers: Reading processes for each device, by loader: `train`, and each evaluation label.
        reasons: Why, by the key's path: one entry for each key that was `auto`, one for all `num_workers`.
        lacking: What the config asks for and this machine lacks, a GPU or a package, by the key's path, each
            with what to do. A run can be planned all the same, and `refuse_lacking` refuses to start it.
    """

    attn_impl: str
    loss_fn: str
    init_device: str
    precision: str
    fsdp_version: int | None
    device_train_microbatch_size: int
    device_eval_batch_size: int
    num_workers: dict[str, int]
    reasons: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one device at the height of a step.

    Attributes:
        weights: The float32 weights, or this device's shard.
        gradients: Their gradients.
        optimizer: What the optimizer keeps.
        gathered: Copies of weights and gradients for computing and for sending.
        activations: What forward keeps for backward.
        logits: One chunk of logits and its gradient, and the gradient of the last matrix.
        overhead: What runs besides.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


def resolve_auto(config: TrainConfig, device: Device) -> Resolved:
    """What every `auto` of `config` means on `device`, with the reasons.

    A config always resolves to the same values on the same kind of machine, so that a run that is started
    again computes the same numbers.

    Raises:
        ConfigError: The batch does not split over the devices, the attention backend that is asked for can
            never serve this model, or options exclude one another.
    """
    reasons: dict[str, str] = {}
    lacking = dict(missing_packages(config, device.torch_type))

    def choose(key: str, given: Any, choice: Callable[[], tuple[Any, str]]) -> Any:
        if given != "auto":
            return given
        value, reasons[key] = choice()
        return value

    model, fsdp_version = config.model, _fsdp_version(config, device, reasons, lacking)
    share = device_batch(config, device)
    precision = choose("precision", config.precision, lambda: choose_precision(device))
    if problem := precision_problem(precision, device):
        lacking["precision"] = problem
    microbatch = choose(
        "device_train_microbatch_size",
        config.device_train_microbatch_size,
        lambda: largest_microbatch(config, device, precision),
    )
    microbatch = min(microbatch, share)
    loaders = {"train": config.train_loader, **config.eval_loaders}
    return Resolved(
        attn_impl=_attention(config, device, precision, reasons, lacking),
        loss_fn="torch" if isinstance(model, HeadConfig) else choose("model.loss_fn", model.loss_fn, _loss),
        init_device=_init_device(config, fsdp_version, reasons),
        precision=precision,
        fsdp_version=fsdp_version,
        device_train_microbatch_size=microbatch,
        device_eval_batch_size=choose(
            "device_eval_batch_size", config.device_eval_batch_size, lambda: (microbatch, "as in training")
        ),
        num_workers={
            name: choose("num_workers", loader.num_workers, lambda: choose_workers(device))
            for name, loader in loaders.items()
        },
        reasons=reasons,
        lacking=lacking,
    )


def refuse_lacking(resolved: Resolved) -> None:
    """Raises ConfigError where the config asks for what this machine lacks."""
    if resolved.lacking:
        raise ConfigError([f"{key}: {text}" for key, text in resolved.lacking.items()])


def device_batch(config: TrainConfig, device: Device) -> int:
    """Sequences of one step on one device.

    Raises:
        ConfigError: The global batch does not split over the devices.
    """
    batch = config.global_train_batch_size
    if problem := split_problem(batch, device.count):
        raise ConfigError(f"global_train_batch_size: {problem}")
    return batch // device.count


def choose_precision(device: Device) -> tuple[str, str]:
    """What `precision: auto` means, and why."""
    if device.kind == "cpu":
        return "fp32", "a CPU computes in float32; Composer refuses amp_bf16 there"
    if device.has_bf16:
        return "amp_bf16", "this GPU multiplies in bfloat16 at full speed"
    return "fp32", "this GPU has no bfloat16 units"


def precision_problem(precision: str, device: Device) -> str | None:
    """Why a device can't compute in a precision, and what to do; None if it can."""
    if device.kind == "cpu" and precision != "fp32":
        return f"{precision} needs a GPU. A CPU computes in float32: use auto or fp32."
    return None


def choose_workers(device: Device) -> tuple[int, str]:
    """What `num_workers: auto` means, and why."""
    if device.kind == "cpu":
        return 0, "the processor that would read ahead is the one that computes"
    workers = min(MOST_WORKERS, max(1, device.cores - 1))
    return workers, f"{device.cores} CPU cores for each GPU; samples of tokens need few readers"


def largest_microbatch(config: TrainConfig, device: Device, precision: str) -> tuple[int, str]:
    """The largest divisor of a device's batch whose estimated memory fits, and why."""
    share = device_batch(config, device)
    if device.memory is None:
        return 1, "the device's memory is not known"
    room = int(USABLE[device.kind] * device.memory)
    small = [size for size in range(1, isqrt(share) + 1) if share % size == 0]
    sizes = sorted({*small, *(share // size for size in small)}, reverse=True)
    for size in sizes:
        need = estimate_memory(config, device, size, precision).total
        if need <= room:
            return (
                size,
                f"the largest divisor of {share} that fits: about {_gib(need)} of {_gib(device.memory)}",
            )
    return 1, f"estimated {_gib(need)}, where {_gib(room)} of {_gib(device.memory)} can be planned with"


def _attention(
    config: TrainConfig, device: Device, precision: str, reasons: dict[str, str], lacking: dict[str, str]
) -> str:
    """The backend that is taken: the one that is asked for, if it can serve this model on any machine."""
    model, dtype, key = config.model, COMPUTE_DTYPE[precision], "model.attn_config.attn_impl"
    wanted = model.attn_config.attn_impl
    if wanted == "auto":
        name, reasons[key] = choose_backend(model, device.torch_type, dtype)
        return name
    # `precision: auto` is bfloat16 on the machines that a backend for GPUs is meant for.
    anywhere = "bfloat16" if config.precision == "auto" else dtype
    if never := why_never(wanted, model, anywhere):
        raise ConfigError(f"model.{refusal(wanted, never, model, device.torch_type, dtype)}")
    if reason := why_not(wanted, model, device.torch_type, dtype):
        said = refusal(wanted, reason, model, device.torch_type, dtype)
        lacking[key] = said.partition(": ")[2]
    return wanted


def _loss() -> tuple[str, str]:
    return "torch_crossentropy", "exact, in chunks of tokens: the full logits never exist"


def _init_device(config: TrainConfig, fsdp_version: int | None, reasons: dict[str, str]) -> str:
    """Where weights are made; what is drawn is the same everywhere, so `meta` may give way to `cpu`."""
    given, fsdp = config.model.init_device, config.fsdp_config
    if given == "cpu":
        return given
    if fsdp is None or fsdp_version is None:
        reasons["model.init_device"] = "every device holds the whole model"
        return "cpu"
    if given == "auto":
        reasons["model.init_device"] = "with FSDP each device draws only its own shards"
        given = "meta"
        if fsdp.load_monolith_rank0_only:
            reasons["model.init_device"] = "rank 0 loads the whole model"
            given = "mixed"
    if given == "mixed" and fsdp_version == 1 and not fsdp.sync_module_states:
        raise ConfigError(
            "fsdp_config.sync_module_states: has to be true with model.init_device: mixed and version 1."
        )
    return given


def _fsdp_version(
    config: TrainConfig, device: Device, reasons: dict[str, str], lacking: dict[str, str]
) -> int | None:
    if config.fsdp_config is None:
        return None
    version, _, notes = fsdp_on(config.fsdp_config, device)
    if version == 1 and device.kind == "cpu":
        keys = needs_version_1(config.fsdp_config).items()
        asked_by = ", ".join(f"fsdp_config.{key}: {show(value)}" for key, value in keys)
        why, without = (f", which {asked_by} asks for,", " without it") if asked_by else ("", "")
        lacking["fsdp_config.version"] = f"1{why} needs GPUs. Use version 2{without}, which runs on a CPU."
    if config.fsdp_config.version == "auto":
        reasons["fsdp_config.version"] = "; ".join(notes) or "no key needs version 1"
    return version


def fsdp_on(fsdp: FSDPConfig, device: Device) -> tuple[Literal[1, 2] | None, dict[str, Any], list[str]]:
    """`resolve_fsdp` for the devices of a run."""
    return resolve_fsdp(fsdp, devices=device.count, per_node=device.per_node)


def estimate_memory(config: TrainConfig, device: Device, microbatch: int, precision: str) -> Memory:
    """Bytes of one device at the height of a step that computes `microbatch` sequences at once.

    Activations are counted from what each block keeps for backward (`block_activations`); of what is
    recomputed only the input is kept, and one of them at a time is computed anew.
    """
    model, fsdp = config.model, config.fsdp_config
    learned, block = config.learned, block_parameters(model)
    parameters = count_parameters(model) + learned.adapters
    number = FP32 if precision == "fp32" else 2
    shards = _shards(config, device)
    if shards == 1:
        # autocast's copies of the weights, and the buckets in which DDP sends gradients
        gathered = (parameters * number if number < FP32 else 0) + (
            learned.learned * FP32 if device.count > 1 else 0
        )
    else:
        # weights and gradients of what is never resharded in a step, of one block, and of the next
        working = min(parameters, parameters - model.n_layers * block + 2 * block)
        keeps_all = fsdp is not None and (
            fsdp.sharding_strategy in KEEPING or fsdp.reshard_after_forward is False
        )
        gradients = working * learned.learned // parameters
        gathered = number * (gradients + (parameters if keeps_all else working))
    tokens = microbatch * config.max_seq_len
    kept = _kept_activations(model, fsdp, _adapter_activations(model))
    chunk = min(tokens * model.vocab_size, LOSS_CHUNK_LOGITS[device.kind])
    quantized = matrix_parameters(model) if model.bits else 0
    return Memory(
        weights=(parameters * FP32 - quantized * FP32 + quantized * (model.bits or 0) // 8) // shards,
        gradients=learned.learned * FP32 // shards,
        optimizer=learned.learned * STATE_BYTES[config.optimizer.name] // shards,
        gathered=gathered,
        activations=tokens * kept * number,
        logits=chunk * (FP32 + 2 * number)
        + (model.vocab_size * model.d_model * FP32 if learned.learns_output else 0),
        overhead=OVERHEAD[device.kind],
    )


def _kept_activations(model: AnyModelConfig, fsdp: FSDPConfig | None, adapters: int) -> int:
    """Numbers for each token that all blocks keep on the device for backward; `adapters`: those of one."""
    whole = block_activations(model) + adapters
    if fsdp is None or not fsdp.saves_activations:
        return model.n_layers * whole
    # What a part keeps, and its input, which it still keeps where it is not offloaded.
    sizes = {
        "block": (whole, model.d_model),
        "attention": (attention_activations(model), 0),
        "mlp": (ffn_activations(model), 0),
        "norm": (0, 0),
    }
    parts = recomputed_parts(model.activation_checkpointing_target, model.n_layers)
    kept, largest = model.n_layers * whole, 0
    for part, blocks in parts.items():
        size, rest = sizes[part]
        kept -= len(blocks) * (size - (0 if fsdp.activation_cpu_offload else rest))
        largest = max(largest, size)
    return kept + largest


def _adapter_activations(model: AnyModelConfig) -> int:
    """Numbers for each token that one block's adapters keep: what lies between their two matrices, and with
    dropout what goes into them.
    """
    lora = model.peft_config
    if lora is None:
        return 0
    shapes = lora.adapter_shapes(replace(model.network(), n_layers=1))
    inputs = [shape[1] for name, shape in shapes.items() if ".lora_A." in name]
    return lora.r * len(inputs) + (sum(inputs) if lora.lora_dropout else 0)


def _shards(config: TrainConfig, device: Device) -> int:
    """Over how many devices one copy of the weights is spread."""
    if config.fsdp_config is None:
        return 1
    return copies_and_shards(config.fsdp_config, devices=device.count, per_node=device.per_node)[1]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
