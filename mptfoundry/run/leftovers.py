"""Remove what dead runs left in shared memory and in the temporary folder.

A killed process cannot clean up. Its shared memory blocks stay, and so do the locks that streaming always
leaves; streaming skips the number of each, so every start takes a little longer. A leftover is a file that no
process has mapped or open. All blocks and locks of one data set, `000017_*`, stay or go together. Only files
of this user are checked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from mptfoundry.errors import TrainingError
from mptfoundry.files import remove
from mptfoundry.ranks import local_rank

SHARED_MEMORY, PROCESSES = Path("/dev/shm"), Path("/proc")
# Names of streaming's blocks and locks, with the number of the data set; of torch's tensors, with a process
# ID; of semaphores of Python's multiprocessing, such as in `prepare`; of the launcher's logs.
_BLOCK = re.compile(
    r"(\d{6})_(locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data)"
)
_LOCK = re.compile(r"(\d{6})_(barrier|cache)_filelock")
_TENSOR = re.compile(r"torch_(\d+)_\d+_\d+")
_SEMAPHORE = re.compile(r"sem\.mp-[a-z0-9_]{8}")
_LOG = re.compile(r"rank\d+\.std(out|err)\.txt")
# Marks a log folder as made by the launcher; one of the user may look the same.
_LAUNCHERS = ".of-the-launcher"
_TORCH_MODULE = ("_remote_module_non_scriptable.py", "__pycache__")
_SECONDS_TO_READ_A_MODULE = 3600.0
_SOCKETS = PROCESSES / "net" / "unix"


def find_leftovers() -> list[Path]:
    """Find what dead processes of this user left here, sorted by path; empty if there is no /proc."""
    candidates = sorted({*_in_shared_memory(), *_in_temporary_folder()})
    if not candidates or not (PROCESSES / "self" / "fd").is_dir():
        return []
    # Done last, so that files that came into use meanwhile count as used.
    used = _used_files()
    living = {_number(Path(path).name) for path in used if Path(path).parent == SHARED_MEMORY} - {None}
    dead = [path for path in candidates if _number(path.name) not in living]
    return [path for path in dead if not any({str(f), _inode(f)} & used for f in _files(path))]


def remove_leftovers(leftovers: Sequence[Path]) -> list[Path]:
    """Remove leftovers; return those that are gone now."""
    for leftover in leftovers:
        with contextlib.suppress(OSError):
            remove(leftover)
    return [leftover for leftover in leftovers if not leftover.exists()]


def size_of(leftovers: Sequence[Path]) -> int:
    """Their bytes together."""
    total = 0
    for leftover in leftovers:
        with contextlib.suppress(OSError):
            total += sum(file.lstat().st_size for file in _files(leftover))
    return total


def clean_start(seconds: float = 60.0) -> contextlib.ExitStack:
    """Remove leftovers before a run opens its data; close the result when the data is open.

    The ranks of a run look for a free number one after the other, and must find the same one. So nothing is
    removed while another run on this machine starts, and the result keeps others from removing. Every rank
    calls this before the ranks meet; the first rank of a machine does the work.

    Raises:
        TrainingError: Another process that removes leftovers does not finish within `seconds`.
    """
    starts = contextlib.ExitStack()
    if local_rank() != 0:
        mark_logs()
        return starts
    with contextlib.suppress(OSError):
        place, file = _lock_file()
        starts.enter_context(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_leftovers(find_leftovers())
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            _share(file, place, seconds)
    return starts


def clean_now() -> tuple[dict[Path, int], list[Path]]:
    """Remove leftovers while no run starts; returns what was there, with its bytes, and what of it is gone.

    Raises:
        TrainingError: A run is starting here, whose new files may look like leftovers.
    """
    place, file = _lock_file()
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"{place}: {_holder(file)} is starting a run on this machine. Clean when that run trains."
            ) from None
        leftovers = find_leftovers()
        return {each: size_of([each]) for each in leftovers}, remove_leftovers(leftovers)


def _lock_file() -> tuple[Path, IO[str]]:
    """The file that starts of this user share on this machine, opened."""
    place = Path(tempfile.gettempdir()) / f"mptfoundry-{os.getuid()}.lock"
    return place, os.fdopen(os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))


def _share(file: IO[str], place: Path, seconds: float) -> None:
    """Share the lock with other starts; a process that removes leftovers holds it only briefly."""
    began_at, pause, has_said = time.monotonic(), 0.05, False
    while True:
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        waited = time.monotonic() - began_at
        if waited > seconds:
            raise TrainingError(
                f"{place}: {_holder(file)} has held this lock for {waited:.0f} s, so that no run can start. "
                "End that process."
            )
        if waited > seconds / 30 and not has_said:
            has_said = True
            print(f"start: waiting for {_holder(file)}, which holds {place}", flush=True)
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _holder(file: IO[str]) -> str:
    """Ask the system who holds a lock on a file."""
    with contextlib.suppress(OSError):
        for line in (PROCESSES / "locks").read_text().splitlines():
            words = line.split()
            if words[1:2] == ["FLOCK"] and words[5].endswith(f":{os.fstat(file.fileno()).st_ino}"):
                return f"process {words[4]}"
    return "another process"


def mark_logs() -> None:
    """Mark this process's log folder if the launcher made it and removes it at the end.

    Every rank but the first of a machine logs to a temporary folder of the launcher, unless the user passes
    `--stdout`.
    """
    with contextlib.suppress(OSError):
        words = (PROCESSES / str(os.getppid()) / "cmdline").read_text(errors="replace").split("\0")
        log = (PROCESSES / "self" / "fd" / "1").readlink()
        is_temporary = log.parent.parent == Path(tempfile.gettempdir()).resolve()
        if is_temporary and _LOG.fullmatch(log.name) and not any(w.startswith("--std") for w in words):
            (log.parent / _LAUNCHERS).touch()


def _in_shared_memory() -> Iterator[Path]:
    for path in _owned(SHARED_MEMORY):
        tensor = _TENSOR.fullmatch(path.name)
        is_dead = tensor and not (PROCESSES / tensor[1]).exists()
        if is_dead or _BLOCK.fullmatch(path.name) or _SEMAPHORE.fullmatch(path.name):
            yield path


def _in_temporary_folder() -> Iterator[Path]:
    sockets = _SOCKETS.read_text() if _SOCKETS.exists() else None
    for path in _owned(Path(tempfile.gettempdir())):
        if path.is_dir():
            inside = list(_owned(path))
            names = {each.name for each in inside}
            is_log = _LAUNCHERS in names and all(map(_LOG.fullmatch, names - {_LAUNCHERS}))
            # A socket for passing tensors between loader workers; if it is listed, a process uses it.
            is_meeting = path.name.startswith("pymp-") and all(each.is_socket() for each in inside)
            is_dead = is_meeting and sockets is not None and not any(str(each) in sockets for each in inside)
            # A module that torch writes and reads once; nobody keeps it open, so we go by its age.
            is_read = all(each.name in _TORCH_MODULE for each in inside)
            is_read = is_read and time.time() - path.stat().st_mtime > _SECONDS_TO_READ_A_MODULE
            if inside and (is_log or is_dead or is_read):
                yield path
        elif _LOCK.fullmatch(path.name):
            yield path


def _owned(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                if path.lstat().st_uid == os.getuid() and not path.is_symlink():
                    yield path


def _files(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else [path]


def _number(name: str) -> str | None:
    match = _BLOCK.fullmatch(name) or _LOCK.fullmatch(name)
    return match[1] if match else None


def _inode(path: Path) -> str:
    with contextlib.suppress(OSError):
        return f"{SHARED_MEMORY} {path.stat().st_ino}" if path.parent == SHARED_MEMORY else ""
    return ""


def _used_files() -> set[str]:
    """Return the files of our two folders that a process has mapped, and every file that one has open.

    Only processes that this user may inspect are read. A semaphore is mapped under a temporary name that is
    then removed, so we also compare inodes.
    """
    shared, temporary = f"{SHARED_MEMORY}/", f"{tempfile.gettempdir()}/"
    used = set()
    for process in PROCESSES.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for line in (process / "maps").read_text().splitlines():
                if shared in line or temporary in line:
                    inode, path = line.split(maxsplit=5)[4:]
                    used.add(path)
                    if path.startswith(shared):
                        used.add(f"{SHARED_MEMORY} {inode}")
        with contextlib.suppress(OSError):
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    used.add(os.readlink(link))  # noqa: PTH115 - a path for each would take most of the time
    return used
