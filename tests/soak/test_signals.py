"""SIGTERM and SIGINT to real runs: saved within the launcher's patience, and resumed bitwise."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.run.metrics_file import read_rows
from tests.conftest import ROOT, losses_by_batch

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "SIGTERM to the launcher, the group or one rank; SIGUSR1; a closed terminal; Ctrl-C",
        "1 and 2 ranks, 0 and 2 workers",
        "saves, 143 on all ranks, bitwise afterwards",
    ),
    ("SIGTERM in an evaluation; during a start", "2 ranks; 1 rank", "breaks off and saves; ends cleanly"),
]

# Half a second a batch, so that there is time to stop it; in place of a callback with a known name.
SLOW = """
import time
from composer.core import Callback
from mptfoundry import plugins

class Slow(Callback):
    def batch_start(self, state, logger):
        time.sleep(0.5)

    def eval_batch_start(self, state, logger):
        time.sleep(1)

plugins.callbacks["lr_monitor"] = Slow
"""


@pytest.fixture
def slow(tmp_path: Path) -> list[str]:
    (tmp_path / "slow.py").write_text(SLOW)
    return [f"code_paths=[{tmp_path}/slow.py]", "allow_code=true", "callbacks.lr_monitor={}"]


def wait_for_batch(run: Any, folder: Path, batch: int) -> None:
    metrics = folder / "metrics.jsonl"
    while run.process.poll() is None:
        if metrics.is_file() and any(number >= batch for number, _ in losses_by_batch(folder)):
            return
        time.sleep(0.1)
    raise AssertionError(run.printed)


def ranks_of(run: Any) -> list[int]:
    """The processes that the launcher has started, in the order of their ranks."""
    listed = subprocess.run(["pgrep", "-P", str(run.process.pid)], capture_output=True, text=True).stdout
    return [int(word) for word in listed.split()]


def to_the_launcher(run: Any, number: int) -> None:
    run.process.send_signal(number)


def to_the_group(run: Any, number: int) -> None:
    os.killpg(run.process.pid, number)


def to_one_rank(run: Any, number: int) -> None:
    os.kill(ranks_of(run)[-1], number)


@pytest.mark.parametrize(
    ("send", "number", "ranks", "workers"),
    [
        (to_the_launcher, signal.SIGTERM, 2, 0),
        (to_the_group, signal.SIGTERM, 2, 2),
        (to_the_group, signal.SIGINT, 1, 2),
        (to_one_rank, signal.SIGTERM, 2, 0),
        (to_one_rank, signal.SIGUSR1, 2, 0),
    ],
)
def test_a_signal_is_a_checkpoint_at_the_end_of_the_batch_and_the_same_command_goes_on(
    tiny_run: Path,
    launch: Callable[..., Any],
    tmp_path: Path,
    slow: list[str],
    send: Callable[[Any, int], None],
    number: int,
    ranks: int,
    workers: int,
) -> None:
    words = [f"train_loader.num_workers={workers}", *slow]
    run = launch(tiny_run, "run_name=stopped", *words, ranks=ranks, launcher=True)
    wait_for_batch(run, tmp_path / "stopped", 4)
    sent_at = time.monotonic()
    send(run, number)
    assert run.wait() == 143, run.printed
    assert time.monotonic() - sent_at < 30
    last = losses_by_batch(tmp_path / "stopped")[-1][0]
    assert last in (4, 5, 6) and (tmp_path / "stopped" / f"ep0-ba{last}-rank0.pt").is_file()
    assert f"stopped after batch {last}" in run.printed and "The same command continues." in run.printed
    again = launch(
        tiny_run, "run_name=stopped", f"train_loader.num_workers={workers}", ranks=ranks, launcher=True
    )
    whole = launch(
        tiny_run, "run_name=whole", f"train_loader.num_workers={workers}", ranks=ranks, launcher=True
    )
    assert again.wait() == 0 and whole.wait() == 0, again.printed
    assert losses_by_batch(tmp_path / "stopped") == losses_by_batch(tmp_path / "whole")


def take_the_terminal() -> None:
    """Make standard input the terminal of the session that this process begins."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_run_whose_terminal_is_closed_saves_and_the_same_command_goes_on(
    tiny_run: Path, launch: Callable[..., Any], tmp_path: Path, slow: list[str]
) -> None:
    terminal, ours = pty.openpty()
    command = [sys.executable, "scripts/train.py", str(tiny_run), "run_name=stopped", *slow]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=ours,
        stdout=ours,
        stderr=ours,
        start_new_session=True,
        preexec_fn=take_the_terminal,
    )
    os.close(ours)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and len(losses_by_batch(metrics.parent)) >= 4):
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)
    assert process.wait(timeout=120) == 143
    last = losses_by_batch(tmp_path / "stopped")[-1][0]
    assert 4 <= last < 12 and (tmp_path / "stopped" / f"ep0-ba{last}-rank0.pt").is_file()
    again = launch(tiny_run, "run_name=stopped", launcher=True)
    assert again.wait() == 0 and len(losses_by_batch(tmp_path / "stopped")) == 12, again.printed


def test_an_evaluation_is_left_for_a_signal(
    tiny_run: Path, launch: Callable[..., Any], tmp_path: Path, slow: list[str], shards: Path
) -> None:
    evaluation = f"eval_loader={{name: text, label: held_out, dataset: {{local: {shards}/a, split: val}}}}"
    words = [evaluation, "eval_interval=4ba", "device_eval_batch_size=1"]
    run = launch(tiny_run, "run_name=stopped", *words, *slow, ranks=2, launcher=True)
    wait_for_batch(run, tmp_path / "stopped", 4)
    time.sleep(2)
    to_the_launcher(run, signal.SIGTERM)
    assert run.wait() == 143, run.printed
    assert (tmp_path / "stopped" / "ep0-ba4-rank0.pt").is_file() and "stopped after batch 4" in run.printed
    assert not any("eval" in row for row in read_rows(tmp_path / "stopped" / "metrics.jsonl"))


def test_a_signal_while_a_run_starts_ends_it_cleanly(tiny_run: Path, launch: Callable[..., Any]) -> None:
    run = launch(tiny_run, "run_name=early", ranks=2, launcher=True)
    # What a run will be is said before its data and its model are there.
    while "run folder" not in run.printed and run.process.poll() is None:
        time.sleep(0.05)
    to_the_launcher(run, signal.SIGTERM)
    assert run.wait() == 143, run.printed
    assert "nothing had to be saved" in run.printed
