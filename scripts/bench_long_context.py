"""Measure memory and time of a StoryWriter step by row length, each length in its own process.

    python scripts/bench_long_context.py [lengths=8192,16384,32768,65536] [key=value ...]

The run is `configs/mpt-7b-storywriter.yaml` with fewer and narrower layers: one row of random tokens,
forward, backward and LION's step, with activation checkpointing, alibi_bias_max 16 and clip_qkv 6. Further
words override its config. It prints the peak resident memory of the process, the step's part of it, that part
per token, and the seconds of the step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "mpt-7b-storywriter.yaml"
SHRUNK = ["model.d_model=128", "model.n_heads=2", "model.n_layers=2", "model.vocab_size=8192"]
SHRUNK += ["model.pretrained_model_name_or_path=null", "model.config_overrides=null"]
SHRUNK += ["model.attn_config.alibi_bias_max=16", "model.attn_config.clip_qkv=6", "eval_loader=null"]
SHRUNK += ["max_duration=1ba", "eval_interval=0", "global_train_batch_size=1", "save_folder=null"]
GIB = 2**30


def main(words: list[str]) -> int:
    lengths = next(
        (w.removeprefix("lengths=") for w in words if w.startswith("lengths=")), "8192,16384,32768,65536"
    )
    more = [word for word in words if not word.startswith("lengths=")]
    print(f"{'tokens':>8}  {'GiB':>6}  {'of the step':>11}  {'KiB a token':>11}  {'seconds':>8}")
    for length in map(int, lengths.split(",")):
        row = in_a_process_of_its_own(length, more)
        step = row["peak"] - row["before"]
        print(
            f"{length:8,}  {row['peak'] / GIB:6.2f}  {step / GIB:11.2f}  {step / length / 1024:11.1f}  "
            f"{row['seconds']:8.1f}",
            flush=True,
        )
    return 0


def in_a_process_of_its_own(length: int, more: list[str]) -> dict[str, float]:
    """`peak` and `before`, in bytes, and `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", folder, str(length), *more],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads((Path(folder) / "row.json").read_text())  # type: ignore[no-any-return]


def measure(folder: Path, length: int, more: list[str]) -> None:
    """Train one batch, and write what it took to `row.json` in `folder`."""
    import numpy as np
    from composer.core import Callback
    from streaming import MDSWriter

    from mptfoundry import build
    from mptfoundry.callbacks.throughput import peak_memory_bytes
    from mptfoundry.config.load import load_train_config
    from mptfoundry.run.metrics_file import read_rows
    from mptfoundry.tokenizer import train_bpe
    from mptfoundry.train import train

    class Before(Callback):
        def batch_start(self, *_: object) -> None:
            before.append(peak_memory_bytes())

    before: list[int] = []
    os.chdir(folder)
    train_bpe([Path(__file__).read_text()], 320, folder / "tokenizer")
    with MDSWriter(out="data/train", columns={"tokens": f"ndarray:uint16:{length}"}) as writer:
        writer.write({"tokens": np.random.default_rng(0).integers(0, 320, length, dtype=np.uint16)})
    words = [
        *SHRUNK,
        f"max_seq_len={length}",
        "variables.data=data",
        "tokenizer.name=tokenizer",
        "run_name=long",
    ]
    config, _ = load_train_config(CONFIG, [*words, "callbacks.lr_monitor={}", *more])
    build.CALLBACKS["lr_monitor"] = Before  # as a file of code_paths would
    train(config)
    (row,) = read_rows(folder / "runs" / "long" / "metrics.jsonl")
    found = {"peak": row["peak_memory_bytes"], "before": before[0], "seconds": row["seconds"]}
    (folder / "row.json").write_text(json.dumps(found))


if __name__ == "__main__":
    from words import given_words

    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main(given_words(__doc__)))
