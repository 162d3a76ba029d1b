"""Measure the loader of text against plain StreamingDataset with transformers' collator, on the same shards.

    python scripts/bench_loader.py [tokens=20000000] [max_seq_len=2048] [rows=8] [runs=3]
        [model=configs/mpt-125m.yaml] [tokens_per_second=]

Three loaders read the same local shards of random ids, shuffled, in one process without workers, in turns:
ours; what llm-foundry's StreamingTextDataset does with StreamingDataset and transformers' collator; and plain
StreamingDataset without a collator. CPU time, medians. The last lines compare them with what a model reads:
`tokens_per_second`, or what a GPU of 989 TFLOP/s reads at an MFU of 60 %.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from mptfoundry.config.data import TextDatasetConfig, TextLoaderConfig
from mptfoundry.config.load import load_train_config
from mptfoundry.data.loading import LoaderContext
from mptfoundry.data.text.text import build_text_loader
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.flops import flops_per_token

DEFAULTS = {
    "tokens": "20000000",
    "max_seq_len": "2048",
    "rows": "8",
    "runs": "3",
    "model": "configs/mpt-125m.yaml",
    "tokens_per_second": "",
}
VOCAB_SIZE = 50432
PEAK, MFU = 989.4e12, 0.6


def main(words: list[str]) -> None:
    given = dict(word.split("=", 1) for word in words)
    if set(given) - set(DEFAULTS):
        sys.exit(__doc__)
    options = {**DEFAULTS, **given}
    torch.set_num_threads(1)
    tokens, seq, rows = (int(options[name]) for name in ("tokens", "max_seq_len", "rows"))
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        write_shards(Path(folder), tokens, seq)
        loaders: dict[str, Callable[[str, int, int], Any]] = {
            "mptfoundry": ours,
            "StreamingDataset, transformers' collator": as_llm_foundry,
            "StreamingDataset alone": without_collator,
        }
        seconds: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(int(options["runs"])):
            for name, make in loaders.items():
                seconds[name].append(read(make(folder, seq, rows), tokens // seq // rows))
    print(f"{tokens:,} tokens in rows of {seq:,}, batches of {rows} rows, one process")
    print(f"{'':42}{'tokens/s':>14}{'ratio':>7}")
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    first = medians["StreamingDataset, transformers' collator"]
    for name, each in medians.items():
        print(f"{name:42}{tokens / each:14,.0f}{first / each:7.2f}")
    needed = float(options["tokens_per_second"] or 0) or read_by(options["model"])
    workers = needed * medians["mptfoundry"] / tokens
    print(f"a model that reads {needed:,.0f} tokens/s ({options['model']}) keeps {workers:.2f} workers busy")


def write_shards(folder: Path, tokens: int, seq: int) -> None:
    """Shards of random ids."""
    draw = np.random.default_rng(0)
    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{seq}"}) as writer:
        for _ in range(tokens // seq):
            writer.write({"tokens": draw.integers(0, VOCAB_SIZE, seq, dtype=np.uint16)})


def ours(folder: str, seq: int, rows: int) -> Any:
    """Our loader of text."""
    config = TextLoaderConfig(
        dataset=TextDatasetConfig(local=folder, shuffle=True, num_canonical_nodes=1), drop_last=True
    )
    context = LoaderContext(
        model=MPTConfig(vocab_size=VOCAB_SIZE),
        tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=0),
        max_seq_len=seq,
        device_batch_size=rows,
        seed=17,
        num_workers=0,
        is_training=True,
        where="train_loader",
    )
    return build_text_loader(config, context).dataloader


class AsLLMFoundry(StreamingDataset):
    """What StreamingTextDataset does with a sample of token ids."""

    def __getitem__(self, index: Any) -> Any:
        sample = super().__getitem__(index)
        return torch.from_numpy(sample["tokens"].astype(np.int64))


def as_llm_foundry(folder: str, seq: int, rows: int) -> Any:
    """StreamingDataset and the collator that llm-foundry gives to its loader."""
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"p": 0})), pad_token="p")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return StreamingDataLoader(
        streaming_dataset(AsLLMFoundry, folder, rows), batch_size=rows, collate_fn=collator, drop_last=True
    )


def without_collator(folder: str, seq: int, rows: int) -> Any:
    """Samples as StreamingDataset reads them."""
    return StreamingDataLoader(
        streaming_dataset(StreamingDataset, folder, rows), batch_size=rows, collate_fn=list, drop_last=True
    )


def streaming_dataset(kind: type[StreamingDataset], folder: str, rows: int) -> StreamingDataset:
    return kind(local=folder, shuffle=True, shuffle_seed=17, num_canonical_nodes=1, batch_size=rows)


def read(loader: Any, batches: int) -> float:
    """Seconds of CPU time for one pass over the shards."""
    started_at = time.process_time()
    read_batches = sum(1 for _ in loader)
    assert abs(read_batches - batches) <= 2, (read_batches, batches)
    return time.process_time() - started_at


def read_by(path: str) -> float:
    """Tokens per second that a GPU reads."""
    config, _ = load_train_config(path, [])
    return MFU * PEAK / flops_per_token(config.model, config.max_seq_len, causal=False)


if __name__ == "__main__":
    from words import given_words

    main(given_words(__doc__))
