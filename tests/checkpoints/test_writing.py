from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mptfoundry.checkpoints.writing import whole_or_absent
from mptfoundry.errors import CheckpointError


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
    with pytest.raises(CheckpointError, match=r"is there already. Name another place, or set overwrite=true"):
        whole_or_absent(out).__enter__()
    assert entries(out) == ["file"]


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
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
