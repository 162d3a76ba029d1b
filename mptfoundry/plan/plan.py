"""The plan of a run: every `auto` of its config resolved for its devices, and the run's numbers.

A plan is made once, at the start of `check` and of a run, and passed on. Parameters, FLOPs, tokens and
batches are exact; memory and time are estimates. Planning builds no model and does not import torch.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mptfoundry.architecture.trainable import Trainable, count_trainable
from mptfoundry.config.optim import choice_of
from mptfoundry.config.rules import split_problem
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import ConfigError
from mptfoundry.mpt.backends import (
    Capability,
    choose_backend,
    is_interpreted,
    refusal,
    why_never,
    why_not,
    why_not_here,
)
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.flops import count_parameters, flops_per_token
from mptfoundry.mpt.head_config import HeadConfig
from mptfoundry.plan.bf16_choice import choose_bf16_weights, why_not_bf16_weights, with_bf16_weights
from mptfoundry.plan.devices import GIB, Device
from mptfoundry.plan.fsdp import Sharding, plan_sharding
from mptfoundry.plan.gpu_support import gpu_problem
from mptfoundry.plan.memory import Memory, estimate_memory
from mptfoundry.plan.packages import missing_packages

# torch's compute dtype for each precision.
COMPUTE_DTYPE = {"fp32": "float32", "amp_bf16": "bfloat16", "amp_fp16": "float16"}
# The fraction of a device's memory to use: allocators fragment, and a CPU machine has other work.
USABLE = {"gpu": 0.85, "cpu": 0.6}
MOST_WORKERS = 4


@dataclass(frozen=True)
class Choice:
    """What a key that was `auto` means on these devices, and why."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Plan:
    """A run on its devices. Explicit values of the config are unchanged.

    Attributes:
        device: The devices of the run.
        precision: `precision`.
        attn_impl: `model.attn_config.attn_impl`.
        loss_fn: `model.loss_fn`.
        fused: `optimizer.fused`.
        bf16_weights: `optimizer.bf16_weights`.
        sharding: How `fsdp_config` shards the weights; None if every device holds all of them.
        init_device: `model.init_device`.
        device_train_batch_size: Sequences of one step on one device.
        device_train_microbatch_size: Sequences that a device trains at once.
        device_eval_batch_size: Sequences that a device evaluates at once.
        num_workers: Loader workers per device, by loader: `train`, and each evaluation label.
        parameters: The number of the model's parameters.
        trainable: How many of these, and of adapters' parameters, are trainable.
        flops_per_token: Training FLOPs, in the convention of published MFU.
        causal_flops_per_token: The same with only the attention that a causal model needs.
        tokens_per_batch: Tokens of one step, over all devices.
        batches: Steps of the run; None if they depend on the size of the data or on time.
        memory: The estimated memory of one device.
        choices: What each key that was `auto` means here, by key path; one for all `num_workers`.
        missing: What the config needs and this machine lacks, a GPU or a package, by key path, with what to
            do. `check` still plans such a run; `train` refuses to start it.
    """

    device: Device
    precision: str
    attn_impl: str
    loss_fn: str
    fused: bool
    bf16_weights: bool
    sharding: Sharding | None
    init_device: str
    device_train_batch_size: int
    device_train_microbatch_size: int
    device_eval_batch_size: int
    num_workers: dict[str, int]
    parameters: int
    trainable: Trainable
    flops_per_token: int
    causal_flops_per_token: int
    tokens_per_batch: int
    batches: int | None
    memory: Memory
    choices: dict[str, Choice]
    missing: dict[str, str]

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole run."""
        return None if self.batches is None else self.batches * self.tokens_per_batch

    @property
    def flops(self) -> int | None:
        """FLOPs of the whole run."""
        return None if self.tokens is None else self.tokens * self.flops_per_token

    def seconds(self, mfu: float) -> float | None:
        """The run's duration at an MFU, a fraction of the device's dense bf16 peak; None if the run's length
        or the peak is unknown.
        """
        if self.flops is None or self.device.peak_flops is None:
            return None
        return self.flops / (mfu * self.device.peak_flops * self.device.count)


def make_plan(config: TrainConfig, device: Device) -> Plan:
    """The plan of `config` on `device`.

    The same config gives the same plan on the same kind of machine, so a restarted run computes the same
    numbers.

    Raises:
        ConfigError: The batch does not split over the devices, the attention backend does not support the
            model, or options exclude each other.
    """
    model, choices = config.model, {}

    def decide(key: str, value: Any, choose: Callable[[], tuple[Any, str]]) -> Any:
        if value != "auto":
            return value
        choices[key] = Choice(*choose())
        return choices[key].value

    sharding, how = plan_sharding(config.fsdp_config, device) if config.fsdp_config else (None, "")
    trainable = count_trainable(model.network(), model.peft_config, config.optimizer.disable_grad)
    share = device_batch(config, device)
    precision = decide("precision", config.precision, lambda: choose_precision(device))
    fuse = partial(choose_fused, config, device)
    fused = decide("optimizer.fused", choice_of(config.optimizer, "fused"), fuse)
    if bf16_weights := precision == "amp_bf16" and choice_of(config.optimizer, "bf16_weights"):
        fits = partial(_fits_as_well, config, device, precision, trainable)
        copies = partial(choose_bf16_weights, config, device, sharding, fused, fits)
        bf16_weights = decide("optimizer.bf16_weights", bf16_weights, copies)
    settled = with_bf16_weights(config, fused) if bf16_weights else config
    memory = partial(estimate_memory, settled, device, precision, sharding, trainable)
    largest = partial(largest_microbatch, share, device, memory)
    size = decide("device_train_microbatch_size", config.device_train_microbatch_size, largest)
    as_in_training = (microbatch := min(share, size), "as in training")
    eval_batch = decide("device_eval_batch_size", config.device_eval_batch_size, lambda: as_in_training)
    choose = partial(_choose_attention, model, device, COMPUTE_DTYPE[precision])
    attention = decide("model.attn_config.attn_impl", model.attn_config.attn_impl, choose)
    own_loss = "torch" if isinstance(model, HeadConfig) else model.loss_fn
    # The values are the same everywhere, so `cpu` may replace `meta`.
    init_device = "auto" if sharding is None and model.init_device != "cpu" else model.init_device
    init_device = decide("model.init_device", init_device, lambda: choose_init_device(config, sharding))
    choices |= {"fsdp_config": Choice(sharding or _replicas(device), how)} if how else {}
    flops = partial(flops_per_token, model, config.max_seq_len)
    loaders, workers = {"train": config.train_loader, **config.eval_loaders}, partial(choose_workers, device)
    return Plan(
        device=device,
        precision=precision,
        attn_impl=attention,
        loss_fn=decide("model.loss_fn", own_loss, lambda: _choose_loss(device)),
        fused=fused,
        bf16_weights=bool(bf16_weights),
        sharding=sharding,
        init_device=init_device,
        device_train_batch_size=share,
        device_train_microbatch_size=microbatch,
        device_eval_batch_size=eval_batch,
        num_workers={name: decide("num_workers", own.num_workers, workers) for name, own in loaders.items()},
        parameters=count_parameters(model),
        trainable=trainable,
        flops_per_token=flops(causal=False) + trainable.extra_flops_per_token,
        causal_flops_per_token=flops(causal=True) + trainable.extra_flops_per_token,
        tokens_per_batch=config.global_train_batch_size * config.max_seq_len,
        batches=config.batches(),
        memory=memory(microbatch),
        choices=choices,
        missing=_lacks(config, device, precision, sharding),
    )


def refuse_missing(plan: Plan) -> None:
    """Raise ConfigError if the config needs something that this machine lacks."""
    if plan.missing:
        raise ConfigError([f"{key}: {text}" for key, text in plan.missing.items()])


def device_batch(config: TrainConfig, device: Device) -> int:
    """Sequences of one step on one device; ConfigError if the global batch does not split."""
    batch = config.global_train_batch_size
    if problem := split_problem(batch, device.count):
        raise ConfigError(f"global_train_batch_size: {problem}")
    return batch // device.count


def choose_precision(device: Device) -> tuple[str, str]:
    """Resolve `precision: auto`; returns the value and the reason."""
    if device.kind == "cpu":
        return "fp32", "a CPU computes in float32; Composer refuses amp_bf16 there"
    if device.has_bf16:
        return "amp_bf16", "this GPU multiplies in bfloat16 at full speed"
    if device.lacks_bf16:
        return "fp32", "this GPU has no bfloat16 units; amp_fp16 is faster, and its gradients can overflow"
    return "fp32", "this GPU is not known to have bfloat16 units"


def precision_problem(precision: str, device: Device) -> str | None:
    """Why a device can't compute in a precision, and what to do; None if it can."""
    if device.kind == "cpu" and precision != "fp32":
        return f"{precision} needs a GPU. A CPU computes in float32: use auto or fp32."
    if precision == "amp_bf16" and device.lacks_bf16:
        return (
            f"amp_bf16 needs a GPU with bfloat16 units (compute capability 8.0 or newer), which the "
            f"{device.name} doesn't have. Use auto, fp32 or amp_fp16."
        )
    return None


