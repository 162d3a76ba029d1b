"""Atomic writes of files and folders, and safe reads from folders that anyone may have made."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.places import is_url

# Copies a local file to its final location, under a name that may include one folder.
Upload = Callable[[Path, str], None]
# Whether a process, given by its machine and its process ID, is known to have ended.
IsLeft = Callable[[str, int], bool]

_UNFINISHED = re.compile(r"\..+\.part|\..+\.staged\..+")
_OLD = ".old"
# The final (or former) name of a file or folder, and its writer: a machine and a process ID on it.
_BEGUN = re.compile(rf"\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)(?P<old>\{_OLD})?\.part")
# From linux/fs.h and fcntl.h.
_EXCHANGE, _HERE = 2, -100
_LARGEST_JSON = 1 << 26  # bytes


@contextmanager
def whole_or_absent(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a file or a folder atomically: readers see all of it or nothing.

    Yields a temporary name next to `path`, where the caller makes a file or a folder. If the block succeeds,
    it is flushed to disk and renamed to `path`; if the block raises, or the process dies, `path` stays as it
    was. Leftovers of earlier, dead processes of this machine are removed first.

    Raises:
        CheckpointError: `path` can't be written to, or something other than an empty folder is there and
            `overwrite` is not set.
    """
    path = Path(path).absolute()
    _refuse_existing(path, overwrite=overwrite)
    temporary = _temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for entry, left in _left_in(path.parent, _is_of_no_other):
            if left["name"] == path.name:
                remove(entry)
        yield temporary
        _flush(temporary)
        _put_in_place(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error.strerror or error}).") from error
    finally:
        with suppress(OSError):
            remove(temporary)


def refuse_what_is_there(
    path: Path, *, overwrite: bool, names: Sequence[str] = ("*",), source: str | Path | None = None
) -> None:
    """Raise CheckpointError if something at `path` must not be replaced.

    If a killed process left a replacement unfinished, the old content is put back first.

    Args:
        path: What is going to be written.
        overwrite: Replace an existing folder.
        names: Patterns of what our folders hold; a folder that holds anything else is someone else's.
        source: What will be read to write it, which must not be inside `path`.
    """
    _put_back(path.absolute(), _is_of_no_other)
    read = None if source is None or is_url(source) else Path(source).resolve()
    if read is not None and path.resolve() in (read, *read.parents) and path.exists():
        raise CheckpointError(f"{path}: {source} is read from there. Name another place.")
    _refuse_existing(path, overwrite=overwrite)
    for name in sorted(entry.name for entry in path.iterdir()) if path.is_dir() else ():
        if not any(fnmatch(name, pattern) for pattern in names):
            raise CheckpointError(
                f"{path}: is there already and holds {name}, which is not of such a folder, so that it is "
                "not overwritten. Name another place."
            )


def _refuse_existing(path: Path, *, overwrite: bool) -> None:
    _put_back(path.absolute(), _is_of_no_other)
    if not overwrite and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise CheckpointError(f"{path}: exists already. Use another path, or set overwrite=true.")


@contextmanager
def writing_into(save_folder: Path) -> Iterator[None]:
    """Turn errors with the files of a run's folder into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"save_folder: {save_folder} can't be written to: {error.strerror}. Use a folder of yours on a "
            "disk with space."
        ) from error


def point(link: Path, target: Path) -> None:
    """Point a link at `target`, a file or folder next to it, in one atomic step."""
    temporary = _temporary_name(link)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)


def remove_unfinished(folder: Path, *, is_ours: bool = True, but: Path | None = None) -> list[Path]:
    """Remove unfinished writes from a folder, except what contains `but`, and give what they were about to
    replace its name back; if others write there, too, only those of this machine's dead processes.
    """
    # We can't ask about a process on another machine, or one whose ID has been reused.
    is_left = (lambda host, pid: True) if is_ours else _is_of_the_dead
    for _, left in _left_in(folder, is_left):
        _put_back(folder / left["name"], is_left)
    kept = () if but is None else (but.absolute(), *but.absolute().parents)
    dead = {entry for entry, _ in _left_in(folder, is_left)}
    unfinished = [
        entry
        for entry in folder.iterdir()
        if (entry in dead or (is_ours and _UNFINISHED.fullmatch(entry.name))) and entry.absolute() not in kept
    ]
    for entry in unfinished:
        remove(entry)
    return unfinished


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is still running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with everything in it; a missing one is not an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        _replace_folder(temporary, path)
    else:
        temporary.replace(path)
    _flush_one(path.parent)


def _replace_folder(temporary: Path, path: Path) -> None:
    if not _exchange(temporary, path):
        old = temporary.with_name(temporary.name.removesuffix(".part") + f"{_OLD}.part")
        path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            old.rename(path)
            raise
        temporary = old
    shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system can't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, bytes(one), _HERE, bytes(other), _EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(other))


def _flush(path: Path) -> None:
    """Flush a file, or a folder with everything in it, to disk."""
    if path.is_dir():
        for entry in path.iterdir():
            _flush(entry)
    _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(path: Path) -> Path:
    """Return the temporary name that this process uses to write `path`."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.part")


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _put_back(path: Path, is_left: IsLeft) -> None:
    """Rename a folder back if a process moved it away and was killed before its replacement was in place."""
    if not path.exists() and path.parent.is_dir():
        for entry, left in _left_in(path.parent, is_left):
            if left["old"] and left["name"] == path.name:
                entry.rename(path)
                return


