"""One run per folder: while a run trains, another run that would write into its folder is refused.

The lock is a system lock on the file `.lock` in the folder, which exists while a run holds it. It ends with
the process that holds it, even if that is killed. It works across machines if the file system supports that
(NFS 4, Lustre mounted with `flock`). On a file system without locks we print a warning, and only runs on the
same machine exclude each other.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from mptfoundry.errors import CheckpointError, ConfigError, RunStopped
from mptfoundry.files import Held, is_open_at, rewrite, take_lock, writing_into
from mptfoundry.ranks import decided_by_rank_0

NAME = ".lock"
# Names of files and folders that a run writes.
_FILES, _FOLDERS = (NAME, "config.yaml", "metrics.jsonl", "report.png", "report.md"), ("tokenizer",)

log = logging.getLogger(__name__)


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
            _refuse_kind(path, is_file)


def _refuse_kind(path: Path, is_file: bool) -> NoReturn:
    kind, written = ("folder", "file") if is_file else ("file", "folder")
    raise ConfigError(f"save_folder: {path} is a {kind}, and the run writes a {written} there. Move it away.")


class RunLock:
    """The lock of a run's folder, as a context in one process; the folder is made if it doesn't exist.

    A start that ends before it has begun leaves the folder as it was. After an error in training a checkpoint
    may still be on its way to disk: then the lock stays until the process ends.

    Attributes:
        folder: The run's folder.
        has_begun: The run writes into the folder; set by the run.

    Raises:
        CheckpointError: Another process, named in the text, holds it.
        ConfigError: The folder can't be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = -1
        self._before: bytes | None = None
        self._made: list[Path] = []
        self.has_begun = False

    def __enter__(self) -> RunLock:
        path = self.folder / NAME
        self._made = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
        with writing_into(self.folder):
            self._before = path.read_bytes() if path.is_file() else None
        self.take()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not self.has_begun or issubclass(kind, RunStopped):
            self._release()
        else:
            atexit.register(self._release)

    def is_lost(self) -> bool:
        """Whether the lock file or the folder has been removed."""
        return not is_open_at(self._file, self.folder / NAME)

    def take(self) -> None:
        """Lock the folder; if it was removed, make it again."""
        self._close()
        try:
            with writing_into(self.folder):
                # Forked workers don't inherit this kind of lock, so it ends with exactly this process.
                self._file = take_lock(self.folder / NAME, lock=fcntl.lockf, unlocked=self._warn)
        except Held as holder:
            raise CheckpointError(
                f"save_folder: {self.folder} is in use by the run of {holder}. Wait for it, end it, or use "
                "another run_name or save_folder."
            ) from holder

    def _warn(self, error: OSError) -> None:
        log.warning(
            "save_folder: %s lies on a file system without locks (%s): a second run there from another "
            "machine is not noticed.",
            self.folder,
            error.strerror,
        )

    def _release(self) -> None:
        if self._file < 0:
            return
        if self._before is not None and not self.has_begun:
            rewrite(self._file, self._before)
        elif not self.is_lost():
            (self.folder / NAME).unlink()
        self._close()
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails if it isn't empty, which is fine

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
