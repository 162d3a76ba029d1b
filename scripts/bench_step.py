"""Time a training step of our network alone: forward, loss, backward, clipping and LION, no loader.

    python scripts/bench_step.py [config=configs/mpt-125m.yaml] [batch=8] [steps=20] [out=FILE.json]

It trains on random tokens, on the GPU if there is one (bf16), otherwise on the CPU (fp32). It prints the
median step time, tokens/s, and both MFUs if the device's peak is known.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from mptfoundry.config.load import load_train_config
from mptfoundry.mpt.flops import count_parameters, flops_per_token
from mptfoundry.mpt.network import MPT
from mptfoundry.optim.lion import DecoupledLionW
from mptfoundry.plan.devices import detect_device

WARMUP_STEPS = 3
# What `mptfoundry plan ... measured=FILE.json` needs to know about the network.
SIZES = ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size", "expansion_ratio")


def main(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words)
    own = {"config": "configs/mpt-125m.yaml", "batch": "8", "steps": "20", "out": ""} | options
    overrides = [f"{key}={value}" for key, value in options.items() if key not in ("batch", "steps", "out")]
    config, _ = load_train_config(
        own["config"], [word for word in overrides if not word.startswith("config=")]
    )
    row = measure(config, int(own["batch"]), int(own["steps"]))
    for key, value in row.items():
        print(f"  {key:32} {value}")
    if own["out"]:
        Path(own["out"]).write_text(json.dumps([row], indent=2) + "\n")
    return 0


def measure(config, batch: int, steps: int) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """Medians over `steps` training steps of `batch` sequences, after a few that warm up."""
    device = detect_device(world_size=1)
    kind = "cuda" if device.kind == "gpu" else "cpu"
    network_config, seq_len = config.model.network(), config.max_seq_len
    network = MPT(network_config, device=kind, seed=config.seed).train()
    optimizer = DecoupledLionW(network.parameters(), lr=1e-4)
    ids = torch.randint(network_config.vocab_size, (batch, seq_len), device=kind)
    seconds = []
    for _ in range(WARMUP_STEPS + steps):
        started_at = time.perf_counter()
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            loss = network(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started_at)
    per_step = statistics.median(seconds[WARMUP_STEPS:])
    per_second = batch * seq_len / per_step
    row: dict[str, object] = {
        "device": device.name,
        "parameters": count_parameters(network_config),
        "network": {name: getattr(network_config, name) for name in SIZES},
        "batch x seq_len": f"{batch} x {seq_len}",
        "milliseconds per step": round(per_step * 1000, 1),
        "tokens per second": round(per_second),
    }
    for name, causal in (("mfu", False), ("mfu_causal", True)):
        if device.peak_flops:
            flops = flops_per_token(network_config, seq_len, causal=causal)
            row[name] = round(per_second * flops / device.peak_flops, 4)
    return row


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
