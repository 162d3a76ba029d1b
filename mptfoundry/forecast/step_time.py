"""The time of a training step as a roofline by part, in seconds.

A part is bound by one resource: matrices and attention by arithmetic, elementwise work by the GPU's memory,
gathering weights and reducing gradients by the links between GPUs. Five constants of a GPU say which
share of the published rates is reached; they are fitted to measurements (`constants.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

from mptfoundry.forecast.hardware import Hardware
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.flops import block_parameters, count_parameters
from mptfoundry.mpt.head_config import HeadConfig

# Bytes per feature and token that a forward of a block moves between its matrices (norms, residuals,
# nonlinearity), in 16 bits; a backward moves twice as much.
BYTES_OF_WIDTH, BYTES_OF_FFN = 18, 4
# Bytes per logit that loss and its gradient move.
BYTES_OF_LOGIT = 16
# Of the published memory rate, in the optimizer's step, which streams.
OPTIMIZER_RATE = 0.7
# What an optimizer reads and writes per parameter: weight, gradient, state.
OPTIMIZER_BYTES = {"decoupled_adamw": 36, "decoupled_lionw": 24}


@dataclass(frozen=True)
class Rates:
    """The constants of a GPU.

    Attributes:
        matmul: Reached share of its peak, in matrices.
        attention: Reached share of its peak, in attention, counting what a causal model needs.
        memory: Reached share of its memory's rate, in elementwise work.
        exposed: Share of communication that computation does not hide.
        latency: Seconds of a collective for each doubling of the machines.
    """

    matmul: float
    attention: float
    memory: float
    exposed: float
    latency: float


@dataclass(frozen=True)
class Step:
    """A step of one device.

    Attributes:
        network: The architecture.
        seq_len: Tokens of a sequence.
        microbatch: Sequences at once.
        microbatches: How many of them a step has.
        devices: Devices of the run.
        shards: Devices that hold one replica of the weights together.
        is_sharded: FSDP; otherwise each device holds all weights (DDP).
        reshards: Weights are gathered again in backward.
        recomputed: Share of the blocks that backward computes again.
        reduced_bytes: Bytes of a gradient while it is reduced.
        trainable: Parameters that get gradients, adapters included; None: all.
        adapters: Parameters of adapters.
        optimizer_bytes: What the optimizer moves per trainable parameter.
    """

    network: MPTConfig
    seq_len: int
    microbatch: int
    microbatches: int = 1
    devices: int = 1
    shards: int = 1
    is_sharded: bool = True
    reshards: bool = True
    recomputed: float = 0.0
    reduced_bytes: int = 4
    trainable: int | None = None
    adapters: int = 0
    optimizer_bytes: float = 36

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch."""
        return self.microbatch * self.seq_len

    @cached_property
    def parameters(self) -> int:
        """Parameters of the network with its adapters."""
        return count_parameters(self.network) + self.adapters

    @cached_property
    def blocks(self) -> int:
        """Parameters of all blocks."""
        return self.network.n_layers * block_parameters(self.network)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on one device, by part.

    Attributes:
        matmul: Matrices, of the blocks and of the head.
        attention: Attention's scores and values.
        elementwise: Norms, residuals, nonlinearities and the loss.
        communication: Gathering and reducing that computation does not hide.
        optimizer: The optimizer's step.
        is_bound_by_links: Communication takes longer than computation.
    """

    matmul: float
    attention: float
    elementwise: float
    communication: float
    optimizer: float
    is_bound_by_links: bool = False

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {each.name: getattr(self, each.name) for each in fields(self)[:-1]}

    @property
    def bound_by(self) -> str:
        """The resource that binds most of the step."""
        if self.is_bound_by_links:
            return "links"
        by = {
            "arithmetic": self.matmul + self.attention,
            "memory": self.elementwise + self.optimizer,
            "links": self.communication,
        }
        return max(by, key=lambda name: by[name])


def step_time(step: Step, hardware: Hardware, rates: Rates) -> StepTime:
    """The estimated time of a step."""
    matmul = _matmul_flops(step) / (rates.matmul * hardware.flops)
    attention = _attention_flops(step) / (rates.attention * hardware.flops)
    elementwise = _elementwise_bytes(step) / (rates.memory * hardware.memory)
    computes = matmul + attention + elementwise
    talks, once = _communication(step, hardware, rates)
    exposed = max(computes, talks) + rates.exposed * min(computes, talks) - computes
    trainable = step.parameters if step.trainable is None else step.trainable
    moved = trainable / step.shards * step.optimizer_bytes
    n = step.microbatches
    return StepTime(
        matmul=n * matmul,
        attention=n * attention,
        elementwise=n * elementwise,
        communication=n * exposed + once,
        optimizer=moved / (OPTIMIZER_RATE * hardware.memory),
        is_bound_by_links=talks > computes,
    )


def forward_seconds(step: Step, hardware: Hardware, rates: Rates) -> float:
    """The time of an evaluation's microbatch, which is a forward: a third of a step's arithmetic."""
    plain = StepTime(
        matmul=_matmul_flops(step, backward=False) / (rates.matmul * hardware.flops),
        attention=_attention_flops(step, backward=False) / (rates.attention * hardware.flops),
        elementwise=_elementwise_bytes(step, backward=False) / (rates.memory * hardware.memory),
        communication=_communication(step, hardware, rates)[0] / 3 if step.is_sharded else 0.0,
        optimizer=0.0,
    )
    return plain.total


def _matmul_flops(step: Step, *, backward: bool = True) -> float:
    """FLOPs of the matrices: two per parameter and pass; a frozen matrix gets no gradient of its own."""
    network = step.network
    is_multiplied_too = network.tie_word_embeddings and not isinstance(network, HeadConfig)
    embedding = 0 if is_multiplied_too else network.vocab_size * network.d_model
    multiplied = step.parameters - embedding
    if not backward:
        return 2.0 * step.tokens * multiplied
    trainable = multiplied if step.trainable is None else min(step.trainable, multiplied)
    return 2.0 * step.tokens * (2 * multiplied + trainable + step.recomputed * step.blocks)


def _attention_flops(step: Step, *, backward: bool = True) -> float:
    """FLOPs of causal attention: backward takes 2.5 times a forward, since it computes the scores again."""
    network, window = step.network, step.network.attn_config.sliding_window_size
    keys = step.seq_len if window < 0 else min(step.seq_len, window + 1)
    seen = keys * (2 * step.seq_len - keys) / (2 * step.seq_len)
    forward = 4.0 * step.tokens * seen * network.n_layers * network.n_heads * network.d_head
    return forward * ((3.5 + step.recomputed) if backward else 1.0)


def _elementwise_bytes(step: Step, *, backward: bool = True) -> float:
    network = step.network
    gates = 2 if network.ffn_config.ffn_type == "mptglu" else 1
    of_block = BYTES_OF_WIDTH * network.d_model + BYTES_OF_FFN * network.d_ffn * gates
    passes = (3 + step.recomputed) if backward else 1
    logits = 0 if isinstance(network, HeadConfig) else network.vocab_size * BYTES_OF_LOGIT
    share = 1.0 if backward else 0.25
    return step.tokens * (passes * network.n_layers * of_block + share * logits)


def _communication(step: Step, hardware: Hardware, rates: Rates) -> tuple[float, float]:
    """Seconds of each microbatch's gathers and reductions, and of what a step does once."""
    trainable = step.parameters if step.trainable is None else step.trainable
    replicas = step.devices // step.shards
    per_microbatch = once = 0.0
    if step.is_sharded and step.shards > 1:
        nodes = max(1, -(-step.shards // hardware.per_node))
        moved = 2 * step.parameters * (2 if step.reshards else 1) + step.reduced_bytes * trainable
        per_microbatch = moved * (step.shards - 1) / step.shards / hardware.bus(nodes)
        per_microbatch += 3 * rates.latency * step.network.n_layers * math.log2(nodes)
    if replicas > 1:
        nodes = max(1, -(-step.devices // hardware.per_node))
        # Each device sums its own shard with those of the other replicas, all at once.
        within = min(step.shards, hardware.per_node)
        rate = hardware.bus(nodes) / (within if nodes > 1 and step.is_sharded else 1)
        summed = 2 * 4 * trainable / step.shards * (replicas - 1) / replicas / rate
        reductions = rates.latency * step.network.n_layers * math.log2(nodes)
        if step.is_sharded:
            per_microbatch += summed + reductions
        else:
            once = rates.exposed * (summed + reductions)
    return per_microbatch, once
