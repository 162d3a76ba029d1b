"""A model from an object store, kept on the local disk during an export.

We read with Composer's object stores (`s3://`, `gs://`, `oci://`, ...), with credentials as for Composer.
From a run we download only its newest whole checkpoint, and the small files that describe it.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from mptfoundry.checkpoints.sharded import METADATA
from mptfoundry.errors import CheckpointError
from mptfoundry.places import is_url, path_in_store, progress_of
from mptfoundry.stores import AT_START, patiently, reason_of

# The files of a run, apart from its checkpoints, that an export reads.
_SMALL = ("config.yaml", "tokenizer", "metrics.jsonl", "report.png", "trackers.json", "best.json")
_SECONDS_BETWEEN_LOOKS = 0.5

List = Callable[[str], list[str]]


@contextmanager
def staged(model: str | Path, out: Path, run_folder: str | None, *, progress: bool) -> Iterator[Path]:
    """Yield a local path for a model; downloads are next to `out` and are removed at the end.

    Args:
        model: A local path, which is returned as it is, or the URL of a run folder, a checkpoint or a Hugging
            Face folder.
        out: The output path; downloads go to the same disk.
        run_folder: A local folder with what a remote checkpoint lacks: config, tokenizer, metrics.
        progress: Show a progress bar in bytes.

    Raises:
        CheckpointError: The store can't be read, has no model there, or the disk is too small.
    """
    if not is_url(model):
        if run_folder is not None:
            raise CheckpointError(
                "run_folder: it is for remote checkpoints; a local one belongs to the run whose folder it "
                "lies in. Remove it."
            )
        yield Path(model)
        return
    if run_folder is not None and not Path(run_folder).is_dir():
        raise CheckpointError(f"run_folder: {run_folder}: there is no such folder. Name the run's.")
    url = str(model).rstrip("/")

    def look() -> tuple[Any, RemoteModel, dict[str, int]]:
        store, root = _open_store(url)
        found = find_objects(root, lambda prefix: list(store.list_objects(prefix)))
        return store, found, {name: store.get_object_size(name) for name in found.names}

    with _readable(url):
        store, found, sizes = patiently(look, what=f"{url}: can't be read", patience=AT_START)
    check_space(out, sum(sizes.values()), f"{url} is staged next to it and takes")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.staged.") as temporary:
        folder = Path(temporary)
        with _readable(url), _bar_over(folder, sum(sizes.values()), progress):
            for name, size in sizes.items():
                _fetch(store, name, folder / found.place_of(name), size)
        if run_folder is not None:
            _add_missing(Path(run_folder), folder)
        yield folder / found.model


def check_space(out: Path, needed: int, what: str) -> None:
    """Raise CheckpointError if `needed` bytes won't fit on the disk of `out`."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{out}: {what} {needed:,} bytes, {free:,} are free on that disk. Free some, or name another."
        )


@dataclass(frozen=True)
class RemoteModel:
    """The objects of a model in a store.

    Attributes:
        base: The folder that contains all of them, a path in the bucket.
        model: The checkpoint's name in it; `.` for a Hugging Face folder.
        names: All objects to download.
    """

    base: PurePosixPath
    model: str
    names: list[str]

    def place_of(self, name: str) -> Path:
        """Return the local path of an object, relative to the folder that stands for `base`."""
        parts = PurePosixPath(name).relative_to(self.base).parts
        if ".." in parts:
            raise CheckpointError(f"{name}: refused, since its name leads out of its folder.")
        return Path(*parts)


def find_objects(root: str, list_objects: List) -> RemoteModel:
    """Find the objects at or below `root` to download.

    Args:
        root: Path in the bucket of a run folder, a checkpoint or a Hugging Face folder.
        list_objects: Returns the names of all objects that begin with a prefix.

    Raises:
        CheckpointError: There is no model.
    """
    below = _below(root, list_objects)
    path = PurePosixPath(root)
    if root in below or f"{root}/{METADATA}" in below:
        return RemoteModel(path.parent, path.name, [*below, *_small_files(path.parent, list_objects)])
    if f"{root}/config.json" in below:
        return RemoteModel(path, ".", [name for name in below if PurePosixPath(name).parent == path])
    whole = _whole_ones(root, below)
    if not whole:
        raise CheckpointError(
            f"{root}: no model there, or no right to see it. Looked for whole checkpoints by Composer's "
            "names (ep0-ba10-rank0.pt, or a folder ep0-ba10) and for config.json."
        )
    newest = next(iter(whole))
    return RemoteModel(path, newest, whole[newest] + _small_files(path, list_objects))


