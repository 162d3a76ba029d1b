"""One run in one folder: while it goes on, another that would write there is refused.

The lock is the system's, on a file `.lock` in the folder, and it ends with the process that holds it,
however that ends. It reaches over machines where the file system does that (NFS 4, Lustre mounted with
`flock`). Where the file system has no locks this is said, and only runs of the same machine are told apart.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mptfoundry.checkpoints.writing import is_alive, writing_into
from mptfoundry.errors import CheckpointError

NAME = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)

log = logging.getLogger(__name__)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if it isn't there.

    Raises:
        CheckpointError: Another process holds it, which is named.
        ConfigError: The folder can't be written to.
    """
    with writing_into(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Of the kind that forked workers don't inherit, so that it ends with this very process.
        file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _take(file, folder)
    except CheckpointError:
        os.close(file)
        raise
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    yield
    # After an error a checkpoint may still be on its way to the disk: the lock then ends with the process.
    os.ftruncate(file, 0)
    os.close(file)


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
