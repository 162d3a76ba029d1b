"""Compare with llm-foundry on this machine: the same YAML, the same shards, the same small MPT.

    python scripts/bench_llmfoundry.py llmfoundry_python=PATH_TO_ITS_PYTHON [runs=3] [batches=12] [out=FILE]

It alternates between the two and measures the whole command `composer ... CONFIG`: seconds from the command
to the first batch, seconds per step after the first three (median), and the time to report a misspelled key.
The same few lines on both sides record the time at the end of each batch.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARMUP_BATCHES = 3
SEQ_LENS = (256, 1024)
TOKENS_PER_STEP = 8192
SEED = 17

# Runs inside each side's own Python, when it imports Composer's engine.
WATCHED = """
import importlib.machinery, json, os, sys, time

class Watch:
    def find_spec(self, name, path, target=None):
        if name != "composer.core.engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), watch(module.Engine))
        return spec

def watch(engine):
    times, run_event = [], engine.run_event

    def watched(self, event):
        name = str(getattr(event, "value", event))
        if name == "batch_end" or (name == "batch_start" and not times):
            times.append(time.time())
            with open(os.environ["TIMES"], "w") as f:
                json.dump(times, f)
        return run_event(self, event)

    engine.run_event = watched

sys.meta_path.insert(0, Watch())
"""
DRIVERS = {
    "mptfoundry": "import sys\nfrom mptfoundry.cli import main\nsys.exit(main(['train', sys.argv[1]]))\n",
    "llm-foundry": "import sys\nfrom llmfoundry.command_utils import train_from_yaml\n"
    "train_from_yaml(sys.argv[1], [])\n",
}
CONFIG = """
variables:
  data_local: {shards}
  max_seq_len: {seq_len}
  global_seed: {seed}
max_seq_len: ${{variables.max_seq_len}}
run_name: bench
model:
  name: mpt_causal_lm
  init_device: cpu
  d_model: 256
  n_heads: 4
  n_layers: 4
  expansion_ratio: 4
  max_seq_len: ${{variables.max_seq_len}}
  vocab_size: {vocab_size}
  no_bias: true
  loss_fn: torch_crossentropy
  attn_config:
    attn_impl: torch
    alibi: true
tokenizer:
  name: {tokenizer}
  kwargs:
    model_max_length: ${{variables.max_seq_len}}
train_loader:
  name: text
  dataset:
    local: ${{variables.data_local}}
    split: train
    shuffle: true
    max_seq_len: ${{variables.max_seq_len}}
    shuffle_seed: ${{variables.global_seed}}
  drop_last: true
  num_workers: 1
scheduler: {{name: constant_with_warmup, t_warmup: 0ba, alpha: 1}}
optimizer: {{name: decoupled_lionw, {lr}: 1.0e-4, betas: [0.9, 0.95], weight_decay: 0.0}}
algorithms:
  gradient_clipping: {{clipping_type: norm, clipping_threshold: 1.0}}
max_duration: {batches}ba
eval_interval: 0
global_train_batch_size: {batch}
seed: ${{variables.global_seed}}
device_eval_batch_size: {batch}
device_train_microbatch_size: {batch}
precision: fp32
progress_bar: false
log_to_console: false
python_log_level: warning
"""


def main(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words)
    if "llmfoundry_python" not in options:
        print(__doc__, file=sys.stderr)
        return 2
    pythons = {"mptfoundry": sys.executable, "llm-foundry": options["llmfoundry_python"]}
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), pythons, int(options.get("runs", 3)), int(options.get("batches", 12)))
    print(table(results))
    if "out" in options:
        Path(options["out"]).write_text(json.dumps(results, indent=2) + "\n")
    return 0


def measure(folder: Path, pythons: dict[str, str], runs: int, batches: int) -> dict[str, dict[str, float]]:
    """Medians over `runs`, the two sides in turns; keys are `seconds per step, seq 256` and the like."""
    tokenizer, vocab_size = prepare(folder)
    samples: dict[str, dict[str, list[float]]] = {}
    for number in range(runs):
        for seq_len in SEQ_LENS:
            for side, python in pythons.items():
                print(f"run {number + 1} of {runs}: {side}, seq {seq_len}", file=sys.stderr, flush=True)
                values = {
                    "shards": folder / f"shards-{seq_len}",
                    "seq_len": seq_len,
                    "vocab_size": vocab_size,
                    "tokenizer": tokenizer,
                    "batch": TOKENS_PER_STEP // seq_len,
                    "batches": batches,
                    "seed": SEED,
                }
                started_at, times = run(folder, side, python, CONFIG.format(lr="lr", **values))
                steps = [b - a for a, b in itertools.pairwise(times)][WARMUP_BATCHES:]
                note(samples, f"seconds per step, seq {seq_len}", side, statistics.median(steps))
                note(samples, "seconds from command to first batch", side, times[0] - started_at)
        for side, python in pythons.items():
            started_at = time.time()
            run(folder, side, python, CONFIG.format(lr="lrr", **values), expect_failure=True)
            note(samples, "seconds until a misspelt key is reported", side, time.time() - started_at)
    return {
        what: {side: statistics.median(numbers) for side, numbers in sides.items()}
        for what, sides in samples.items()
    }


def note(samples: dict[str, dict[str, list[float]]], what: str, side: str, number: float) -> None:
    samples.setdefault(what, {}).setdefault(side, []).append(number)


def prepare(folder: Path) -> tuple[Path, int]:
    """Shards of the standard library's sources in each length, readable by both sides, and a tokenizer."""
    import sysconfig

    from mptfoundry.tokenizer import train_bpe

    vocab_size = 8192
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train_bpe((path.read_text(errors="replace") for path in sources), vocab_size, folder / "tokenizer")
    for seq_len in SEQ_LENS:
        words = [f"out={folder / f'shards-{seq_len}'}", f"tokenizer={folder / 'tokenizer'}", "split=train"]
        verb = [sys.executable, "-m", "mptfoundry.cli", "prepare", *map(str, sources)]
        subprocess.run([*verb, *words, f"max_seq_len={seq_len}"], check=True, stdout=sys.stderr)
    return folder / "tokenizer", vocab_size


def run(
    folder: Path, side: str, python: str, config: str, *, expect_failure: bool = False
) -> tuple[float, list[float]]:
    """Runs one side through its `composer` launcher; the time of the command, and those of its batches."""
    work = Path(tempfile.mkdtemp(dir=folder))
    (work / "config.yaml").write_text(config)
    (work / "driver.py").write_text(DRIVERS[side] if expect_failure else WATCHED + DRIVERS[side])
    environment = {**os.environ, "TIMES": str(work / "times.json"), "TOKENIZERS_PARALLELISM": "false"}
    command = [python, "-m", "composer.cli.launcher", "-n", "1", "driver.py", "config.yaml"]
    started_at = time.time()
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if (done.returncode != 0) != expect_failure:
        raise SystemExit(
            f"{side} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return started_at, [] if expect_failure else json.loads((work / "times.json").read_text())


def table(results: dict[str, dict[str, float]]) -> str:
    rows = ["| | mptfoundry | llm-foundry | ratio |", "|---|---:|---:|---:|"]
    for what, sides in results.items():
        ours, theirs = sides["mptfoundry"], sides["llm-foundry"]
        rows.append(f"| {what} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
