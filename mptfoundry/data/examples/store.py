"""The example store: tokenized examples on disk, one after the other, read in place.

An *example* is a row of ids and, for each, whether it is learned. A store is a folder:

    ids.bin       all ids, in the narrowest unsigned integer that holds the vocabulary
    marks.bin     a byte for each id: 1 where it is learned
    sizes.npy     (2, examples) int64: tokens of each example, and how many of them can be predicted
    store.json    the ids' type, sizes and hashes of the files, what the maker says, and a hash of all that

What a model predicts is the next token, so an example's first token is never predicted, learned or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from mptfoundry.data.shards.index import narrowest_dtype
from mptfoundry.data.shards.integrity import entry_of, fastest_hash, problem_of, problems_of
from mptfoundry.errors import CheckpointError, DataError
from mptfoundry.files import whole_or_absent

IDS, MARKS, SIZES, STORE = "ids.bin", "marks.bin", "sizes.npy", "store.json"
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
            path.mkdir()
            with (path / IDS).open("wb", 1 << 20) as ids, (path / MARKS).open("wb", 1 << 20) as marks:
                writer = ExampleWriter(ids, marks, vocab_size)
                yield writer
            np.save(path / SIZES, np.array([writer.lengths, writer.learned], np.int64))
            files = [entry_of(path / name) for name in (IDS, MARKS, SIZES)]
            content = {"dtype": writer.dtype.name, "files": files, "meta": dict(writer.meta)}
            (path / STORE).write_text(
                json.dumps({"version": VERSION, "hash": _hash(content), "content": content})
            )
    except CheckpointError as error:
        raise DataError(str(error)) from error


def why_damaged(folder: Path, *, title: str = "") -> str | None:
    """What is wrong with a store, in words that follow its name; None if it holds what was written.

    Args:
        folder: Its place.
        title: Before a progress bar over the bytes that are read; empty for none.
    """
    try:
        entries = _read(folder)["files"]
    except _DAMAGE as error:
        return f"can't be read ({error})"

    def look(entry: Mapping[str, Any]) -> str | None:
        return problem_of(folder / entry["basename"], entry, fastest_hash(entry["hashes"]))

    found = problems_of(entries, look, lambda entry: entry["bytes"], title=title)
    return f"holds {found[0][0]['basename']}, which {found[0][1]}" if found else None


class ExampleWriter:
    """Appends examples to a store; see `write_examples`.

    Attributes:
        meta: What the maker wants to keep beside the examples, as JSON has it.
        lengths: Tokens of each example so far.
        learned: How many of them can be predicted and are learned.
    """

    def __init__(self, ids: BinaryIO, marks: BinaryIO, vocab_size: int) -> None:
        self._ids, self._marks = ids, marks
        self.vocab_size = vocab_size
        self.dtype = np.dtype(narrowest_dtype(vocab_size))
        self.meta: Mapping[str, Any] = {}
        self.lengths: list[int] = []
        self.learned: list[int] = []

    def add(self, ids: np.ndarray, learned: np.ndarray) -> None:
        """Append an example: `ids` (tokens,) integers, `learned` (tokens,) bool, at least one token."""
        if ids.ndim != 1 or ids.shape != learned.shape or not ids.size:
            raise ValueError(
                f"ids and learned have the shapes {ids.shape} and {learned.shape}. Give two rows."
            )
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"an id is outside of 0 to {self.vocab_size - 1}.")
        marks = learned.astype(np.uint8)
        self._ids.write(ids.astype(self.dtype).tobytes())
        self._marks.write(marks.tobytes())
        self.lengths.append(ids.size)
        self.learned.append(int(np.count_nonzero(marks[1:])))

    def add_store(self, store: ExampleStore) -> None:
        """Append all examples of another store of the same vocabulary."""
        if store.ids.dtype != self.dtype:
            raise ValueError(f"{store.folder} has ids of {store.ids.dtype}, and this store of {self.dtype}.")
        self._ids.write(store.ids.tobytes())
        self._marks.write(store.marks.tobytes())
        self.lengths += store.lengths.tolist()
        self.learned += store.learned.tolist()


class ExampleStore:
    """The examples of a folder, read where they lie; `store[i]` is `(ids, learned)`.

    Attributes:
        folder: Where it lies.
        meta: What its maker kept.
        lengths: (examples,) int64, the tokens of each.
        learned: (examples,) int64, how many tokens of each are predicted and learned.
        ids: (tokens,) unsigned, all examples one after the other.
        marks: (tokens,) uint8, 1 where learned.
        fingerprint: Of its examples, by the hashes of their files, which are not read for it.

    Raises:
        DataError: There is no whole store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            content = _read(self.folder)
            self.lengths, self.learned = np.load(self.folder / SIZES)
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
        """An example: ids (tokens,) int64 and learned (tokens,) bool."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: there is no example {index}")
        return self.join(np.array([index]))

    def join(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Some examples end to end: ids (tokens,) int64 and learned (tokens,) bool."""
        parts = list(map(slice, self.bounds[indices].tolist(), self.bounds[indices + 1].tolist()))
        ids = np.concatenate([self.ids[part] for part in parts])
        return ids.astype(np.int64), np.concatenate([self.marks[part] for part in parts]).view(bool)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is spawned opens the files itself: a memory map would be sent as what it maps.
        return ExampleStore, (self.folder,)


def _read(folder: Path) -> dict[str, Any]:
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
