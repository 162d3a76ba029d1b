from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from mptfoundry.errors import CheckpointError
from mptfoundry.files import Held, locked, remove_unfinished, whole_or_absent


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    with whole_or_absent(out) as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "file").write_text("text")
        assert not out.exists()
    assert (out / "inner" / "file").read_text() == "text"
    assert entries(out.parent) == ["folder"]


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_or_absent(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("")
        raise RuntimeError
    assert entries(tmp_path) == []


def test_an_error_leaves_the_old_content(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_or_absent(out, overwrite=True) as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert out.read_text() == "old"


def test_files_and_folders_are_replaced_when_asked(tmp_path: Path) -> None:
    for make, name in ((Path.touch, "file"), (Path.mkdir, "folder")):
        for _ in range(2):
            with whole_or_absent(tmp_path / name, overwrite=True) as temporary:
                make(temporary)
    assert entries(tmp_path) == ["file", "folder"]


def test_what_is_there_is_refused_unless_it_is_an_empty_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with whole_or_absent(out) as temporary:
        temporary.mkdir()
        (temporary / "file").touch()
    with pytest.raises(CheckpointError, match=r"exists already. Use another path, or set overwrite=true"):
        whole_or_absent(out).__enter__()
    assert entries(out) == ["file"]


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname().replace(".", "-")
    left, alive = (tmp_path / f".out.{host}.{pid}.part" for pid in (dead.pid, os.getppid()))
    left.mkdir()
    alive.mkdir()
    with whole_or_absent(tmp_path / "out") as temporary:
        temporary.touch()
    assert not left.exists()
    assert alive.exists()


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match=r"can't be written"),
        whole_or_absent(tmp_path / "file" / "out"),
    ):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from mptfoundry import files as writing
if sys.argv[2] == "no exchange":
    writing._exchange = lambda one, other: False
kept, at = Path.rename, int(sys.argv[3])
calls = [0]
def rename(self, target):
    calls[0] += 1
    if calls[0] == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return kept(self, target)
Path.rename = rename
remove = writing.shutil.rmtree
writing.shutil.rmtree = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
with writing.whole_or_absent(sys.argv[1], overwrite=True) as temporary:
    temporary.mkdir()
    (temporary / "new").touch()
"""


@pytest.mark.parametrize(("how", "kill_at"), [("exchange", 9), ("no exchange", 2), ("no exchange", 9)])
def test_a_folder_that_was_being_replaced_when_its_process_was_killed_is_there(
    tmp_path: Path, how: str, kill_at: int
) -> None:
    """Killed between two renames, or after them; then a try that fails, and one that does not."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), how, str(kill_at)], check=False)
    assert done.returncode == -9
    assert out.exists() == (kill_at != 2)
    there = "old" if kill_at == 2 else "new"
    with pytest.raises(RuntimeError), whole_or_absent(out, overwrite=True) as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert entries(tmp_path) == ["out"] and entries(out) == [there]
    with whole_or_absent(out, overwrite=True) as temporary:
        temporary.mkdir()
    assert entries(tmp_path) == ["out"] and entries(out) == []


def test_what_was_being_replaced_is_not_among_the_unfinished(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname().replace(".", "-")
    for name in (f".ba10.{host}.{dead.pid}.old.part", f".ba10.{host}.{dead.pid}.part", ".ba5.other.1.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert [entry.name for entry in remove_unfinished(tmp_path, is_ours=False)] == [
        f".ba10.{host}.{dead.pid}.part"
    ]
    assert entries(tmp_path) == [".ba5.other.1.part", "ba10"]
    assert entries(tmp_path / "ba10") == [f".ba10.{host}.{dead.pid}.old.part"]
    remove_unfinished(tmp_path)
    assert entries(tmp_path) == ["ba10"]


@pytest.mark.parametrize("host", ["another", "this"])
def test_what_a_process_of_another_machine_or_of_the_same_number_was_replacing_is_put_back(
    tmp_path: Path, host: str
) -> None:
    """In one container after another, a run has the same number."""
    host = socket.gethostname().replace(".", "-") if host == "this" else host
    old = tmp_path / f".ba10.{host}.{os.getpid()}.old.part"
    old.mkdir()
    (old / "kept").touch()
    remove_unfinished(tmp_path)
    assert entries(tmp_path) == ["ba10"] and entries(tmp_path / "ba10") == ["kept"]


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    host = socket.gethostname().replace(".", "-")
    for name in (f".out.{host}.{os.getpid()}.part", f".out.{host}.{os.getpid()}.old.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    with whole_or_absent(tmp_path / "out", overwrite=True) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert entries(tmp_path) == ["out"] and entries(tmp_path / "out") == ["new"]


def test_a_lock_says_who_holds_it_and_is_waited_for_if_asked(tmp_path: Path) -> None:
    path, said = tmp_path / "folder" / "lock", []

    def waiting(holder: str) -> None:
        said.append(holder)
        first.close()

    with ExitStack() as first:
        first.enter_context(locked(path))
        with pytest.raises(Held, match=f"^process {os.getpid()} on {socket.gethostname()}$"), locked(path):
            pass
        with locked(path, waiting=waiting), pytest.raises(Held), locked(path):
            pass
    assert said == [f"process {os.getpid()} on {socket.gethostname()}"]


def test_a_lock_whose_file_its_holder_removes_is_taken_of_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"

    def waiting(_: str) -> None:
        shutil.rmtree(path.parent)
        first.close()

    with ExitStack() as first:
        first.enter_context(locked(path))
        with locked(path, waiting=waiting):
            assert path.is_file()
            with pytest.raises(Held), locked(path):
                pass
