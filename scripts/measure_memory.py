"""Compare the estimated memory of a step with the measured one on a CPU, each point in its own process.

    python scripts/measure_memory.py [points=7] [out=FILE.json]

A point builds a model, trains a step of eight tokens, which makes the optimizer's state, and then a step of
two microbatches. It reports by how much its resident memory rose at most (VmHWM), with what `check` estimates
for gradients, optimizer state, activations and logits. Large blocks are returned to the system at
once (MALLOC_MMAP_THRESHOLD_), so that the rise is what a step needs, not what it leaves behind.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# d_model, n_layers, max_seq_len, rows at once, vocab_size, activation checkpointing.
POINTS = [
    (128, 12, 256, 12, 2048, False),
    (128, 24, 512, 4, 2048, False),
    (256, 8, 256, 8, 4096, False),
    (256, 6, 1024, 2, 8192, False),
    (512, 4, 256, 6, 4096, False),
    (256, 24, 512, 6, 2048, True),
    (512, 12, 256, 6, 4096, True),
]


def main(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words)
    if "point" in options:
        print(json.dumps(measure(*json.loads(options["point"]))))
        return 0
    rows = []
    print("d_model layers length rows vocabulary recomputed   estimated   measured  ratio")
    for point in POINTS[: int(options.get("points", len(POINTS)))]:
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, f"point={json.dumps(point)}"]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        estimated, measured = json.loads(done.stdout.splitlines()[-1])
        rows.append([*point, estimated, measured])
        print(
            "{:7} {:6} {:6} {:4} {:10} {!s:>10}".format(*point),
            f"{estimated / 2**20:8.1f} MiB {measured / 2**20:6.1f} MiB  {estimated / measured:5.3f}",
            flush=True,
        )
    if "out" in options:
        Path(options["out"]).write_text(json.dumps(rows) + "\n")
    return 0


def measure(
    d_model: int, n_layers: int, seq_len: int, rows: int, vocab_size: int, recomputes: bool
) -> tuple[int, int]:
    """The estimated and the measured rise of resident memory in bytes."""
    import torch

    from mptfoundry.config.load import load_train_config
    from mptfoundry.config.parallel import recomputed_parts
    from mptfoundry.models.activation_checkpointing import checkpoint_activations
    from mptfoundry.mpt.network import MPT
    from mptfoundry.optim.lion import DecoupledLionW
    from mptfoundry.plan.devices import Device
    from mptfoundry.plan.plan import make_plan

    recompute = str(recomputes).lower()
    config, _ = load_train_config(
        ROOT / "configs/mpt-125m.yaml",
        [
            f"model.d_model={d_model}",
            f"model.n_heads={d_model // 64}",
            f"model.n_layers={n_layers}",
            f"model.vocab_size={vocab_size}",
            f"max_seq_len={seq_len}",
            f"global_train_batch_size={2 * rows}",
            f"device_train_microbatch_size={rows}",
            f"fsdp_config={{sharding_strategy: NO_SHARD, activation_checkpointing: {recompute}}}",
        ],
    )
    memory = make_plan(config, Device("cpu", "CPU", memory=2**36)).memory
    torch.set_num_threads(1)
    model = MPT(config.model.network(), device="cpu", seed=0).train()
    if recomputes:
        checkpoint_activations(model, recomputed_parts(None, n_layers))
    optimizer = DecoupledLionW(model.parameters(), lr=1e-4)
    ids = torch.randint(vocab_size, (rows, seq_len))
    with torch.no_grad():
        model(ids[:1, :8], labels=ids[:1, :8])
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    for microbatches in ([ids[:1, :8]], [ids, ids]):
        for rows_at_once in microbatches:
            model(rows_at_once, labels=rows_at_once).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    estimated = memory.gradients + memory.optimizer + memory.activations + memory.logits
    return estimated, status("VmHWM") - before


def status(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