def choose_workers(device: Device) -> tuple[int, str]:
    """Resolve `num_workers: auto`; returns the value and the reason."""
    if device.kind == "cpu":
        return 0, "the processor that would read ahead is the one that computes"
    workers = min(MOST_WORKERS, max(1, device.cores - 1))
    return workers, f"{device.cores} CPU cores for each GPU; samples of tokens need few readers"


def largest_microbatch(share: int, device: Device, memory: Callable[[int], Memory]) -> tuple[int, str]:
    """The largest divisor of a device's batch, `share`, whose estimated memory fits, and the reason."""
    if device.memory is None:
        return 1, "the device's memory is not known"
    room = int(USABLE[device.kind] * device.memory)
    for size in range(share, 0, -1):
        if share % size == 0 and (need := memory(size).total) <= room:
            fits = f"about {need / GIB:.1f} GiB of {device.memory / GIB:.1f} GiB"
            return size, f"the largest divisor of {share} that fits: {fits}"
    usable = f"{room / GIB:.1f} of {device.memory / GIB:.1f} GiB are usable"
    return 1, f"none fits: 1 needs about {memory(1).total / GIB:.1f} GiB, and {usable}"


def _fits_as_well(
    config: TrainConfig, device: Device, precision: str, trainable: Trainable, other: TrainConfig
) -> bool:
    """Whether the microbatch of `config`, without FSDP, fits with another config, too, or with neither."""
    memory, other_memory = (
        partial(estimate_memory, each, device, precision, None, trainable) for each in (config, other)
    )
    share, own = device_batch(config, device), config.device_train_microbatch_size
    size = largest_microbatch(share, device, memory)[0] if isinstance(own, str) else min(share, own)
    room = USABLE[device.kind] * (device.memory or math.inf)
    return other_memory(size).total <= room or memory(size).total > room


