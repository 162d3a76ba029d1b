"""Estimate the memory of a step on one device from the config alone, in bytes.

Activations are what each block saves for backward (`block_activations`). With activation checkpointing a
block saves only its input, and one block at a time is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mptfoundry.architecture.trainable import Trainable, matrix_parameters
from mptfoundry.config.model import AnyModelConfig
from mptfoundry.config.optim import MOMENTUM_GROUP, OptimizerConfig, choice_of
from mptfoundry.config.parallel import FSDPConfig, recomputed_parts
from mptfoundry.config.run import TrainConfig
from mptfoundry.mpt.flops import (
    act_fn_activations,
    attention_activations,
    block_activations,
    block_parameters,
    count_parameters,
    ffn_activations,
)
from mptfoundry.plan.bf16_choice import has_bf16_gradients
from mptfoundry.plan.devices import GIB, Device
from mptfoundry.plan.fsdp import Sharding

FP32 = 4
# Numbers per parameter that an optimizer keeps; one of the user's own is taken to be like AdamW.
MOMENTS = {"decoupled_lionw": 1, "decoupled_adamw": 2}
# Of each of them, by `momentum_dtype`; else float32. In 8 bits, 64 numbers share a scale in float32.
MOMENT_BYTES: dict[bool | str, float] = {"bfloat16": 2, "int8": 1 + FP32 / MOMENTUM_GROUP}
LOSS_CHUNK_LOGITS = 2**23  # on a CPU
LOSS_CHUNK_BYTES = 2**30  # on a GPU
# Memory of the driver, the libraries and the process itself.
OVERHEAD = {"gpu": 2 * GIB, "cpu": GIB}


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one device at the peak of a step.

    Attributes:
        weights: The float32 weights, or this device's shard.
        gradients: Their gradients, as far as they exist then.
        optimizer: The optimizer's state.
        gathered: Low-precision and gathered weights and gradients, for compute and communication; with
            `optimizer.bf16_weights` also the copies of the matrices.
        activations: Tensors that forward saves for backward, and those of the block that is computed.
        logits: One chunk of logits and its gradient, and the gradient of the output projection.
        overhead: Everything else.
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
        """The sum of all parts."""
        return sum(vars(self).values())


def estimate_memory(
    config: TrainConfig,
    device: Device,
    precision: str,
    sharding: Sharding | None,
    trainable: Trainable,
    microbatch: int,
    fsdp: FSDPConfig | Literal["own"] | None = "own",
) -> Memory:
    """Bytes of a device at the peak of a step on `microbatch` sequences; `fsdp` replaces the config's own.

    Gradients come into being while activations go. So the peak is at the end of forward, in the last block,
    in the first one, or in the optimizer's step. `optimizer.bf16_weights` counts where it is true.
    """
    model, fsdp = config.model, config.fsdp_config if isinstance(fsdp, str) else fsdp
    everything = _everything(config, device, precision, sharding, trainable, microbatch, fsdp)
    accumulates = config.global_train_batch_size > microbatch * device.count
    forward = replace(everything, gradients=everything.gradients if accumulates else 0)
    number = FP32 if precision == "fp32" else 2
    stream = microbatch * config.max_seq_len * model.d_model * number
    block_keeps = block_activations(model) + (_adapter_activations(model) if model.peft_config else 0)
    recomputed, *parts = _recomputed(model, block_keeps) if fsdp and fsdp.saves_activations else (0, 0, 0)
    largest, in_last = (microbatch * config.max_seq_len * number * part for part in parts)
    last = first = stepping = everything.gathered
    if sharding is None or sharding.shards == 1:  # backward frees autocast's copies; DDP's buckets stay
        copies = number * block_parameters(model) if number < FP32 else 0
        stepping = trainable.parameters * FP32 if device.count > 1 else 0
        last, first = everything.gathered - recomputed * copies, stepping + copies
        if choice_of(config.optimizer, "bf16_weights") is True:
            last = first = stepping = stepping + number * matrix_parameters(model)
            everything = everything if accumulates else _with_bf16_gradients(everything, config)
    output = model.vocab_size * model.d_model * FP32 if trainable.trains_output else 0
    gradients = everything.gradients * (model.n_layers - 1) // model.n_layers
    kept = microbatch * config.max_seq_len * block_keeps * number
    # The `torch` backend's scores of a block of tokens, their probabilities and the gradients of both.
    scores = 4 * microbatch * model.n_heads * min(config.max_seq_len, 256) ** 2 * number
    busy = 6 * stream + (scores if device.kind == "cpu" else 0)
    held = forward.activations - largest
    return max(
        # The norm's input, the hidden states and their gradient.
        replace(forward, activations=held + 3 * stream),
        # The stream's gradient, and that of the widest matrix's input.
        replace(forward, activations=held + in_last + busy, logits=output, gathered=last),
        replace(everything, gradients=gradients, gathered=first, activations=kept + busy - stream, logits=0),
        # The embedding's gradient, or the optimizer's direction.
        replace(everything, gathered=stepping, activations=0, logits=output),
        key=lambda moment: moment.total,
    )


def state_bytes(optimizer: OptimizerConfig, parameters: int) -> int:
    """Bytes of an optimizer's state for so many parameters."""
    each = MOMENT_BYTES.get(choice_of(optimizer, "momentum_dtype"), FP32)
    return int(parameters * MOMENTS.get(optimizer.name, 2) * each)


