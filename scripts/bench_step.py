"""Time a training step of a run's network alone: forward, loss, backward, clipping and optimizer, no loader.

    python scripts/bench_step.py [config=configs/mpt-125m.yaml] [batch=8] [steps=20] [key=value ...]
        [out=FILE.json] [lines=true]

It trains on random tokens, on the GPU if there is one (bf16), otherwise on the CPU (fp32), with the run's own
optimizer and parameter groups, clipping and activation checkpointing. Medians: the step, its parts, tokens/s,
and both MFUs if the device's peak is known.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timing import seconds_between, stamp

from mptfoundry.config.load import load_train_config
from mptfoundry.config.parallel import recomputed_parts
from mptfoundry.config.run import TrainConfig
from mptfoundry.models.activation_checkpointing import checkpoint_activations
from mptfoundry.mpt.flops import count_parameters, flops_per_token
from mptfoundry.mpt.network import MPT
from mptfoundry.optim.gradients import clamp, global_norm, scale_for_norm, scale_to_norm
from mptfoundry.optim.groups import parameter_groups
from mptfoundry.optim.lion import DecoupledLionW
from mptfoundry.plan.devices import detect_device
from mptfoundry.plan.plan import choose_fused

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
    network_config, seq_len = config.model.network(), config.max_seq_len
    network = make_network(config, kind)
    fused = config.optimizer.fused
    optimizer = make_optimizer(config, network, choose_fused(config, device)[0] if fused == "auto" else fused)
    ids = torch.randint(network_config.vocab_size, (batch, seq_len), device=kind)
    stamps = []
    for _ in range(WARMUP_STEPS + steps):
        times = [stamp(kind)]
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            loss = network(ids, labels=ids).loss
        times.append(stamp(kind))
        loss.backward()
        times.append(stamp(kind))
        clip(config, network, optimizer)
        times.append(stamp(kind))
        optimizer.step()
        optimizer.zero_grad()
        stamps.append([*times, stamp(kind)])
    if kind == "cuda":
        torch.cuda.synchronize()
    measured = stamps[WARMUP_STEPS:]
    per_step = statistics.median(seconds_between(times[0], times[-1]) for times in measured)
    per_second = batch * seq_len / per_step
    row: dict[str, object] = {
        "device": device.name,
        "parameters": count_parameters(network_config),
        "network": {name: getattr(network_config, name) for name in SIZES},
        "batch x seq_len": f"{batch} x {seq_len}",
        "milliseconds per step": round(per_step * 1000, 1),
    }
    for number, part in enumerate(PARTS):
        took = statistics.median(seconds_between(times[number], times[number + 1]) for times in measured)
        row[f"milliseconds of {part}"] = round(took * 1000, 1)
    row["tokens per second"] = round(per_second)
    for name, causal in (("mfu", False), ("mfu_causal", True)):
        if device.peak_flops:
            flops = flops_per_token(network_config, seq_len, causal=causal)
            row[name] = round(per_second * flops / device.peak_flops, 4)
    if kind == "cuda":
        row["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


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
    return network


def make_optimizer(config: TrainConfig, network: Any, fused: bool) -> torch.optim.Optimizer:
    options = asdict(config.optimizer)
    name, groups, frozen, _ = (options.pop(key) for key in ("name", "param_groups", "disable_grad", "fused"))
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
