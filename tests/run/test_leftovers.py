"""Dead runs are made here by killing real ones; a live one stands beside them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mptfoundry.cli import main
from mptfoundry.errors import TrainingError
from mptfoundry.run import leftovers
from mptfoundry.run.leftovers import clean_start, find_leftovers, remove_leftovers

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("shared memory of a dead run; of a live run", "SIGKILL", "removed; kept"),
]

READS = """
import sys
from streaming import StreamingDataset
data = StreamingDataset(local={local!r}, batch_size=1, num_canonical_nodes=1)
data[0]
print(data._shm_prefix_int, flush=True)
sys.stdin.read()
"""

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory has no folder here"),
]


@pytest.fixture
def own_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def start(shards: Path, own_temporary: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], str]]]:
    """Starts a process that reads a data set until it is killed; returns it and its number among all."""
    started: list[subprocess.Popen[str]] = []

    def run() -> tuple[subprocess.Popen[str], str]:
        code = READS.format(local=str(shards / "a" / "train"))
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process, f"{int(process.stdout.readline()):06}"

    yield run
    for process in started:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """The process and its resource tracker, which would tidy up, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def numbers(found: list[Path]) -> set[str]:
    return {match[0] for each in found if (match := re.match(r"\d{6}", each.name))}


def test_what_a_killed_run_left_is_removed_and_what_a_live_one_uses_stays(
    start: Callable[[], tuple[subprocess.Popen[str], str]], own_temporary: Path
) -> None:
    (alive, living), (dead, left) = start(), start()
    for number in (living, left):
        (own_temporary / f"{number}_cache_filelock").touch()
    assert not {living, left} & numbers(find_leftovers())
    kill(dead)
    found = [each for each in find_leftovers() if each.name.startswith((living, left))]
    places = {str(each.parent) for each in found}
    assert numbers(found) == {left} and places == {"/dev/shm", str(own_temporary)}
    assert remove_leftovers(found) == found
    assert not list(Path("/dev/shm").glob(f"{left}_*")) and list(Path("/dev/shm").glob(f"{living}_*"))
    assert alive.poll() is None


def test_a_start_cleans_unless_another_run_is_starting(own_temporary: Path) -> None:
    lock = own_temporary / "000999_barrier_filelock"
    lock.touch()
    code = (
        "import sys, mptfoundry.run.leftovers as l; s = l.clean_start(); print(flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"\n" and not lock.exists()
    lock.touch()
    clean_start().close()
    assert lock.exists()
    other.communicate()
    clean_start().close()
    assert not lock.exists()


PRINTS = """
import sys
from mptfoundry.run.leftovers import mark_logs
mark_logs()
"""


def test_logs_and_meeting_places_go_when_nobody_has_them(own_temporary: Path) -> None:
    logs, foreign, meeting = (own_temporary / name for name in ("tmpabcdefgh", "tmp_of_others", "pymp-abc"))
    for folder in (logs, foreign, meeting):
        folder.mkdir()
    (foreign / "notes.txt").touch()
    with (logs / "rank1.stdout.txt").open("w") as log:
        subprocess.run([sys.executable, "-c", PRINTS], stdout=log, check=True)
    with (logs / "rank1.stdout.txt").open("w"), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(meeting / "l"))
        in_use = set(find_leftovers())
    assert not {logs, meeting} & in_use
    found = set(find_leftovers())
    assert {logs, meeting} <= found and foreign not in found


@pytest.mark.parametrize("name", ["tmpabcdefgh", "tmp.X", "mine"])
def test_a_folder_of_logs_that_the_user_named_stays(own_temporary: Path, name: str) -> None:
    """Named with the launcher's `--stdout`, and holding what the launcher's own would hold."""
    logs = own_temporary / name
    logs.mkdir()
    for kind in ("stdout", "stderr"):
        (logs / f"rank1.{kind}.txt").touch()
    launcher = (
        "import subprocess, sys; log = open(sys.argv[2], 'w');"
        "subprocess.run([sys.executable, '-c', sys.argv[3]], stdout=log, check=True)"
    )
    words = ["--stdout", str(logs / "rank1.stdout.txt"), PRINTS]
    subprocess.run([sys.executable, "-c", launcher, *words], check=True)
    assert logs not in set(find_leftovers())
    assert len(list(logs.iterdir())) == 2


SHARES_WORK = """
import multiprocessing, sys
semaphore = multiprocessing.get_context("spawn").Semaphore()
print(semaphore._semlock.name, flush=True)
sys.stdin.read()
"""


def test_semaphores_go_when_the_processes_that_share_them_were_killed(own_temporary: Path) -> None:
    """As the workers of a preparation do. Who made one has mapped it under a name that is gone."""
    command = [sys.executable, "-c", SHARES_WORK]
    made = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        for _ in range(2)
    ]
    try:
        paths = [
            Path(f"/dev/shm/sem.{each.stdout.readline().strip('/ ').strip()}") for each in made if each.stdout
        ]
        assert all(path.exists() for path in paths)
        assert not set(paths) & set(find_leftovers())
        kill(made[0])
        found = [each for each in find_leftovers() if each in paths]
        assert found == paths[:1]
        assert remove_leftovers(found) == found and paths[1].exists()
    finally:
        for each in made:
            kill(each)
        remove_leftovers([each for each in find_leftovers() if each in paths])


def test_a_module_that_torch_wrote_goes_by_its_age(own_temporary: Path) -> None:
    folders = [own_temporary / name for name in ("tmpaaaaaaaa", "tmpbbbbbbbb")]
    for folder in folders:
        folder.mkdir()
        (folder / "_remote_module_non_scriptable.py").touch()
    os.utime(folders[0], (0, 0))
    found = set(find_leftovers())
    assert folders[0] in found and folders[1] not in found


def test_doctor_lists_what_it_removes(own_temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["doctor", "clean=true"], ["doctor", "--clean"]):
        lock = own_temporary / "000998_cache_filelock"
        lock.touch()
        assert main(words) == 0
        assert f"removed {lock}, 0 bytes" in capsys.readouterr().out
        assert not lock.exists()


def test_doctor_removes_nothing_while_a_run_starts(
    own_temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with clean_start():
        left = own_temporary / "000901_barrier_filelock"  # what a run makes while it starts looks the same
        left.touch()
        assert main(["doctor", "clean=true"]) == 1
        assert "is starting a run on this machine" in capsys.readouterr().err and left.exists()
    assert main(["doctor", "clean=true"]) == 0 and not left.exists()


def test_without_a_view_of_processes_nothing_is_removed(
    own_temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_temporary / "000997_cache_filelock").touch()
    monkeypatch.setattr(leftovers, "PROCESSES", own_temporary / "none")
    assert find_leftovers() == []


HOLDS = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_start_that_another_process_holds_up_says_which_one_and_ends_with_an_error(
    own_temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = own_temporary / f"mptfoundry-{os.getuid()}.lock"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(place)], stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(TrainingError, match=rf"{place}: process {other.pid} has held this lock for"):
            clean_start(seconds=0.5)
        other.kill()
    assert f"start: waiting for process {other.pid}, which holds {place}" in capsys.readouterr().out
    clean_start(seconds=0.5).close()
