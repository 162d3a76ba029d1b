"""Measure how long a checkpoint blocks training, and how long it takes to verify one.

    python scripts/bench_checkpoints.py [d_model=768] [layers=8] [batches=4] [runs=3]

A model with LION's state trains on random tokens. Every other batch is saved, alternately by Composer's
saver, by ours while training waits, and by ours in the background. `held` is the time that a save blocks
training; `other batches` is the time of a batch during a write, relative to one without. All are medians.
Then a checkpoint in the page cache is verified by its CRC-32 sums.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.core import Callback, DataSpec, State
from torch import Tensor
from torch.utils.data import DataLoader

from mptfoundry.checkpoints.checkpoint import checkpoint_at
from mptfoundry.models.causal_lm import ComposerMPT
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.optim.lion import DecoupledLionW
from mptfoundry.run.atomic_checkpoints import AtomicCheckpoints

DEFAULTS = {"d_model": 768, "layers": 8, "batches": 4, "runs": 3}
ROWS, LENGTH, VOCAB_SIZE = 4, 256, 8192


class Clock(Callback):
    """Seconds of each batch, and of what comes between a batch's end and the next one's start."""

    def __init__(self) -> None:
        self.batches: list[float] = []
        self.between: list[float] = []
        self._ended_at = self._began_at = 0.0

    def batch_start(self, state: State, logger: object) -> None:
        self._began_at = time.perf_counter()
        if self._ended_at:
            self.between.append(self._began_at - self._ended_at)

    def batch_end(self, state: State, logger: object) -> None:
        self._ended_at = time.perf_counter()
        self.batches.append(self._ended_at - self._began_at)


def loader(batches: int) -> DataLoader[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB_SIZE, (ROWS * batches, LENGTH), generator=draw)
    return DataLoader([{"input_ids": row, "labels": row.clone()} for row in ids], batch_size=ROWS)  # type: ignore[arg-type]


def train(network: MPT, batches: int, saver: Any) -> Clock:
    clock, model = Clock(), ComposerMPT(network)
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(
            loader(2 * batches + 1),
            get_num_samples_in_batch=lambda batch: len(batch["labels"]),
            get_num_tokens_in_batch=lambda batch: batch["labels"].numel(),
        ),
        optimizers=DecoupledLionW(model.parameters(), lr=1e-4),
        max_duration=f"{2 * batches + 1}ba",
        device="cpu",
        callbacks=[clock, saver],
        progress_bar=False,
        log_to_console=False,
    )
    trainer.fit()
    trainer.close()
    return clock


def main(words: list[str]) -> None:
    given = {key: int(value) for key, _, value in (word.partition("=") for word in words)}
    options = {**DEFAULTS, **given}
    config = MPTConfig(
        d_model=options["d_model"],
        n_heads=options["d_model"] // 64,
        n_layers=options["layers"],
        vocab_size=VOCAB_SIZE,
        max_seq_len=LENGTH,
        no_bias=True,
        attn_config=AttnConfig(alibi=True),
    )
    network = MPT(config, seed=1)
    kinds = {
        "Composer's": lambda folder: CheckpointSaver(folder, save_interval="2ba", remote_file_name=None),
        "ours, waiting": lambda folder: AtomicCheckpoints(folder, save_interval="2ba", in_background=False),
        "ours, in the background": lambda folder: AtomicCheckpoints(folder, save_interval="2ba"),
    }
    held: dict[str, list[float]] = {kind: [] for kind in kinds}
    slower: dict[str, list[float]] = {kind: [] for kind in kinds}
    speeds = []
    for _ in range(options["runs"]):
        for kind, make in kinds.items():
            with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
                clock = train(network, options["batches"], make(folder))
                held[kind] += clock.between[1::2]
                slower[kind].append(
                    statistics.median(clock.batches[2::2]) / statistics.median(clock.batches[1::2])
                )
                file = max(Path(folder).glob("ep*.pt"))
                size = file.stat().st_size
                began_at = time.perf_counter()
                checkpoint = checkpoint_at(file)
                assert checkpoint.damage(checkpoint.parts()) is None
                speeds.append((time.perf_counter() - began_at) / size * 1e9)
    print(f"checkpoint: {size / 1e6:,.0f} MB")
    for kind in kinds:
        print(
            f"{kind:24} held {1e3 * statistics.median(held[kind]):7,.0f} ms   other batches "
            f"{statistics.median(slower[kind]):.2f}"
        )
    print(f"checking: {statistics.median(speeds):.2f} s per GB")


if __name__ == "__main__":
    from words import given_words

    main(given_words(__doc__))