def _left_in(folder: Path, is_left: IsLeft) -> list[tuple[Path, re.Match[str]]]:
    """List unfinished or moved-away entries in a folder whose processes are known to have ended."""
    matches = [(entry, match) for entry in folder.iterdir() if (match := _BEGUN.fullmatch(entry.name))]
    return [(entry, match) for entry, match in matches if is_left(match["host"], int(match["pid"]))]


def _is_of_the_dead(host: str, pid: int) -> bool:
    """Whether a process belongs to this machine and has ended."""
    return host == _host() and not is_alive(pid)


def _is_of_no_other(host: str, pid: int) -> bool:
    """The same, or it has this process's ID, as processes of successive containers often do."""
    return host == _host() and (pid == os.getpid() or not is_alive(pid))


def confined(folder: Path, name: str, named_by: Path) -> Path:
    """Return the file `name` of `folder`; raise CheckpointError if it is outside that folder.

    Links may point to files of the same folder, and from a snapshot in the hub's cache to its blobs.
    """
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{named_by}: refused, since it names {name!r}, which is not a file of its own folder."
        )
    file = folder / name
    if not file.is_file():
        raise CheckpointError(f"{folder}: {name} is missing, which {named_by.name} names.")
    home = folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if file.resolve().parent not in homes:
        raise CheckpointError(
            f"{file}: refused, since it is a link to {file.resolve()}, outside of its folder. Put the file "
            "itself there."
        )
    return file


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of `folder` that holds a dictionary.

    Raises:
        CheckpointError: It is missing, outside the folder, damaged, or not a dictionary.
    """
    if not (folder / name).exists():
        raise CheckpointError(f"{folder}: {name} is missing.")
    file = confined(folder, name, folder / name)
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{file}: refused, since it is larger than {_LARGEST_JSON:,} bytes.")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file}: can't be read ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: not a dictionary.")
    return values


class Held(Exception):
    """Another process holds a lock; the text says which one."""


@contextmanager
def locked(path: Path, *, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock on a file; see `take_lock`.

    The holder may remove the file or its folder; whoever waited then makes a new file.

    Args:
        path: The file; it records which process holds the lock.
        waiting: Called with the holder before waiting for it. Default: raise at once.

    Raises:
        Held: Another process holds the lock.
        OSError: The file can't be made or locked.
    """
    file = take_lock(path, waiting=waiting)
    try:
        yield
    finally:
        os.close(file)


def take_lock(
    path: Path,
    *,
    lock: Callable[[int, int], None] = fcntl.flock,
    waiting: Callable[[str], None] | None = None,
    unlocked: Callable[[OSError], None] | None = None,
) -> int:
    """Lock a file, which is made with its parents and records the holder, and return it open.

    The lock ends when the file is closed or this process ends, even if killed. It works across machines if
    the file system supports that (NFS 4, Lustre mounted with `flock`).

    Args:
        lock: `fcntl.flock`, which forked children share, or `fcntl.lockf`, which they don't, and which ends
            as soon as this process closes the file anywhere.
        waiting: Called with the holder before waiting for it. Default: raise Held, with the holder.
        unlocked: Called on a file system without locks, where only processes of this machine exclude one
            another. Default: raise the OSError.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # the holder has just removed the folder
        with ExitStack() as unless_locked:
            unless_locked.callback(os.close, file)
            try:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                _wait(file, error, lock, waiting, unlocked)
            if is_open_at(file, path):  # else the holder has removed it since we opened it
                rewrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
                unless_locked.pop_all()
                return file


def _wait(
    file: int,
    error: OSError,
    lock: Callable[[int, int], None],
    waiting: Callable[[str], None] | None,
    unlocked: Callable[[OSError], None] | None,
) -> None:
    """Wait for the holder of a lock if that is allowed, or raise Held."""
    try:
        said = json.loads(os.pread(file, 1 << 12, 0))
        host, pid = str(said["host"]), int(said["pid"])
        holder = f"process {pid} on {host}"
    except (ValueError, KeyError, TypeError):
        host, pid, holder = "", 0, "another process"
    if error.errno in (errno.EACCES, errno.EAGAIN):
        if waiting is None:
            raise Held(holder) from error
        waiting(holder)
        lock(file, fcntl.LOCK_EX)
    elif unlocked is None:
        raise error
    elif host == socket.gethostname() and pid != os.getpid() and is_alive(pid):
        raise Held(holder) from error
    else:
        unlocked(error)


def is_open_at(file: int, path: Path) -> bool:
    """Whether `path` is still the open file, which may have been removed or replaced."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def rewrite(file: int, content: bytes) -> None:
    """Replace the content of an open file."""
    os.ftruncate(file, 0)
    os.pwrite(file, content, 0)