def _choose_attention(model: MPTConfig, device: Device, dtype: str) -> tuple[str, str]:
    choose = choose_backend if device.is_here else _choose_elsewhere
    return choose(model, device.torch_type, dtype, device.capability)


def _choose_elsewhere(
    model: MPTConfig, device_type: str, dtype: str, capability: Capability | None
) -> tuple[str, str]:
    """Resolve `attn_impl: auto` for a cluster, where torch brings Triton, whatever this machine has."""
    if (
        device_type == "cuda"
        and (capability or (0, 0)) >= (8, 0)
        and why_never("triton", model, dtype) is None
    ):
        return "triton", f"serves this model in {dtype} on {device_type}"
    return choose_backend(model, device_type, dtype, capability)


def _attention_problem(config: TrainConfig, device: Device, dtype: str) -> str | None:
    """Why the config's backend can't be used here, and what to do; None if it can.

    Raises:
        ConfigError: The backend can't compute this model on any machine.
    """
    model, name = config.model, config.model.attn_config.attn_impl
    # On the machines that a GPU backend supports, `precision: auto` is bfloat16.
    anywhere = "bfloat16" if config.precision == "auto" else dtype
    here = device.torch_type, dtype, device.capability
    if never := why_never(name, model, anywhere):
        raise ConfigError(f"model.{refusal(name, never, model, *here)}")
    if reason := why_not(name, model, *here):
        return refusal(name, reason, model, *here).partition(": ")[2]
    return None


