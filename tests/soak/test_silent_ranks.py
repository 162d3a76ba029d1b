"""Ranks that fail, hang or die while others wait: the others end, and say which rank it was."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "a rank hangs",
        "it sleeps, rank 0 and 1",
        "after `dist_timeout`, an error names it and its line of code",
    ),
    ("a rank is killed", "SIGKILL", "an error names it, exit code 1"),
    ("one rank raises an error", "rank 0 and 1", "the launcher exits with its exit code"),
    (
        "a loss is not finite on one of two ranks",
        "multiplied by NaN",
        "all end with one error, older checkpoints stay",
    ),
]

# What one rank does at batch 4, in place of a callback with a known name.
CODE = """
import os, time
from composer.core import Callback
from mptfoundry import plugins
from mptfoundry.errors import DataError

class Trouble(Callback):
    def batch_start(self, state, logger):
        if os.environ["RANK"] == "{rank}" and state.timestamp.batch == 3:
            self.trouble()

    def trouble(self):
        {trouble}

plugins.callbacks["lr_monitor"] = Trouble
"""


@pytest.fixture
def with_trouble(tmp_path: Path) -> Callable[[int, str], list[str]]:
    def words(rank: int, trouble: str) -> list[str]:
        (tmp_path / "trouble.py").write_text(CODE.format(rank=rank, trouble=trouble))
        return [f"code_paths=[{tmp_path}/trouble.py]", "allow_code=true", "callbacks.lr_monitor={}"]

    return words


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_after_the_timeout(
    tiny_run: Path, launch: Callable[..., Any], with_trouble: Callable[[int, str], list[str]], rank: int
) -> None:
    started_at = time.monotonic()
    run = launch(tiny_run, "dist_timeout=10", *with_trouble(rank, "time.sleep(3600)"), ranks=2, launcher=True)
    assert run.wait() != 0
    assert time.monotonic() - started_at < 200
    assert f"rank {rank} did not arrive: it is in batch 4 at " in run.printed, run.printed
    assert "trouble.py:" in run.printed and "Traceback" not in run.printed


def test_a_rank_that_is_killed_is_named(
    tiny_run: Path, launch: Callable[..., Any], with_trouble: Callable[[int, str], list[str]]
) -> None:
    run = launch(
        tiny_run, "dist_timeout=10", *with_trouble(1, "os.kill(os.getpid(), 9)"), ranks=2, launcher=True
    )
    assert run.wait() != 0
    assert "rank 1 gives no sign of life in batch 4" in run.printed, run.printed


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_the_launchers_exit_code(
    tiny_run: Path, launch: Callable[..., Any], with_trouble: Callable[[int, str], list[str]], rank: int
) -> None:
    run = launch(tiny_run, *with_trouble(rank, 'raise DataError("shard 7 is gone")'), ranks=2, launcher=True)
    assert run.wait() == 1, run.printed
    assert f"rank {rank}: error: shard 7 is gone" in run.printed
    assert "gloo" not in run.printed


def test_a_number_that_is_not_finite_on_one_rank_ends_all_with_one_error(
    tiny_run: Path, launch: Callable[..., Any], tmp_path: Path
) -> None:
    code = CODE.replace("def batch_start", "def after_forward").replace(
        "self.trouble()", "state.outputs.loss.mul_(float('nan'))"
    )
    (tmp_path / "trouble.py").write_text(code.format(rank=1, trouble="pass"))
    words = [f"code_paths=[{tmp_path}/trouble.py]", "allow_code=true", "callbacks.lr_monitor={}"]
    run = launch(tiny_run, "run_name=nan", *words, ranks=2)
    assert run.wait() == 1, run.printed
    assert run.printed.count("error: batch 4: the loss is nan on rank 1 (samples ") == 1, run.printed
    assert sorted(path.name for path in (tmp_path / "nan").glob("ep*.pt")) == ["ep0-ba3-rank0.pt"]


def test_a_killed_rank_0_is_named_by_the_others_where_no_launcher_ends_them(
    tiny_run: Path, with_trouble: Callable[[int, str], list[str]], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["dist_timeout=10", *with_trouble(0, "os.kill(os.getpid(), 9)")]
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    meeting |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "mptfoundry.cli", "train", str(tiny_run), *words],
            env={**os.environ, **meeting, "RANK": number, "LOCAL_RANK": number},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in ("0", "1")
    ]
    printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert ranks[1].returncode == 1
    assert "rank 1: error: rank 0 gives no sign of life in batch 4" in printed[1], printed[1]
    assert "Traceback" not in printed[1]
