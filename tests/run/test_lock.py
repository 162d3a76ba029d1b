from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.run.lock import NAME, RunLock

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "a second run in the folder; the first one is dead",
        "processes, SIGKILL, no file locks, 5",
        "refused with host and process; starts",
    ),
]

HOLDS = """
import sys
from pathlib import Path
from mptfoundry.run.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", HOLDS, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_a_second_process_is_refused_by_the_first_ones_host_and_number(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as first:
        with (
            pytest.raises(
                CheckpointError, match=rf"in use by the run of process {first.pid} on {socket.gethostname()}"
            ),
            RunLock(tmp_path / "run"),
        ):
            pass
        first.kill()
        first.wait()
        left = (tmp_path / "run" / NAME).read_text()
        with RunLock(tmp_path / "run"):
            assert json.loads((tmp_path / "run" / NAME).read_text())["pid"] == os.getpid()
        assert (tmp_path / "run" / NAME).read_text() == left
        with RunLock(tmp_path / "run") as lock:
            lock.has_begun = True
        assert not (tmp_path / "run" / NAME).exists()


def test_a_start_that_never_begins_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError), RunLock(tmp_path / "runs" / "run"):
        raise CheckpointError("refused")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_removed_is_held_again_unless_another_run_has_taken_it(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as lock:
        assert not lock.is_lost()
        shutil.rmtree(tmp_path / "run")
        assert lock.is_lost()
        lock.take()
        assert json.loads((tmp_path / "run" / NAME).read_text())["pid"] == os.getpid()
        shutil.rmtree(tmp_path / "run")
        with holder(tmp_path / "run") as other:
            with pytest.raises(CheckpointError, match=f"process {other.pid} on"):
                lock.take()
            other.kill()


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_a_run_of_the_same_machine_is_refused_and_others_are_said_not_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with holder(tmp_path) as first:
        monkeypatch.setattr(fcntl, "lockf", no_locks)
        with pytest.raises(CheckpointError, match=f"process {first.pid} on"), RunLock(tmp_path):
            pass
        first.kill()
        first.wait()
    with RunLock(tmp_path):
        pass
    assert "a file system without locks (No locks available): a second run" in caplog.text


def test_a_place_that_cannot_be_written_is_the_configs_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="can't be written to: File exists"),
        RunLock(tmp_path / "file"),
    ):
        pass
