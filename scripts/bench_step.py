"""Time a training step of a run's network alone: forward, loss, backward, clipping and optimizer, no loader.

    python scripts/bench_step.py [config=configs/mpt-125m.yaml] [batch=8] [steps=20] [key=value ...]
        [out=FILE.json] [lines=true]

It trains on random tokens, on the GPU if there is one (bf16), otherwise on the CPU (fp32), with the run's own
optimizer and parameter groups, clipping and activation checkpointing. Medians: the step, its parts, tokens/s,
and both MFUs if the device's peak is known. The *limit* is the time of the step's bare matrix products and of
plain causal attention in the same run, on a CPU after each step, on a GPU after the last; nothing else of the
step is in it.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_ceilings import Piece, pieces_of, seconds_of
from timing import seconds_between, stamp

from mptfoundry.config.load import load_train_config
from mptfoundry.config.parallel import recomputed_parts
from mptfoundry.config.run import TrainConfig
from mptfoundry.models.activation_checkpointing import checkpoint_activations
from mptfoundry.mpt.flops import count_parameters, flops_per_token
from mptfoundry.mpt.network import MPT
from mptfoundry.optim.bf16_weights import use_bf16_weights
from mptfoundry.optim.gradients import clamp, global_norm, scale_for_norm, scale_to_norm
from mptfoundry.optim.groups import parameter_groups
from mptfoundry.optim.lion import DecoupledLionW
from mptfoundry.plan.bf16_choice import has_bf16_gradients
from mptfoundry.plan.devices import detect_device, keep_freed_memory
from mptfoundry.plan.plan import make_plan

WARMUP_STEPS = 3
# What `mptfoundry plan ... measured=FILE.json` needs to know about the network.
SIZES = ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size", "expansion_ratio")
PARTS = ("forward", "backward", "clipping", "optimizer")


def main(words: list[str]) -> int:
    from words import tell

    options = dict(word.split("=", 1) for word in words)
    own = {"config": "configs/mpt-125m.yaml", "batch": "8", "steps": "20", "out": "", "lines": ""} | options
    ours = ("config", "batch", "steps", "out", "lines")
    overrides = [f"{key}={value}" for key, value in options.items() if key not in ours]
    config, _ = load_train_config(own["config"], overrides)
    row = measure(config, int(own["batch"]), int(own["steps"]))
    for key, value in row.items():
        print(f"  {key:32} {value}")
    tell(own, **row)
    if own["out"]:
        Path(own["out"]).write_text(json.dumps([row], indent=2) + "\n")
    return 0


def measure(config: TrainConfig, batch: int, steps: int) -> dict[str, object]:
    """Medians over `steps` training steps of `batch` sequences, after a few that warm up."""
    device = detect_device(world_size=1)
    kind = "cuda" if device.kind == "gpu" else "cpu"
    return measure_work(Work(config, kind, batch, batch, torch.bfloat16 if kind == "cuda" else None), steps)


def measure_work(work: Work, steps: int) -> dict[str, object]:
    """The same for work that is described in full."""
    config, batch, kind, device = work.config, work.rows, work.kind, detect_device(world_size=1)
    network_config, seq_len = config.model.network(), config.max_seq_len
    peak, measured, limits = run_steps(work, steps)
    whole = [seconds_between(moments[0][1], moments[-1][1]) for moments in measured]
    per_step = statistics.median(whole)
    per_second = batch * seq_len / per_step
    row: dict[str, object] = {
        "device": device.name,
        "parameters": count_parameters(network_config),
        "network": {name: getattr(network_config, name) for name in SIZES},
        "batch x seq_len": f"{batch} x {seq_len}",
        "milliseconds per step": round(per_step * 1000, 1),
    }
    for part in PARTS:
        took = statistics.median(seconds_of_part(part, moments) for moments in measured)
        row[f"milliseconds of {part}"] = round(took * 1000, 1)
    row["milliseconds at the limit"] = round(1000 * statistics.median(limits), 1)
    ratios = [seconds / limit for seconds, limit in zip(whole, limits, strict=True)]
    row["step over the limit"] = round(statistics.median(ratios), 3)
    row["tokens per second"] = round(per_second)
    for name, causal in (("mfu", False), ("mfu_causal", True)):
        if device.peak_flops:
            flops = flops_per_token(network_config, seq_len, causal=causal)
            row[name] = round(per_second * flops / device.peak_flops, 4)
    if kind == "cuda":
        row["peak GiB"] = round(peak / 2**30, 2)
    return row


@dataclass(frozen=True)
class Work:
    """A step of training.

    Attributes:
        config: Of the run.
        kind: `cpu` or `cuda`.
        rows: Of a step.
        microbatch: Rows at once.
        dtype: Of autocast; None: everything is in float32.
    """

    config: TrainConfig
    kind: str
    rows: int
    microbatch: int
    dtype: torch.dtype | None

    def start(self) -> tuple[Any, torch.optim.Optimizer, torch.Tensor]:
        """The network, its optimizer and random tokens of a microbatch."""
        network = make_network(self.config, self.kind)
        shape = (self.microbatch, self.config.max_seq_len)
        ids = torch.randint(self.config.model.network().vocab_size, shape, device=self.kind)
        plan = make_plan(self.config, detect_device(world_size=1))
        return network, make_optimizer(self.config, network, plan.fused, plan.bf16_weights), ids

    def train(
        self, network: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, enter: Callable[[str], None]
    ) -> None:
        """One step; `enter` is called with the name of each part that begins, and with `end`."""
        for _ in range(self.rows // self.microbatch):
            enter("forward")
            with torch.autocast(self.kind, dtype=self.dtype, enabled=self.dtype is not None):
                loss = network(ids, labels=ids).loss
            enter("backward")
            loss.backward()
            del loss
        enter("clipping")
        clip(self.config, network, optimizer)
        enter("optimizer")
        optimizer.step()
        optimizer.zero_grad()
        enter("end")

    @property
    def pieces(self) -> list[Piece]:
        """What no step can do without: its matrix products, and causal attention."""
        return pieces_of(self.config.model.network(), self.rows, self.config.max_seq_len, self.kind)


def run_steps(work: Work, steps: int) -> tuple[int, list[list[tuple[str, Any]]], list[float]]:
    """Train; returns the most memory of a GPU, the moments at which parts of each step begin, and the limits.

    A limit is in seconds. On a CPU, whose speed changes, each step has its own.
    """
    if work.kind == "cpu":
        keep_freed_memory()
    network, optimizer, ids = work.start()
    pieces = work.pieces if work.kind == "cpu" else []
    measured: list[list[tuple[str, Any]]] = []
    limits = []
    for number in range(WARMUP_STEPS + steps):
        moments: list[tuple[str, Any]] = []
        work.train(
            network,
            optimizer,
            ids,
            lambda part, to=moments: to.append((part, stamp(work.kind))),  # type: ignore[misc]
        )
        if number >= WARMUP_STEPS:
            measured.append(moments)
            limits += [seconds_of(pieces, work.kind, repeats=1)] if pieces else []
    peak = 0
    if work.kind == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del network, optimizer
        limits = [seconds_of(work.pieces, work.kind)] * steps
    return peak, measured, limits


def seconds_of_part(part: str, moments: list[tuple[str, Any]]) -> float:
    """Seconds of all times that a step was in a part."""
    return sum(seconds_between(start, stop) for (name, start), (_, stop) in pairwise(moments) if name == part)


def make_network(config: TrainConfig, kind: str) -> Any:
    """The run's network; on a GPU its weights are drawn there, which takes no time."""
    network_config, fsdp = config.model.network(), config.fsdp_config
    network = MPT(network_config, device=kind, seed=config.seed, empty=kind == "cuda").train()
    if kind == "cuda":
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
            else:
                torch.nn.init.ones_(parameter)
    if fsdp is not None and fsdp.saves_activations:
        parts = recomputed_parts(config.model.activation_checkpointing_target, network_config.n_layers)
        recompute, offload = fsdp.activation_checkpointing, fsdp.activation_cpu_offload
        checkpoint_activations(network, parts, recompute=recompute, offload=offload)
    if config.compile_config is not None:
        from mptfoundry.models.compiling import compile_blocks

        options = {"fullgraph": True} | {k: v for k, v in asdict(config.compile_config).items() if v}
        compile_blocks(network, **options)
    return network


