"""Runs that are stopped by real signals to this process, and go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composer.core import Callback, State
from composer.loggers import Logger

from mptfoundry import build
from mptfoundry.config.load import load_train_config
from mptfoundry.errors import RunStopped
from mptfoundry.run.metrics_file import read_rows
from mptfoundry.train import train
from tests.marks import some_of

pytestmark = pytest.mark.long

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "SIGTERM at 5 points of training and evaluation",
        "in one process",
        "the same losses and evaluations afterwards",
    ),
]

Run = Callable[..., list[dict[str, Any]]]


class SignalAt(Callback):
    """Sends this process SIGTERM at an event of a batch, once."""

    event, batch = "", 0

    def __init__(self) -> None:
        setattr(self, self.event, self._send)

    def _send(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == self.batch:
            type(self).batch = -1
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 30
            while not signal.getsignal(signal.SIGTERM).__self__.requested:  # type: ignore[union-attr]
                assert time.monotonic() < deadline, "the signal was not heard"


@pytest.fixture(scope="module")
def run(tiny_runs: Path, shards: Path) -> Run:
    """Trains under a name, with a signal at an event of a batch or without; returns its metrics."""
    evaluation = f"eval_loader={{name: text, label: held_out, dataset: {{local: {shards}/a, split: val}}}}"
    words = [
        evaluation,
        "eval_interval=2ba",
        "max_duration=4ba",
        "save_interval=100ba",
        "log_to_console=false",
    ]

    def start(name: str, event: str = "", batch: int = -1, *more: str) -> list[dict[str, Any]]:
        told = ["callbacks.lr_monitor={}"] if event else []
        config, _ = load_train_config(tiny_runs, [f"run_name={name}", *words, *told, *more])
        try:
            with pytest.MonkeyPatch.context() as patch:
                signals = type("SignalAt", (SignalAt,), {"event": event, "batch": batch})
                patch.setitem(build.CALLBACKS, "lr_monitor", signals)
                train(config)
        except RunStopped as stopped:
            assert event, "only who was asked stops"
            assert f"{name} stopped after batch " in str(stopped)
        return list(read_rows(tiny_runs.parent / name / "metrics.jsonl"))

    return start


def told(rows: list[dict[str, Any]]) -> list[tuple[int, Any]]:
    """What is the same however often a run was stopped: losses and evaluations."""
    found = [(row["batch"], row.get("loss", row.get("eval"))) for row in rows]
    return sorted(found, key=lambda each: (each[0], isinstance(each[1], dict)))


@pytest.fixture(scope="module")
def whole(run: Run) -> list[tuple[int, Any]]:
    return told(run("whole"))


@pytest.mark.parametrize(
    ("event", "batch"),
    some_of(
        [
            ("before_forward", 0),
            ("before_forward", 1),
            ("eval_batch_start", 2),
            ("before_forward", 3),
            ("eval_batch_start", 4),
        ]
    ),
)
def test_stopped_anywhere_a_run_goes_on_to_the_same_losses_and_evaluations(
    run: Run, whole: list[tuple[int, Any]], event: str, batch: int
) -> None:
    name = f"stopped-{event}-{batch}"
    stopped = told(run(name, event, batch))
    assert len(stopped) < len(whole)
    assert told(run(name)) == whole


def test_stopped_in_the_evaluation_at_an_epochs_end_a_run_goes_on_with_the_next_epoch(run: Run) -> None:
    words = ["eval_interval=1ep", "max_duration=2ep", "train_loader.dataset.epoch_size=16"]
    whole = told(run("epochs", "", -1, *words))
    assert [batch for batch, value in whole if isinstance(value, float)] == [1, 2, 3, 4]
    stopped = told(run("stopped-epochs", "eval_batch_start", 2, *words))
    assert [batch for batch, _ in stopped] == [1, 2]
    assert told(run("stopped-epochs", "", -1, *words)) == whole


def test_a_run_that_keeps_nothing_says_so(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        build.CALLBACKS, "lr_monitor", type("S", (SignalAt,), {"event": "before_forward", "batch": 1})
    )
    words = ["run_name=unsaved", "save_folder=null", "callbacks.lr_monitor={}", "max_duration=4ba"]
    config, _ = load_train_config(tiny_run, words)
    with pytest.raises(RunStopped, match="Nothing is kept of it, since save_folder is null"):
        train(config)
