"""The example store: tokenized examples on disk, memory-mapped for reading.

An *example* is a sequence of ids with a loss mask. A store is a folder:

    ids.bin       all ids, in the narrowest unsigned integer type that fits the vocabulary
    marks.bin     the loss mask: one byte per id, 1 if it is in the loss
    sizes.npy     (2, examples) int64: tokens in each example, and how many are in the loss and predicted
    store.json    type of the ids, sizes and hashes of the files, the writer's metadata, and a hash of it all

A model predicts the next token, so the first token of an example is never predicted, whatever its mask.
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
# While a store is written, the columns of SIZES are appended here, one per example.
ROWS = "rows.bin"
VERSION = 2
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError)


@contextmanager
def write_examples(folder: str | Path, *, vocab_size: int) -> Iterator[ExampleWriter]:
    """Write a store atomically: it appears in `folder` only if the block succeeds.

    An existing store is replaced.

    Args:
        folder: The store's folder; parents are created.
        vocab_size: All ids must be smaller.

    Yields:
        The writer. Its `meta` is saved at the end of the block.

    Raises:
        DataError: The folder can't be written.
    """
    try:
        with whole_or_absent(folder, overwrite=True) as path:
            writer = ExampleWriter(path, vocab_size)
            yield writer
            writer.finish()
    except CheckpointError as error:
        raise DataError(str(error)) from error


def why_damaged(folder: Path, *, title: str = "") -> str | None:
    """Describe what is wrong with a store, as a predicate for an error; None if it is intact.

    Args:
        folder: The store's folder.
        title: Title of a progress bar; empty for no bar.
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
        folder: Where to write the store's files; created if missing.
        vocab_size: All ids must be smaller.

    Attributes:
        meta: Metadata to save with the examples; must be JSON-serializable.
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
        """Append concatenated examples: ids of `dtype`, a loss mask byte for each id, and the lengths."""
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
        """Finish the store."""
        self.files.close()
        rows = self.folder / ROWS
        np.save(self.folder / SIZES, np.fromfile(rows, np.int64).reshape(-1, 2).T)
        rows.unlink()
        seal(self.folder, (IDS, MARKS, SIZES), dtype=self.dtype.name, meta=dict(self.meta))


class ExampleStore:
    """The memory-mapped examples of a store; `store[i]` is `(ids, trained)`.

    Attributes:
        folder: The store's folder.
        meta: The writer's metadata.
        lengths: (examples,) int64, tokens in each example.
        trained: (examples,) int64, how many tokens of each example are predicted and in the loss.
        ids: (tokens,) unsigned, all examples concatenated.
        marks: (tokens,) uint8, the loss mask: 1 if in the loss.
        fingerprint: Hash of the examples, computed from the stored hashes without reading the files.

    Raises:
        DataError: The store is missing or damaged.
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
        """Return an example: ids (tokens,) int64 and trained (tokens,) bool."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: there is no example {index}")
        return self.join(np.array([index]))

    def join(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Concatenate examples: ids (tokens,) int64 and trained (tokens,) bool."""
        parts = list(map(slice, self.bounds[indices].tolist(), self.bounds[indices + 1].tolist()))
        ids = np.concatenate([self.ids[part] for part in parts])
        return ids.astype(np.int64), np.concatenate([self.marks[part] for part in parts]).view(bool)

    def __reduce__(self) -> tuple[Any, ...]:
        # Spawned workers reopen the files, because pickling a memory map would copy its content.
        return ExampleStore, (self.folder,)


def seal(folder: Path, names: Sequence[str], **content: Any) -> None:
    """Finish a store: write `store.json` with `content` and the sizes and hashes of the files."""
    content["files"] = [entry_of(folder / name) for name in names]
    text = json.dumps({"version": VERSION, "hash": _hash(content), "content": content})
    (folder / STORE).write_text(text)


def read_content(folder: Path) -> dict[str, Any]:
    """Read `store.json`. Raises one of `_DAMAGE` if it is damaged."""
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
    # An empty file can't be mapped. Use a plain array because slicing an np.memmap is several times slower.
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(tokens,)) if tokens else np.empty(0, dtype))