def _everything(
    config: TrainConfig,
    device: Device,
    precision: str,
    sharding: Sharding | None,
    trainable: Trainable,
    microbatch: int,
    fsdp: FSDPConfig | None,
) -> Memory:
    """What can exist in a step at all."""
    model, number = config.model, FP32 if precision == "fp32" else 2
    parameters = count_parameters(model) + trainable.adapters
    shards = 1 if sharding is None else sharding.shards
    if sharding is None or shards == 1:  # autocast's low-precision weights, and DDP's gradient buckets
        gathered = parameters * number if number < FP32 else 0
        gathered += trainable.parameters * FP32 if device.count > 1 else 0
    else:
        gathered = number * _gathered_parameters(model, parameters, trainable, sharding)
    tokens = microbatch * config.max_seq_len
    block_keeps = block_activations(model) + (_adapter_activations(model) if model.peft_config else 0)
    saved = _saved_activations(model, fsdp, block_keeps) if fsdp and fsdp.saves_activations else 0
    quantized = matrix_parameters(model) if model.bits else 0
    return Memory(
        weights=(parameters * FP32 - quantized * FP32 + quantized * (model.bits or 0) // 8) // shards,
        gradients=trainable.parameters * FP32 // shards,
        optimizer=state_bytes(config.optimizer, trainable.parameters) // shards,
        gathered=gathered,
        activations=tokens * (model.n_layers * block_keeps - saved) * number,
        logits=_CHUNK[device.kind](model, tokens * model.vocab_size, number)
        + (model.vocab_size * model.d_model * FP32 if trainable.trains_output else 0),
        overhead=OVERHEAD[device.kind],
    )


def _chunk_on_cpu(model: AnyModelConfig, logits: int, number: int) -> int:
    chunk = min(logits, LOSS_CHUNK_LOGITS)
    return chunk * FP32 * (1 + (logits > chunk))  # changed in place, and freed once the next one exists


def _chunk_on_gpu(model: AnyModelConfig, logits: int, number: int) -> int:
    """Bytes of a chunk of the loss at its peak, of so many logits with `number` bytes each."""
    if model.loss_fn == "torch_crossentropy":
        return min(logits * 2 * FP32, LOSS_CHUNK_BYTES)
    return logits * number // max(1, -(-logits * number // LOSS_CHUNK_BYTES))


def _with_bf16_gradients(memory: Memory, config: TrainConfig) -> Memory:
    """The gradients of a single microbatch in bfloat16, if they stay so with `optimizer.bf16_weights`."""
    if not has_bf16_gradients(config, choice_of(config.optimizer, "fused") is True):
        return memory
    return replace(memory, gradients=memory.gradients - FP32 // 2 * matrix_parameters(config.model))


def _gathered_parameters(
    model: AnyModelConfig, parameters: int, trainable: Trainable, sharding: Sharding
) -> int:
    """Weights and gradients of the root, which is not resharded in a step, of one block, and of the next."""
    block = block_parameters(model)
    working = min(parameters, parameters - model.n_layers * block + 2 * block)
    weights = parameters if sharding.reshard_after_forward is False else working
    return working * trainable.parameters // parameters + weights


def _saved_activations(model: AnyModelConfig, fsdp: FSDPConfig, block_keeps: int) -> int:
    """Numbers per token that checkpointing and offloading remove from the device's memory.

    Recomputation brings them back, one part at a time.
    """
    sizes = _sizes(model, block_keeps)
    parts = recomputed_parts(model.activation_checkpointing_target, model.n_layers)
    saved, largest = 0, 0
    for part, blocks in parts.items():
        size, rest = sizes[part]
        saved += len(blocks) * (size - (0 if fsdp.activation_cpu_offload else rest))
        largest = max(largest, size)
    return saved - largest


def _sizes(model: AnyModelConfig, block_keeps: int) -> dict[str, tuple[int, int]]:
    """Numbers per token of a part, and of its input, which stays on the device unless it is offloaded.

    Of the norms and the activation function the outputs are recomputed from inputs that are kept anyway.
    """
    return {
        "block": (block_keeps, model.d_model),
        "attention": (attention_activations(model), 0),
        "mlp": (ffn_activations(model), 0),
        "norm": (2 * model.d_model, 0),
        "act_fn": (act_fn_activations(model), 0),
    }


def _recomputed(model: AnyModelConfig, block_keeps: int) -> tuple[int, int, int]:
    """How many blocks are recomputed as a whole; the numbers per token of the largest part that is recomputed
    anywhere, and of the largest in the last block."""
    parts = recomputed_parts(model.activation_checkpointing_target, model.n_layers)
    sizes = {part: _sizes(model, block_keeps)[part][0] for part in parts}
    in_last = (sizes[part] for part, blocks in parts.items() if model.n_layers - 1 in blocks)
    return len(parts.get("block", ())), max(sizes.values()), max(in_last, default=0)


def _adapter_activations(model: AnyModelConfig) -> int:
    """Numbers per token that one block's adapters keep: `lora_A`'s output, and with dropout its input."""
    lora = model.peft_config
    assert lora is not None
    shapes = lora.adapter_shapes(replace(model.network(), n_layers=1))
    inputs = [shape[1] for name, shape in shapes.items() if ".lora_A." in name]
    return lora.r * len(inputs) + (sum(inputs) if lora.lora_dropout else 0)


_CHUNK = {"cpu": _chunk_on_cpu, "gpu": _chunk_on_gpu}