def make_optimizer(
    config: TrainConfig, network: Any, fused: bool, bf16_weights: bool = False
) -> torch.optim.Optimizer:
    """The run's optimizer; with `bf16_weights` the network has copies of its matrices from now on."""
    optimizer = _optimizer(config, network, fused)
    if bf16_weights:
        use_bf16_weights(network, optimizer, bf16_gradients=has_bf16_gradients(config, fused))
    return optimizer


def _optimizer(config: TrainConfig, network: Any, fused: bool) -> torch.optim.Optimizer:
    options = asdict(config.optimizer)
    name, groups, frozen = (options.pop(key) for key in ("name", "param_groups", "disable_grad"))
    del options["fused"], options["bf16_weights"]
    if (dtype := options.pop("momentum_dtype", "float32")) != "float32":
        options["momentum_dtype"] = getattr(torch, dtype)
    groups = [{key: value for key, value in group.items() if value is not None} for group in groups]
    parameters: Any = parameter_groups(network.named_parameters(), param_groups=groups, disable_grad=frozen)
    # Triton and Composer are imported only where they are needed.
    if name == "decoupled_lionw" and fused:
        from mptfoundry.optim.lion_fused import DecoupledLionW as FusedLionW

        return FusedLionW(parameters, **options)
    if name == "decoupled_lionw":
        return DecoupledLionW(parameters, **options)
    if fused:
        from mptfoundry.optim.adamw_fused import DecoupledAdamW as FusedAdamW

        return FusedAdamW(parameters, **options)
    from composer.optim import DecoupledAdamW

    return DecoupledAdamW(parameters, **options)


def clip(config: TrainConfig, network: Any, optimizer: Any) -> None:
    """Measure the norm, as every run does, and clip as the config says; `adaptive` is not measured."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    norm, clipping = global_norm(gradients), config.algorithms.gradient_clipping
    if clipping is None or clipping.clipping_threshold is None:
        return
    if clipping.clipping_type == "value":
        clamp(network.parameters(), clipping.clipping_threshold)
    elif clipping.clipping_type == "norm" and hasattr(optimizer, "gradient_scale"):
        optimizer.gradient_scale = scale_for_norm(norm, clipping.clipping_threshold)
    elif clipping.clipping_type == "norm":
        scale_to_norm(gradients, norm, clipping.clipping_threshold)


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