def remote_checkpoints(url: str) -> list[str]:
    """List the names of the whole checkpoints in the run folder at a URL, newest first.

    Raises:
        CheckpointError: The store can't be read.
    """

    def look() -> list[str]:
        store, root = _open_store(url.rstrip("/"))
        return list(_whole_ones(root, _below(root, lambda prefix: list(store.list_objects(prefix)))))

    with _readable(url):
        return patiently(look, what=f"{url}: can't be read", patience=AT_START)


def _whole_ones(root: str, below: list[str]) -> dict[str, list[str]]:
    """Find the checkpoints among the objects below `root`, with the objects of each, newest first."""
    entries: dict[str, list[str]] = {}
    for name in below:
        entries.setdefault(PurePosixPath(name).relative_to(root).parts[0], []).append(name)
    whole = [
        (progress[1], entry)
        for entry, names in entries.items()
        if (progress := progress_of(Path(entry)))
        and (names == [f"{root}/{entry}"] or f"{root}/{entry}/{METADATA}" in names)
    ]
    return {entry: entries[entry] for _, entry in sorted(whole, reverse=True)}


def _small_files(folder: PurePosixPath, list_objects: List) -> list[str]:
    return [name for small in _SMALL for name in _below(str(folder / small), list_objects)]


def _below(root: str, list_objects: List) -> list[str]:
    """List the object `root`, and those in it as a folder, but not those that only share the prefix."""
    return [name for name in list_objects(root) if name == root or name.startswith(root.rstrip("/") + "/")]


def _open_store(url: str) -> tuple[Any, str]:
    """Open Composer's object store for a URL, and return it with the path in its bucket."""
    from composer.utils import maybe_create_object_store_from_uri

    return maybe_create_object_store_from_uri(url), path_in_store(url)


@contextmanager
def _readable(url: str) -> Iterator[None]:
    """Turn any error of a store into one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # each store raises its own kind
        raise CheckpointError(f"{url}: can't be read ({reason_of(error)}).") from error


def _fetch(store: Any, name: str, file: Path, size: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    patiently(
        lambda: store.download_object(name, str(file), overwrite=True),
        what=f"{store.get_uri(name)}: can't be fetched",
        sign=lambda: _bytes_in(file.parent),
    )
    if (found := file.stat().st_size) != size:
        raise CheckpointError(f"{store.get_uri(name)}: came with {found:,} of {size:,} bytes.")


@contextmanager
def _bar_over(folder: Path, total: int, progress: bool) -> Iterator[None]:
    """Show the bytes in a folder as they arrive, because stores report progress in different ways."""
    is_done = threading.Event()
    with tqdm(total=total, unit="B", unit_scale=True, desc="fetched", disable=not progress) as bar:

        def look() -> None:
            while not is_done.wait(_SECONDS_BETWEEN_LOOKS):
                bar.update(_bytes_in(folder) - bar.n)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
            bar.update(total - bar.n)
        finally:
            is_done.set()
            watcher.join()


def _bytes_in(folder: Path) -> int:
    """Return bytes used on disk: stores create a file at its final length, and then fill it."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_blocks * 512 if file.is_file() else 0
        except OSError:  # renamed in the meantime
            continue
    return total


def _add_missing(run_folder: Path, folder: Path) -> None:
    for name in _SMALL:
        there = run_folder / name
        if there.is_dir() and not (folder / name).exists():
            shutil.copytree(there, folder / name)
        elif there.is_file() and not (folder / name).exists():
            shutil.copyfile(there, folder / name)
