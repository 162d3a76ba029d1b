"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from mptfoundry.errors import CheckpointError, ConfigError

# Copies a local file to where it is kept, under a name that may have one folder in it.
Upload = Callable[[Path, str], None]

_UNFINISHED = re.compile(r"\..+\.part|\..+\.staged\..+")


@contextmanager
def whole_or_absent(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a file or a folder so that whoever looks sees all of it or nothing.

    Yields a temporary name beside `path`, at which the caller makes a file or a folder. When the block ends
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
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
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

    Args:
        path: What is going to be written.
        overwrite: Replace a folder that is there.
        names: Patterns of what such a folder holds; one that holds anything else is another's.
        source: What is read for it, which must not lie there.
    """
    read = None if source is None else Path(source).resolve()
    if read is not None and path.resolve() in (read, *read.parents) and path.exists():
        raise CheckpointError(f"{path}: {source}, which is read, lies there. Name another place.")
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
    """Let a link lead to `target`, a file or folder beside it; it leads to the old one or to the new one."""
    temporary = link.with_name(f".{link.name}.{socket.gethostname()}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)


def remove_unfinished(folder: Path, *, but: Path | None = None) -> list[Path]:
    """Remove from a folder what was begun there and never got its name; for who alone writes there.

    What `but` lies in stays.
    """
    kept = () if but is None else (but.absolute(), *but.absolute().parents)
    unfinished = [entry for entry in folder.iterdir() if _UNFINISHED.fullmatch(entry.name)]
    unfinished = [entry for entry in unfinished if entry.absolute() not in kept]
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
    """Remove a file, a link or a folder with all that is in it; what is gone already is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        old = temporary.with_name(temporary.name.removesuffix(".part") + ".old.part")
        path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.replace(path)
    _flush_one(path.parent)


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


def _remove_leftovers(path: Path) -> None:
    host = re.escape(socket.gethostname())
    pattern = re.compile(re.escape(f".{path.name}.") + host + r"\.(\d+)(\.old)?\.part")
    for entry in path.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not is_alive(int(match[1])):
            remove(entry)
