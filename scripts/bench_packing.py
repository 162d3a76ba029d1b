"""Measure packing against llm-foundry's BinPackCollator, on the same examples.

    python scripts/bench_packing.py [llmfoundry_python=PATH] [examples=20000] [row_len=2048] [rows=16]
        [runs=3]

PATH is the Python of an environment with llm-foundry 0.22.0; without it only ours is measured. Lengths have a
log-normal distribution with a median of 150 tokens; half of each example is in the loss. Both sides make
batches of `rows` rows from tokenized examples: ours with the whole loader, from the plan and disk reads to
the batch; llm-foundry with its collator on examples in memory, at the ratio that its own search finds without
waste. Its time for packing, after padding and stacking, is also shown separately. Seconds are for one core,
medians of interleaved runs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mptfoundry.config.data import FinetuningDatasetConfig, FinetuningLoaderConfig
from mptfoundry.data.examples.packing import plan_packing
from mptfoundry.data.examples.rows import build_row_loader
from mptfoundry.data.examples.store import ExampleStore, write_examples
from mptfoundry.data.loading import LoaderContext
from mptfoundry.mpt.config import MPTConfig

DEFAULTS = {"llmfoundry_python": "", "examples": "20000", "row_len": "2048", "rows": "16", "runs": "3"}
VOCAB_SIZE = 50432
LLM_FOUNDRY = """
import json, sys, time
import numpy as np, torch
from llmfoundry.data.finetuning.collator import Seq2SeqFinetuningCollator
from llmfoundry.data.packing import BinPackCollator
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
torch.set_num_threads(1)
with np.load(sys.argv[1]) as arrays:
    lengths, ids = arrays["lengths"].tolist(), arrays["ids"].tolist()
row_len, rows = int(sys.argv[2]), int(sys.argv[3])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"p": 0})), pad_token="p")

def packer(**options):
    base = Seq2SeqFinetuningCollator(tokenizer, row_len, decoder_only_format=True)
    return BinPackCollator(base, rows, row_len, 0, "right", **options)

ratio = 1.0
for candidate in np.round(np.linspace(1, row_len / 100, 20), 1):
    trial, raw = packer(is_profiling=True), int(candidate * rows)
    for start in range(0, min(raw * 100, len(lengths)), raw):
        sizes = lengths[start : start + raw]
        if len(sizes) >= rows:
            trial._pack_trimmed_examples([{} for _ in sizes], sizes)
    if trial.waste > 0:
        break
    ratio = float(candidate)
raw, place, examples = int(ratio * rows), 0, []
for length in lengths:
    half = place + length // 2
    turn = {"input_ids": ids[place:half], "labels": ids[half : place + length]}
    examples.append({"turns": [turn]})
    place += length
collator, seconds, packing, packed = packer(), 0.0, 0.0, 0
for start in range(0, len(examples) - raw + 1, raw):
    started_at = time.process_time()
    batch = collator.base_collator(examples[start : start + raw])
    padded_at = time.process_time()
    collator.pack(batch)
    seconds += time.process_time() - started_at
    packing += time.process_time() - padded_at
    packed += raw
scale = len(lengths) / packed
print(json.dumps({"seconds": seconds * scale, "packing": packing * scale, "ratio": ratio,
    "fill": collator.efficiency}))
"""


def main(words: list[str]) -> None:
    given = dict(word.split("=", 1) for word in words)
    if set(given) - set(DEFAULTS):
        sys.exit(__doc__)
    options = {**DEFAULTS, **given}
    torch.set_num_threads(1)
    count, row_len, rows = (int(options[name]) for name in ("examples", "row_len", "rows"))
    lengths = draw_lengths(count, row_len)
    with tempfile.TemporaryDirectory(prefix="bench-packing-") as folder:
        store = write_store(Path(folder) / "store", lengths)
        arrays = Path(folder) / "examples.npz"
        np.savez(arrays, lengths=lengths, ids=store.ids)
        measured: dict[str, list[dict[str, float]]] = {"mptfoundry": []}
        for _ in range(int(options["runs"])):
            measured["mptfoundry"].append(measure_ours(store, row_len, rows))
            if options["llmfoundry_python"]:
                theirs = measure_theirs(options["llmfoundry_python"], arrays, row_len, rows)
                measured.setdefault("llm-foundry", []).append(theirs)
    print(f"{count:,} examples, {lengths.sum():,} tokens, in batches of {rows} rows of {row_len:,}")
    print(f"{'':14}{'seconds':>9}{'examples/s':>12}{'fill':>8}{'ratio':>7}")
    seconds = {}
    for name, runs in measured.items():
        seconds[name] = statistics.median(run["seconds"] for run in runs)
        row = f"{name:14}{seconds[name]:9.3f}{count / seconds[name]:12,.0f}"
        print(f"{row}{runs[0]['fill']:8.1%}{runs[0]['ratio']:7.1f}")
    if "llm-foundry" in seconds:
        packing = statistics.median(run["packing"] for run in measured["llm-foundry"])
        print(f"its packing   {packing:9.3f}")
        print(f"times faster  {seconds['llm-foundry'] / seconds['mptfoundry']:9.1f}")
    else:
        print("llm-foundry was not measured: name its environment's Python with llmfoundry_python=PATH")
    many = draw_lengths(1_000_000, row_len)
    started_at = time.process_time()
    plan = plan_packing(many, row_len, "auto", (0,))
    print(f"planning {len(many):,} examples: {time.process_time() - started_at:.2f} s, fill {plan.fill:.1%}")


def draw_lengths(count: int, row_len: int) -> np.ndarray:
    """Tokens of each example, (count,) int64."""
    drawn = np.random.default_rng(0).lognormal(np.log(150), 1, count)
    return np.clip(drawn.astype(np.int64), 2, row_len)


def write_store(folder: Path, lengths: np.ndarray) -> ExampleStore:
    """Examples of these lengths, the second half of each trained."""
    draw = np.random.default_rng(1)
    with write_examples(folder, vocab_size=VOCAB_SIZE) as writer:
        for length in lengths.tolist():
            writer.add(draw.integers(0, VOCAB_SIZE, length), np.arange(length) >= length // 2)
    return ExampleStore(folder)


def measure_ours(store: ExampleStore, row_len: int, rows: int) -> dict[str, float]:
    """Seconds from the store to the last batch."""
    started_at = time.process_time()
    dataset = FinetuningDatasetConfig(local="unused", packing_ratio="auto")
    context = LoaderContext(
        model=MPTConfig(vocab_size=VOCAB_SIZE),
        tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=0),
        max_seq_len=row_len,
        device_batch_size=rows,
        seed=0,
        num_workers=0,
        is_training=True,
        where="train_loader",
    )
    config = FinetuningLoaderConfig(name="finetuning", dataset=dataset, drop_last=False)
    spec = build_row_loader({"train_loader.dataset": store}, config, context)
    loader: Any = spec.dataloader
    for _ in loader:
        pass
    (packing,) = loader.dataset.order.streams
    return {"seconds": time.process_time() - started_at, "fill": packing.fill, "ratio": packing.ratio}


def measure_theirs(python: str, arrays: Path, row_len: int, rows: int) -> dict[str, float]:
    """Seconds of packing, start and imports left out."""
    command = [python, "-c", LLM_FOUNDRY, str(arrays), str(row_len), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    from words import given_words

    main(given_words(__doc__))
