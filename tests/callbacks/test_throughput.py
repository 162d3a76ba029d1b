"""Tokens per second, MFU and ETA: what is timed, and by what it is divided."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from composer import Callback, Trainer
from composer.core import State

from mptfoundry.callbacks.throughput import Throughput
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.flops import flops_per_token
from mptfoundry.run.metrics_file import MetricsFile, read_rows

PAUSE_SECONDS = 0.2


class SlowCheckpoint(Callback):
    def batch_checkpoint(self, state: State, logger: object) -> None:
        time.sleep(PAUSE_SECONDS)


def rows_of(
    make_trainer: Callable[..., Trainer], config: MPTConfig, folder: Path, max_duration: str
) -> tuple[list[dict], float]:
    """The rows of a run with slow checkpoints, and the seconds that it took in all."""
    trainer = make_trainer(
        loggers=[MetricsFile(folder)],
        callbacks=[Throughput(config, peak_flops=1e9), SlowCheckpoint()],
        max_duration=max_duration,
    )
    started_at = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - started_at
    trainer.close()
    return list(read_rows(folder / "metrics.jsonl")), seconds


@pytest.mark.serial
@pytest.mark.parametrize("max_duration", ["5ba", "160tok", "20sp", "1ep"])
def test_checkpoints_slow_down_the_eta_and_not_the_tokens_per_second(
    make_trainer: Callable[..., Trainer], config: MPTConfig, tmp_path: Path, max_duration: str
) -> None:
    rows, seconds = rows_of(make_trainer, config, tmp_path, max_duration)
    # The first batch warms up and isn't counted, so the last row speaks of all but one.
    trained_seconds = (len(rows) - 1) * 32 / rows[-1]["tokens_per_second"]
    assert trained_seconds + len(rows) * PAUSE_SECONDS < seconds
    # After four batches, two pauses have been seen in three batches.
    assert rows[3]["eta_seconds"] > (len(rows) - 4) * PAUSE_SECONDS * 2 / 3
    assert rows[-1]["eta_seconds"] == 0


class Stop(Callback):
    """Ends the training as a request to stop does."""

    def batch_end(self, state: State, logger: object) -> None:
        if state.timestamp.batch == 3:
            state.stop_training()


def test_the_eta_of_a_run_that_is_stopped_is_that_of_its_end(
    make_trainer: Callable[..., Trainer], config: MPTConfig, tmp_path: Path
) -> None:
    trainer = make_trainer(
        loggers=[MetricsFile(tmp_path)], callbacks=[Stop(), Throughput(config)], max_duration="6ba"
    )
    trainer.fit()
    trainer.close()
    last = list(read_rows(tmp_path / "metrics.jsonl"))[-1]
    assert last["batch"] == 3 and last["eta_seconds"] > 0


def test_mfu_is_flops_over_the_peak(
    make_trainer: Callable[..., Trainer], config: MPTConfig, tmp_path: Path
) -> None:
    row = rows_of(make_trainer, config, tmp_path, max_duration="2ba")[0][-1]
    assert row["tokens_per_second_per_device"] == row["tokens_per_second"]
    for name, causal in (("mfu", False), ("mfu_causal", True)):
        flops = row["tokens_per_second"] * flops_per_token(config, 8, causal=causal)
        assert row[name] == pytest.approx(flops / 1e9)