def _lacks(config: TrainConfig, device: Device, precision: str, sharding: Sharding | None) -> dict[str, str]:
    """What to do about missing packages, and about GPUs that torch can't use or not in this precision."""
    lacking = missing_packages(config, device.torch_type)
    if (device.gpus or device.trouble) and (problem := gpu_problem(device)):
        lacking.update([problem])
    if config.precision != "auto" and (reason := precision_problem(precision, device)):
        lacking["precision"] = reason
    if config.model.float8_recipe and device.capability is not None and device.capability < (8, 9):
        lacking["model.float8_recipe"] = _no_float8(device.capability)
    if True in (choice_of(config.optimizer, "fused"), choice_of(config.optimizer, "bf16_weights")):
        lacking |= _optimizer_problems(config, device, precision, sharding)
    attention, dtype = config.model.attn_config.attn_impl, COMPUTE_DTYPE[precision]
    if attention != "auto" and (reason := _attention_problem(config, device, dtype)):
        lacking["model.attn_config.attn_impl"] = reason
    return lacking


def _no_float8(capability: Capability) -> str:
    version = ".".join(map(str, capability))
    return f"needs a GPU of compute capability 8.9 or newer, and this one has {version}. Remove it."


def _optimizer_problems(
    config: TrainConfig, device: Device, precision: str, sharding: Sharding | None
) -> dict[str, str]:
    """Why what the optimizer shall do can't be done here, and what to do."""
    reasons = {}
    if choice_of(config.optimizer, "fused") is True:
        reasons["fused"] = why_not_fused(config, device)
    if choice_of(config.optimizer, "bf16_weights") is True:
        reasons["bf16_weights"] = why_not_bf16_weights(config, device, precision, sharding)
    use = "Use auto or false."
    return {f"optimizer.{key}": f"true can't be used: {why}. {use}" for key, why in reasons.items() if why}


def choose_fused(config: TrainConfig, device: Device) -> tuple[bool, str]:
    """Resolve `optimizer.fused: auto`; returns the value and the reason."""
    if device.kind == "cpu":
        return False, "on a CPU the plain step, bit for bit"
    reason = why_not_fused(config, device)
    return reason is None, reason or "weights and state are read and written once"


def why_not_fused(config: TrainConfig, device: Device) -> str | None:
    """Why the optimizer has no step in one pass on a device, one clause; None if it has."""
    if config.optimizer.name == "decoupled_adamw":
        return None
    if device.kind == "cpu" and not is_interpreted():
        compiler = os.environ.get("CXX", "g++")  # as PyTorch looks for it
        return None if shutil.which(compiler) else f"it is compiled, and there is no C++ compiler {compiler}"
    return why_no_kernels(device)


def why_no_kernels(device: Device) -> str | None:
    """Why Triton's kernels can't run on a device, one clause; None if they can."""
    if device.kind == "gpu" and not device.is_here and (device.capability or (0, 0)) >= (8, 0):
        return None  # torch brings Triton to a cluster, whatever this machine has
    return why_not_here("triton", device.torch_type, "float32", device.capability)


def _replicas(device: Device) -> str:
    return f"{device.count} replicas" if device.count > 1 else "not sharded"


def _choose_loss(device: Device) -> tuple[str, str]:
    name = "torch_crossentropy" if device.kind == "cpu" or why_no_kernels(device) else "fused_crossentropy"
    return name, "exact, in chunks of tokens: the full logits never exist"


def choose_init_device(config: TrainConfig, sharding: Sharding | None) -> tuple[str, str]:
    """Resolve `model.init_device: auto`: where weights are initialized; returns the value and the reason."""
    if sharding is None or config.fsdp_config is None:
        return "cpu", "every device holds all weights"
    if config.fsdp_config.load_monolith_rank0_only:
        return "mixed", "rank 0 loads the whole model"
    return "meta", "with FSDP each device draws only its own shards"
