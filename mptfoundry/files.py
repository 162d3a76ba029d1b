"""Files and folders that are there whole or not at all, and files of folders that anyone may have made."""

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
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.places import is_url

# Copies a local file to where it is kept, under a name that may have one folder in it.
Upload = Callable[[Path, str], None]
# Whether a process, given by its machine and its number, is known to be gone.
IsLeft = Callable[[str, int], bool]

_UNFINISHED = re.compile(r"\..+\.part|\..+\.staged\..+")
_OLD = ".old"
# The name that a file or folder is to get, or had, and who is at it: a machine, and a process of that.
_BEGUN = re.compile(rf"\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)(?P<old>\{_OLD})?\.part")
# Of linux/fs.h and fcntl.h.
_EXCHANGE, _HERE = 2, -100


@contextmanager
def whole_or_absent(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a file or a folder so that whoever looks sees all of it or nothing.

    Yields a temporary name next to `path`, at which the caller makes a file or a folder. When the block ends
    well it is flushed to the disk and renamed to `path`; when it ends in an error, or the process dies,
    `path` stays as it was. What earlier, dead processes of this machine left is removed first.

    Args:
        path: The final name; its parents are made.
        overwrite: Replace what is there. Without it only an empty folder is replaced.

    Raises:
        CheckpointError: Something is there already, or the place can't be written to.
    """
    path = Path(path).absolute()
    refuse_what_is_there(path, overwrite=overwrite)
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for entry, left in _left_in(path.parent, _is_of_no_other):
            if left["name"] == path.name:
                remove(entry)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error.strerror}).") from error
    try:
        yield temporary
        _flush(temporary)
        _put_in_place(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error.strerror or error}).") from error
    finally:
        remove(temporary)


def refuse_what_is_there(
    path: Path, *, overwrite: bool, names: Sequence[str] = ("*",), source: str | Path | None = None
) -> None:
    """Raise CheckpointError if something is at `path` that may not be replaced.

    What a process that was killed was replacing there is put back first.

    Args:
        path: What is going to be written.
        overwrite: Replace a folder that is there.
        names: Patterns of what such a folder holds; one that holds anything else is another's.
        source: What is read for it, which must not lie there.
    """
    _put_back(path.absolute(), _is_of_no_other)
    read = None if source is None or is_url(source) else Path(source).resolve()
    if read is not None and path.resolve() in (read, *read.parents) and path.exists():
        raise CheckpointError(f"{path}: {source} is read and lies there. Name another place.")
    there = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if not overwrite and (there or path.is_file()):
        raise CheckpointError(f"{path}: is there already. Name another place, or set overwrite=true.")
    for name in there:
        if not any(fnmatch(name, pattern) for pattern in names):
            raise CheckpointError(
                f"{path}: is there already and holds {name}, which is not of such a folder, so that it is "
                "not overwritten. Name another place."
            )


@contextmanager
def writing_into(save_folder: Path) -> Iterator[None]:
    """Turn what goes wrong with the files of a run's folder into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"save_folder: {save_folder} can't be written to: {error.strerror}. Use a folder of yours on a "
            "disk with space."
        ) from error


def point(link: Path, target: Path) -> None:
    """Let a link lead to `target`, a file or folder next to it; it leads to the old one or to the new one."""
    temporary = _beside(link)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)


def remove_unfinished(folder: Path, *, is_ours: bool = True, but: Path | None = None) -> list[Path]:
    """Remove from a folder what was begun there and never got its name; what was to be replaced gets it back.

    Args:
        folder: Where to look.
        is_ours: Nobody else writes there. Otherwise only what dead processes of this machine left is removed.
        but: What this lies in stays.
    """
    # A process of another machine, or one whose number a new one has, can't be asked.
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
    """Whether a process of this machine still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; a missing one is not an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
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
    else:
        temporary.replace(path)
    _flush_one(path.parent)


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
    """Write a file, or a folder with all that is in it, through to the disk."""
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


def _beside(path: Path) -> Path:
    """The name under which this process writes what `path` is to be."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.part")


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _put_back(path: Path, is_left: IsLeft) -> None:
    """Give a folder its name again where a process moved it away and was killed before the new one got it."""
    if not path.exists() and path.parent.is_dir():
        for entry, left in _left_in(path.parent, is_left):
            if left["old"] and left["name"] == path.name:
                entry.rename(path)
                return


def _left_in(folder: Path, is_left: IsLeft) -> list[tuple[Path, re.Match[str]]]:
    """What processes began in a folder, and what they moved away there, where they are known to be gone."""
    matches = [(entry, match) for entry in folder.iterdir() if (match := _BEGUN.fullmatch(entry.name))]
    return [(entry, match) for entry, match in matches if is_left(match["host"], int(match["pid"]))]


def _is_of_the_dead(host: str, pid: int) -> bool:
    """Whether a process is one of this machine that has ended."""
    return host == _host() and not is_alive(pid)


def _is_of_no_other(host: str, pid: int) -> bool:
    """The same, or it has this process's number, as the processes of one container after another do."""
    return host == _host() and (pid == os.getpid() or not is_alive(pid))


_LARGEST_JSON = 1 << 26


def confined(folder: Path, name: str, named_by: Path) -> Path:
    """The file `name` of `folder`; raises CheckpointError unless it lies in that very folder.

    Links may lead to files of the same folder, and from a snapshot in the hub's cache to its blobs.
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
    """The content of a JSON file of `folder` that holds a dictionary.

    Raises:
        CheckpointError: It is missing, lies elsewhere, is damaged, or no dictionary.
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
    """Hold the lock of a file, which is made with its parents; it ends with this process, however that ends.

    Whoever holds the lock may remove the file, or its folder: who waited for it makes a new file. The lock
    reaches other machines where the file system does that (NFS 4, Lustre mounted with `flock`).

    Args:
        path: The file; it says which process holds it.
        waiting: Is told who holds the lock, which is then waited for. Default: raise at once.

    Raises:
        Held: Another process holds the lock.
        OSError: The file can't be made or locked.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # its holder has just removed the folder
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if waiting is None:
                    raise Held(_holder_of(file)) from error
                waiting(_holder_of(file))
                fcntl.flock(file, fcntl.LOCK_EX)
            # A lock on a file that its holder has removed keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
                yield
                return
        finally:
            os.close(file)


def _holder_of(file: int) -> str:
    """Who holds a lock, in words."""
    try:
        said = json.loads(os.pread(file, 1 << 12, 0))
        return f"process {int(said['pid'])} on {said['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
