"""One run per folder: while a run trains, another run that would write into its folder is refused.

The lock is a system lock on the file `.lock` in the folder, which exists while a run holds it. It ends with
the process that holds it, even if that is killed. It works across machines if the file system supports that
(NFS 4, Lustre mounted with `flock`). On a file system without locks we print a warning, and only runs on the
same machine exclude each other.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from mptfoundry.errors import CheckpointError, ConfigError, RunStopped
from mptfoundry.files import is_alive, writing_into
from mptfoundry.ranks import decided_by_rank_0

NAME = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)

log = logging.getLogger(__name__)


# Names of files and folders that a run writes.
_FILES, _FOLDERS = (NAME, "config.yaml", "metrics.jsonl", "report.png", "report.md"), ("tokenizer",)


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[RunLock]:
    """Lock the run's folder for this run, on rank 0; all ranks enter this together.

    Raises:
        CheckpointError: Another run holds it.
        ConfigError: It can't be written to, or holds something else under a name that the run writes.
    """
    lock = RunLock(folder)
    with contextlib.ExitStack() as stack:
        decided_by_rank_0(lambda: stack.enter_context(lock) and None)
        decided_by_rank_0(lambda: _refuse_other_kinds(folder))
        yield lock


def _refuse_other_kinds(folder: Path) -> None:
    """Raise ConfigError if a folder is where the run writes a file, or a file where it writes a folder."""
    for name in (*_FILES, *_FOLDERS):
        path, is_file = folder / name, name in _FILES
        if path.is_dir() if is_file else path.is_file():
            found, written = ("folder", "file") if is_file else ("file", "folder")
            raise ConfigError(
                f"save_folder: {path} is a {found}, and the run writes a {written} there. Move it away."
            )


class RunLock:
    """The lock of a run's folder, as a context in one process; the folder is made if it doesn't exist.

    A start that ends before `begin` leaves the folder as it was. After an error in training a checkpoint may
    still be on its way to disk: then the lock stays until the process ends.

    Raises:
        CheckpointError: Another process, named in the text, holds it.
        ConfigError: The folder can't be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = -1
        self._before: bytes | None = None
        self._made: list[Path] = []
        self._has_begun = False

    def __enter__(self) -> RunLock:
        self._made = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
        self._hold()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not self._has_begun or issubclass(kind, RunStopped):
            self._release()
        else:
            atexit.register(self._release)

    def begin(self) -> None:
        """Mark that the run now writes into the folder, so that the folder stays."""
        self._has_begun = True

    def is_lost(self) -> bool:
        """Whether the lock file or the folder has been removed."""
        return not _is_at(self._file, self.folder / NAME)

    def take_again(self) -> None:
        """Make the folder again after it was removed, and lock it.

        Raises:
            CheckpointError: Another run has taken the folder.
        """
        self._close()
        self._hold()

    def _hold(self) -> None:
        path = self.folder / NAME
        while True:
            with writing_into(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                was_there = path.exists()
                # Forked workers don't inherit this kind of lock, so it ends with exactly this process.
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                _take(self._file, self.folder)
            except CheckpointError:
                self._close()
                raise
            if _is_at(self._file, path):
                break
            self._close()  # the holder has removed it since we opened it
        self._before = os.pread(self._file, 1 << 12, 0) if was_there else None
        with writing_into(self.folder):
            self._write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())

    def _release(self) -> None:
        if self._file < 0:
            return
        if self._before is not None and not self._has_begun:
            self._write(self._before)
        elif not self.is_lost():
            (self.folder / NAME).unlink()
        self._close()
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails if it isn't empty, which is fine

    def _close(self) -> None:
        os.close(self._file)
        self._file = -1

    def _write(self, content: bytes) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, content, 0)


def _is_at(file: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _take(file: int, folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        host, pid = _holder(file)
        if error.errno in _TAKEN:
            raise _in_use(folder, host, pid) from error
        if host == socket.gethostname() and pid not in (None, os.getpid()) and is_alive(pid):
            raise _in_use(folder, host, pid) from error
        log.warning(
            "save_folder: %s lies on a file system without locks (%s): a second run there from another "
            "machine is not noticed.",
            folder,
            error.strerror,
        )


def _holder(file: int) -> tuple[str | None, int | None]:
    try:
        said = json.loads(os.pread(file, 1 << 12, 0))
        return str(said["host"]), int(said["pid"])
    except (ValueError, KeyError, TypeError):
        return None, None


def _in_use(folder: Path, host: str | None, pid: int | None) -> CheckpointError:
    who = f"process {pid} on {host}" if pid is not None else "another process"
    return CheckpointError(
        f"save_folder: {folder} is in use by the run of {who}. Wait for it, end it, or use another run_name "
        "or save_folder."
    )
