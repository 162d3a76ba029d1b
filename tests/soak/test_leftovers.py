"""Twenty runs that are killed with all their processes leave what one leaves, and the next start nothing."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mptfoundry.run.metrics_file import read_rows

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("20 runs are killed one after another", "SIGKILL", "leave no more behind than one does"),
]

KILLED_RUNS = 20


def numbers_of(run: Any) -> set[str]:
    """The numbers of the data sets that the processes of a run have open."""
    found: set[str] = set()
    listed = subprocess.run(["pgrep", "-s", str(run.process.pid)], capture_output=True, text=True).stdout
    for process in listed.split():
        maps = Path("/proc", process, "maps")
        found |= set(re.findall(r"/dev/shm/(\d{6})_", maps.read_text())) if maps.exists() else set()
    return found


def test_twenty_killed_runs_leave_no_more_than_one(
    tiny_run: Path, launch: Callable[..., Any], tmp_path: Path, shards: Path
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    used: list[set[str]] = []
    for number in range(KILLED_RUNS):
        run = launch(
            tiny_run,
            f"run_name=killed{number}",
            "train_loader.num_workers=2",
            TMPDIR=str(temporary),
            launcher=True,
        )
        metrics = tmp_path / f"killed{number}" / "metrics.jsonl"
        while run.process.poll() is None and not (metrics.is_file() and len(list(read_rows(metrics))) > 1):
            time.sleep(0.02)
        used.append(numbers_of(run))
        run.kill_all()
    last = launch(tiny_run, "run_name=last", TMPDIR=str(temporary), launcher=True)
    assert last.wait() == 0, last.printed
    assert all(used)
    # What a run leaves at its own end is removed a moment after it, by Python's tracker of such blocks.
    until = time.monotonic() + 30
    while ours(used, shards) and time.monotonic() < until:
        time.sleep(0.2)
    assert not ours(used, shards)
    # The launcher's folder for logs is empty where there is one rank, so nothing tells whose it was.
    # A module that torch has written is removed by its age, an hour.
    modules = {path.parent for path in temporary.glob("tmp*/_remote_module_non_scriptable.py")}
    kept = [path for path in temporary.iterdir() if path not in modules]
    names = {path.name for path in kept if path.is_file() or list(path.iterdir())}
    locks = {name for name in names if name.endswith("_filelock")}
    assert names - locks <= {f"mptfoundry-{os.getuid()}.lock"}, names
    # Those of the last run itself, and of a number that somebody else uses now.
    assert len(locks) <= 4


def ours(used: list[set[str]], shards: Path) -> list[str]:
    """The numbers of the killed runs that still hold the place of their data, and not somebody else's."""
    place, found = str(shards).lstrip("/").encode(), []
    for number in set.union(*used):
        with contextlib.suppress(FileNotFoundError):
            if place in Path("/dev/shm", f"{number}_locals").read_bytes():
                found.append(number)
    return found
