"""Measure `mptfoundry prepare` against llm-foundry's convert_dataset_json.py on the same JSONL file.

    python scripts/bench_prepare.py llmfoundry_python=PATH [text=FOLDER] [tokenizer=FOLDER] [max_seq_len=2048]
        [workers=N] [folder=FOLDER] [runs=3]

PATH is the Python of an environment with llm-foundry 0.22.0. The text is the Python sources below FOLDER, by
default the standard library's; by default the tokenizer is trained on them. Both must produce the same token
stream. Each is measured as a whole command (Python's start, imports, work), and from the end of its imports;
the fastest run counts.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mptfoundry.data.records.inputs import find_inputs
from mptfoundry.data.records.records import Document, plan_units, read_part
from mptfoundry.tokenizer import load_tokenizer, train_bpe

OPTIONS = ("llmfoundry_python", "text", "tokenizer", "max_seq_len", "workers", "folder", "runs")
LLM_FOUNDRY = """
import json, sys, time
from llmfoundry.command_utils import convert_dataset_json_from_args
started_at = time.perf_counter()
jsonl, out, tokenizer, eos, max_seq_len, workers = sys.argv[1:]
convert_dataset_json_from_args(path=jsonl, out_root=out, compression=None, concat_tokens=int(max_seq_len),
    split="train", tokenizer=tokenizer, bos_text=None, eos_text=eos, no_wrap=False, num_workers=None)
print(json.dumps(time.perf_counter() - started_at))
"""
OURS = """
import json, sys, time
from mptfoundry.data.prepare.prepare import prepare
from transformers import PreTrainedTokenizerFast
started_at = time.perf_counter()
jsonl, out, tokenizer, eos, max_seq_len, workers = sys.argv[1:]
prepare([jsonl], out, tokenizer=tokenizer, max_seq_len=int(max_seq_len), workers=int(workers), progress=False)
print(json.dumps(time.perf_counter() - started_at))
"""


def main(words: list[str]) -> None:
    options = dict(word.split("=", 1) for word in words)
    if set(options) - set(OPTIONS) or "llmfoundry_python" not in options:
        sys.exit(__doc__)
    folder = Path(options.get("folder") or tempfile.mkdtemp(prefix="bench-prepare-"))
    max_seq_len = int(options.get("max_seq_len", 2048))
    workers = int(options.get("workers", len(os.sched_getaffinity(0))))
    texts = read_texts(options.get("text", sysconfig.get_paths()["stdlib"]))
    jsonl = folder / "text.jsonl"
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    given = options.get("tokenizer")
    tokenizer: Any = load_tokenizer(given) if given else train_bpe(texts, 32_000, folder / "trained")
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = {}
    for name, python, code in (
        ("llm-foundry", options["llmfoundry_python"], LLM_FOUNDRY),
        ("mptfoundry", sys.executable, OURS),
    ):
        arguments = (str(folder / "tokenizer"), tokenizer.eos_token, str(max_seq_len), str(workers))
        rows[name] = [
            measure(python, code, folder / f"{name}-{run}", str(jsonl), *arguments)
            for run in range(int(options.get("runs", 3)))
        ]
    ours = read_tokens(folder / "mptfoundry-0" / "train")
    theirs = read_tokens(folder / "llm-foundry-0")
    assert np.array_equal(ours, theirs), "the token streams differ"
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {megabytes:.1f} MB, {ours.size:,} tokens in samples of {max_seq_len}")
    print(f"token streams are equal; {workers} workers on {len(os.sched_getaffinity(0))} cores; {folder}")
    print(f"{'':14}{'command s':>11}{'tokens/s':>12}{'work s':>9}{'tokens/s':>12}{'cpu s':>8}")
    best = {name: [min(times) for times in zip(*runs, strict=True)] for name, runs in rows.items()}
    for name, (command, work, cpu) in best.items():
        rates = f"{command:11.1f}{ours.size / command:12,.0f}{work:9.1f}{ours.size / work:12,.0f}"
        print(f"{name:14}{rates}{cpu:8.1f}")
    ratios = [a / b for a, b in zip(best["llm-foundry"], best["mptfoundry"], strict=True)]
    print(f"{'ratio':14}{ratios[0]:23.1f}{ratios[1]:21.1f}{ratios[2]:8.1f}")


def read_texts(folder: str) -> list[str]:
    """The Python sources below a folder that are UTF-8 and not empty."""
    inventory = find_inputs([folder], text_key="text", include=["*.py"], exclude=["site-packages"])
    parts = (part for unit in plan_units(inventory.inputs, [], False) for part in unit.parts)
    items = (item for part in parts for item in read_part(part, "text", []))
    return [item.text for item in items if isinstance(item, Document)]


def measure(python: str, code: str, out: Path, jsonl: str, *arguments: str) -> tuple[float, float, float]:
    """Seconds of the whole command, from the end of its imports on, and of all cores together."""
    environment = {**os.environ, "HF_HOME": str(out) + "-hf", "HF_HUB_OFFLINE": "1"}
    cpu_before = _cpu_seconds_of_children()
    started_at = time.perf_counter()
    done = subprocess.run(
        [python, "-c", code, jsonl, str(out), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started_at
    if done.returncode:
        sys.exit(done.stderr)
    cpu_seconds = _cpu_seconds_of_children() - cpu_before
    return seconds, float(done.stdout.strip().splitlines()[-1]), cpu_seconds


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_tokens(folder: Path) -> np.ndarray:
    """All tokens of a folder of shards, in order: (tokens,) int64."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    return np.concatenate([dataset[index]["tokens"] for index in range(dataset.size)]).astype(np.int64)


if __name__ == "__main__":
    from words import given_words

    main(given_words(__doc__))
