"""Measure what shard verification costs: `verify: off | lazy | full` of train_loader.dataset.

    python scripts/bench_verify.py [megabytes=128] [max_seq_len=2048] [runs=3] [folder=FOLDER]

Shards of 64 MiB of random ids are written to FOLDER (default: a temporary one) and read from the page cache
with each setting in turn; results are medians. A step is what `configs/mpt-125m.yaml` reads.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mptfoundry.config.data import TextDatasetConfig, TextLoaderConfig
from mptfoundry.config.load import load_train_config
from mptfoundry.data.loading import LoaderContext
from mptfoundry.data.shards.index import check_shard_files, read_index
from mptfoundry.data.shards.writer import ShardWriter
from mptfoundry.data.text.text import build_text_loader
from mptfoundry.mpt.config import MPTConfig

DEFAULTS = {"megabytes": "128", "max_seq_len": "2048", "runs": "3", "folder": ""}
ROWS = 8


def main(words: list[str]) -> None:
    """Writes the shards, reads them in turns, and prints a line for each kind of checking."""
    options = {**DEFAULTS, **dict(word.split("=", 1) for word in words)}
    length, megabytes = int(options["max_seq_len"]), int(options["megabytes"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options["folder"] or temporary)
        _write(folder, megabytes, length)
        index = read_index(folder, str(folder))
        seconds: dict[str, list[float]] = {"off": [], "lazy": [], "full": []}
        hashing = []
        for _ in range(int(options["runs"])):
            for verify, taken in seconds.items():
                started_at = time.perf_counter()
                _read(folder, length, verify)
                taken.append(time.perf_counter() - started_at)
            started_at = time.perf_counter()
            check_shard_files(index, str(folder))
            hashing.append(time.perf_counter() - started_at)
    size = sum(shard["raw_data"]["bytes"] for shard in index.shards)
    rate = size / statistics.median(hashing)
    print(f"full: {rate / 1e9:.2f} GB/s of hashes, {len(index.shards)} shards at once")
    for verify, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{verify}: {median:.2f} s to read {index.samples:,} samples, {size / 2**20:.0f} MiB")
    config, _ = load_train_config("configs/mpt-125m.yaml", [])
    step = config.global_train_batch_size * config.max_seq_len * 2
    print(f"lazy: {step / rate * 1e3:.2f} ms of hashing for the {step / 2**20:.1f} MiB that a step reads")


def _write(folder: Path, megabytes: int, length: int) -> None:
    writer = ShardWriter(folder, dtype="uint16", max_seq_len=length, shard_bytes=1 << 26, compression=None)
    draw = np.random.default_rng(0)
    for _ in range(megabytes):
        writer.add(draw.integers(0, 50_000, 1 << 19, np.uint16).tobytes())
    writer.finish()
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": writer.shards}))


def _read(folder: Path, length: int, verify: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"p": 0})), pad_token="p")
    dataset = TextDatasetConfig(local=str(folder), verify=verify, predownload=2048, shuffle=False)
    context = LoaderContext(
        model=MPTConfig(vocab_size=50_432),
        tokenizer=tokenizer,
        max_seq_len=length,
        device_batch_size=ROWS,
        seed=9176,
        num_workers=0,
        is_training=True,
        where="train_loader",
    )
    for _ in build_text_loader(TextLoaderConfig(dataset=dataset), context).dataloader:  # type: ignore[union-attr]
        pass


if __name__ == "__main__":
    from words import given_words

    main(given_words(__doc__))
