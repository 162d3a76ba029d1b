"""The example store: tokenized examples on disk, one after the other, read in place.

An *example* is a row of ids and, for each, whether it is in the loss. A store is a folder:

    ids.bin       all ids, in the narrowest unsigned integer that holds the vocabulary
    marks.bin     a byte for each id: 1 where it is in the loss
    sizes.npy     (2, examples) int64: tokens of each example, and how many of them can be predicted
    store.json    the ids' type, sizes and hashes of the files, what the maker says, and a hash of all that

What a model predicts is the next token, so an example's first token is never predicted, in the loss or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mptfoundry.data.appended import AppendedFiles
from mptfoundry.data.shards.index import narrowest_dtype
from mptfoundry.data.shards.integrity import entry_of, fastest_hash, problem_of, problems_of
from mptfoundry.errors import CheckpointError, DataError
from mptfoundry.files import whole_or_absent

IDS, MARKS, SIZES, STORE = "ids.bin", "marks.bin", "sizes.npy", "store.json"
# The columns of SIZES, an example after the other, while a store is written.
ROWS = "rows.bin"
VERSION = 2
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError)


@contextmanager
def write_examples(folder: str | Path, *, vocab_size: int) -> Iterator[ExampleWriter]:
    """Write a store, which appears in `folder` whole when the block ends well, and else not at all.

    A store that is there already is replaced.

    Args:
        folder: Its place; parents are made.
        vocab_size: All ids are below it.

    Yields:
        The writer. What its `meta` holds at the end of the block is kept.

    Raises:
        DataError: The place can't be written to.
    """
    try:
        with whole_or_absent(folder, overwrite=True) as path:
            writer = ExampleWriter(path, vocab_size)
            yield writer
            writer.finish()
    except CheckpointError as error:
        raise DataError(str(error)) from error


def why_damaged(folder: Path, *, title: str = "") -> str | None:
    """What is wrong with a store, in words that follow its name; None if it holds what was written.

    Args:
        folder: Its place.
        title: Before a progress bar over the bytes that are read; empty for none.
    """
    try:
        entries = read_content(folder)["files"]
    except _DAMAGE as error:
        return f"can't be read ({error})"

    def look(entry: Mapping[str, Any]) -> str | None:
        return problem_of(folder / entry["basename"], entry, fastest_hash(entry["hashes"]))

    found = problems_of(entries, look, lambda entry: entry["bytes"], title=title)
    return f"holds {found[0][0]['basename']}, which {found[0][1]}" if found else None


class ExampleWriter:
    """Appends examples to a store; see `write_examples`.

    Args:
        folder: Where the store's files are written; it is made.
        vocab_size: All ids are below it.

    Attributes:
        meta: What the maker wants to keep next to the examples, as JSON has it.
        dtype: Type of the ids on disk.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.dtype = np.dtype(narrowest_dtype(vocab_size))
        self.meta: Mapping[str, Any] = {}
        self.files = AppendedFiles(folder, (IDS, MARKS, ROWS))

    def add(self, ids: np.ndarray, trained: np.ndarray) -> None:
        """Append an example: `ids` (tokens,) integers, `trained` (tokens,) bool, at least one token."""
        if ids.ndim != 1 or ids.shape != trained.shape or not ids.size:
            raise ValueError(
                f"ids and loss mask have the shapes {ids.shape} and {trained.shape}. Give two rows."
            )
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"an id is outside of 0 to {self.vocab_size - 1}.")
        self.add_many(ids.astype(self.dtype).tobytes(), trained.astype(np.uint8).tobytes(), [ids.size])

    def add_many(self, ids: bytes, marks: bytes, lengths: Sequence[int]) -> None:
        """Append examples end to end: ids of `dtype`, a byte for each, 1 if in the loss, and lengths."""
        if not len(lengths):
            return
        starts = np.cumsum([0, *lengths[:-1]])
        predicted = np.frombuffer(marks, np.uint8).copy()
        predicted[starts] = 0
        self.files.append(IDS, ids)
        self.files.append(MARKS, marks)
        rows = np.stack(
            [np.asarray(lengths, np.int64), np.add.reduceat(predicted, starts, dtype=np.int64)], 1
        )
        self.files.append(ROWS, rows.tobytes())

    def finish(self) -> None:
        """Complete the store."""
        self.files.close()
        rows = self.folder / ROWS
        np.save(self.folder / SIZES, np.fromfile(rows, np.int64).reshape(-1, 2).T)
        rows.unlink()
        seal(self.folder, (IDS, MARKS, SIZES), dtype=self.dtype.name, meta=dict(self.meta))


class ExampleStore:
    """The examples of a folder, read where they lie; `store[i]` is `(ids, trained)`.

    Attributes:
        folder: Where it lies.
        meta: What its maker kept.
        lengths: (examples,) int64, the tokens of each.
        trained: (examples,) int64, how many tokens of each are predicted and in the loss.
        ids: (tokens,) unsigned, all examples one after the other.
        marks: (tokens,) uint8, 1 where in the loss.
        fingerprint: Of its examples, by the hashes of their files, which are not read for it.

    Raises:
        DataError: There is no whole store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            content = read_content(self.folder)
            self.lengths, self.trained = np.load(self.folder / SIZES)
            self.bounds = np.concatenate([[0], np.cumsum(self.lengths)])
            self.ids = _map(self.folder / IDS, content["dtype"], int(self.bounds[-1]))
            self.marks = _map(self.folder / MARKS, "uint8", int(self.bounds[-1]))
        except _DAMAGE as error:
            raise DataError(
                f"{self.folder}: holds no whole examples ({error}). Prepare them again."
            ) from error
        self.meta: dict[str, Any] = content["meta"]
        self.fingerprint = hashlib.sha256(json.dumps(content["files"], sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An example: ids (tokens,) int64 and trained (tokens,) bool."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: there is no example {index}")
        return self.join(np.array([index]))

    def join(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Some examples end to end: ids (tokens,) int64 and trained (tokens,) bool."""
        parts = list(map(slice, self.bounds[indices].tolist(), self.bounds[indices + 1].tolist()))
        ids = np.concatenate([self.ids[part] for part in parts])
        return ids.astype(np.int64), np.concatenate([self.marks[part] for part in parts]).view(bool)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is spawned opens the files itself: a memory map would be sent as what it maps.
        return ExampleStore, (self.folder,)


def seal(folder: Path, names: Sequence[str], **content: Any) -> None:
    """Complete a store: write what it says of itself, with the sizes and hashes of its files."""
    content["files"] = [entry_of(folder / name) for name in names]
    text = json.dumps({"version": VERSION, "hash": _hash(content), "content": content})
    (folder / STORE).write_text(text)


def read_content(folder: Path) -> dict[str, Any]:
    """What a store says of itself. Raises one of `_DAMAGE` if that is not what was written."""
    found = json.loads((folder / STORE).read_text())
    if found["version"] != VERSION:
        raise ValueError(f"its version is {found['version']}, not {VERSION}")
    content: dict[str, Any] = found["content"]
    if found["hash"] != _hash(content):
        raise ValueError(f"{STORE} is damaged: its hash is not that of its content")
    return content


def _hash(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _map(path: Path, dtype: str, tokens: int) -> np.ndarray:
    wanted, there = tokens * np.dtype(dtype).itemsize, path.stat().st_size
    if there != wanted:
        raise ValueError(f"{path.name} has {there} bytes, not {wanted}")
    # An empty file can't be mapped. A plain array, since slices of a np.memmap take several times as long.
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(tokens,)) if tokens else np.empty(0, dtype))
