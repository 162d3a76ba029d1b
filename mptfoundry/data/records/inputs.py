"""List the inputs to prepare: files, folders and Hugging Face datasets, in a fixed order.

A folder is read recursively, with its files sorted by name. `.jsonl` and `.ndjson` files have one record per
line. `.json` files have one record per line or are an array of records; in a folder, other `.json` files are
read as text. All of these may be compressed (`.gz`, `.zst`). `.parquet` files have one record per row. A
folder saved by `datasets` is a dataset. Any other file is one document, unless its extension shows that it is
not text. Hidden files and `__pycache__` are skipped.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mptfoundry import plugins
from mptfoundry.data.shards.index import refuse_slice
from mptfoundry.errors import DataError

HUB_PREFIX = "hf:"
LINE_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd")
COMPRESSED = "compressed file (only .jsonl, .ndjson and .json are read compressed)"
PEEK_BYTES = 1 << 20
NO_TEXT = re.compile(
    r"\.(7z|a|arrow|avi|bin|bmp|bz2|class|ckpt|db|dll|dylib|egg|exe|flac|gif|gz|h5|ico|iso|jar|jpe?g|lib|lz4|mds"
    r"|mo|mov|mp3|mp4|npy|npz|o|obj|ogg|onnx|otf|pdf|pickle|pkl|png|pt|pth|py[cdo]|rar|safetensors|so|sqlite|tar"
    r"|tgz|tiff?|ttf|wasm|wav|webp|whl|woff2?|xz|zip|zstd?)$"
)


@dataclass(frozen=True)
class Input:
    """One file or dataset.

    Attributes:
        kind: `text`, `lines`, `parquet`, `dataset`, `mds` or `own`, a format of `plugins.record_formats`.
        path: The file, or the user's name for a dataset.
        name: The file's path relative to the input folder.
        size: Bytes on disk, or the size that a dataset reports.
        changed_ns: Modification time of a file, in nanoseconds.
        dataset: Index of a dataset in `Inventory.datasets`.
        identity: Identifies the content of a dataset, or the function that reads a format of the user's own.
    """

    kind: str
    path: str
    name: str
    size: int
    changed_ns: int = 0
    dataset: int = -1
    identity: str = ""

    @property
    def is_compressed(self) -> bool:
        """Whether the file is compressed and so can only be read from the start."""
        return self.path.lower().endswith(COMPRESSED_SUFFIXES)


@dataclass
class Inventory:
    """All inputs to read.

    Attributes:
        inputs: The inputs, in order.
        datasets: Loaded Hugging Face datasets, which inputs refer to by index.
        skipped: Number of files skipped in folders, by reason.
    """

    inputs: list[Input] = field(default_factory=list)
    datasets: list[Any] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        """Bytes of all inputs."""
        return sum(source.size for source in self.inputs)

    @property
    def plain_text(self) -> Counter[str]:
        """Number of files read as one document each, by extension."""
        texts = (PurePosixPath(source.name) for source in self.inputs if source.kind == "text")
        return Counter(name.suffix.lower() for name in texts)

    def digest(self, *, with_times: bool = False) -> str:
        """Hash all names and sizes, and optionally modification times, with sha256."""
        lines = (
            f"{s.kind}\0{s.name}\0{s.size}\0{s.identity}\0{s.changed_ns if with_times else 0}\n"
            for s in self.inputs
        )
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def find_inputs(
    given: Sequence[str],
    *,
    text_key: str | None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    hf_subset: str | None = None,
    hf_split: str = "train",
) -> Inventory:
    """Expand the user's inputs into files and datasets.

    Args:
        given: Files, folders, folders saved by `datasets`, or `hf:NAME` for a dataset on the Hub.
        text_key: The record field with the text. If None, records may have any fields, and plain text files
            are skipped.
        include: Patterns such as `*.py`; in folders, only files whose path or name matches are read.
        exclude: Patterns of files and folders to skip.
        hf_subset: Configuration of a Hub dataset.
        hf_split: Split of a dataset.

    Raises:
        DataError: An input is missing or can't be read, or there is nothing to read.
    """
    if not given:
        raise DataError("No input is given. Give files, folders, or hf:NAME.")
    inventory = Inventory()
    for word in given:
        path = Path(word).expanduser()
        if word.startswith(HUB_PREFIX) or (path / "state.json").is_file() or _is_dataset_dict(path):
            _add_dataset(inventory, word, text_key, hf_subset, hf_split)
        elif path.is_dir():
            _add_folder(inventory, path, text_key, include, exclude)
        elif path.is_file():
            _add_named_file(inventory, path)
        else:
            raise DataError(
                f"{word}: there is no such file or folder. A hub's data set is written hf:{word}."
            )
    if not inventory.inputs:
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(inventory.skipped.items()))
        raise DataError(
            f"{', '.join(given)}: there is no text to read{f' (left out: {left_out})' if left_out else ''}. "
            f"Give files of text, JSONL or Parquet."
        )
    return inventory


def _add_named_file(inventory: Inventory, path: Path) -> None:
    kind = _kind_of(path, lambda: True)
    if kind == "compressed":
        raise DataError(
            f"{path}: only .jsonl, .ndjson and .json files are read compressed. Decompress it first."
        )
    if kind is None:
        raise DataError(f"{path}: a {path.suffix} file holds no text. Give files of text, JSONL or Parquet.")
    inventory.inputs.append(_file_input(kind, path, path.name))


def _add_folder(
    inventory: Inventory, folder: Path, text_key: str | None, include: Sequence[str], exclude: Sequence[str]
) -> None:
    for path in _walk(folder, exclude):
        name = path.relative_to(folder).as_posix()
        if include and not _matches(name, include):
            continue
        kind = _kind_of(path, lambda path=path: _holds_records(path, text_key))  # type: ignore[misc]
        if kind is None or kind == "compressed":
            inventory.skipped[COMPRESSED if kind else "binary file"] += 1
            continue
        if kind == "text" and text_key is None:
            inventory.skipped["file without records"] += 1
            continue
        inventory.inputs.append(_file_input(kind, path, name))


def _walk(folder: Path, exclude: Sequence[str]) -> Iterator[Path]:
    """Yield the files in a folder recursively, sorted by name, without hidden and excluded ones."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: the folder can't be read ({error.strerror}).") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if exclude and _matches(Path(entry.path).as_posix(), [f"*/{pattern}" for pattern in exclude]):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), exclude)
        elif entry.is_file():
            yield Path(entry.path)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    parts = (name, PurePosixPath(name).name)
    return any(fnmatch.fnmatchcase(part, pattern) for pattern in patterns for part in parts)


def _kind_of(path: Path, is_lines: Callable[[], bool]) -> str | None:
    """Return a file's kind by its name; `is_lines` decides for `.json`.

    Returns None for files that are not text, and `compressed` for compressed files that can't be read.
    """
    name = path.name.lower()
    if plugins.record_format(name):
        return "own"
    for suffix in COMPRESSED_SUFFIXES:
        if name.endswith(suffix):
            inner = name.removesuffix(suffix)
            return "lines" if inner.endswith((*LINE_SUFFIXES, ".json")) else "compressed"
    if name.endswith(LINE_SUFFIXES) or (name.endswith(".json") and is_lines()):
        return "lines"
    if name.endswith(".parquet"):
        return "parquet"
    return None if NO_TEXT.search(name) else "text"


@contextmanager
def open_decompressed(path: str | Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file and decompress it by its extension; yields the content and the raw file."""
    name = str(path).lower()
    with Path(path).open("rb") as raw:
        if name.endswith(".gz"):
            with gzip.open(raw, "rb") as file:
                yield file, raw  # type: ignore[misc]
        elif name.endswith(COMPRESSED_SUFFIXES):
            import pyarrow

            with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd") as file:
                yield file, raw
        else:
            yield raw, raw


def is_array(path: Path) -> bool:
    """Whether a `.json` file, which may be compressed, is an array."""
    name = path.name.lower()
    if not name.endswith((".json", *(f".json{suffix}" for suffix in COMPRESSED_SUFFIXES))):
        return False
    try:
        with open_decompressed(path) as (file, _):
            return file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except (OSError, EOFError, ValueError):
        return False  # the reader reports the damage


def _holds_records(path: Path, text_key: str | None) -> bool:
    """Whether a `.json` file in a folder is an array of records, or has a record on its first line."""
    if is_array(path):
        return text_key is None or _array_holds_records(path, text_key)
    with path.open("rb") as file:
        line = file.readline(PEEK_BYTES)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and (text_key is None or isinstance(record.get(text_key), str))


def _array_holds_records(path: Path, text_key: str) -> bool:
    """Whether the first entry of an array is a record with text. True for an empty array."""
    with path.open("rb") as file:
        head = file.read(PEEK_BYTES).decode("utf-8-sig", "replace").lstrip()[1:].lstrip()
    if head.startswith("]"):
        return True
    try:
        try:
            first, _ = json.JSONDecoder().raw_decode(head)
        except ValueError:  # the first entry is longer than what was read
            first = json.loads(path.read_bytes())[0]
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(first.get(text_key), str)


def _file_input(kind: str, path: Path, name: str) -> Input:
    try:
        status = path.stat()
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(f"{path}: the file can't be read ({error.strerror}).") from error
    identity = ""
    if kind == "own":  # the module's name holds the hash of the user's file
        read: Any = plugins.record_format(path.name)
        identity = f"{read.__module__} {read.__qualname__}"
    return Input(kind, str(path), name, status.st_size, status.st_mtime_ns, identity=identity)


def _is_dataset_dict(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file()


def _add_dataset(
    inventory: Inventory, word: str, text_key: str | None, subset: str | None, split: str
) -> None:
    import datasets

    if not word.startswith(HUB_PREFIX):
        refuse_slice(split, f"{word}: hf_split")
    try:
        if word.startswith(HUB_PREFIX):
            dataset = load_from_hub(word.removeprefix(HUB_PREFIX), name=subset, split=split)
        else:
            dataset = datasets.load_from_disk(str(Path(word).expanduser()))
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{word}: the data set can't be loaded: {first_line}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            names = ", ".join(dataset)
            raise DataError(f"{word}: there is no split {split!r}. Set hf_split to one of {names}.")
        dataset = dataset[split]
    if text_key is not None:
        feature = dataset.features.get(text_key)
        if feature is None:
            names = ", ".join(dataset.features)
            raise DataError(f"{word}: there is no column {text_key!r}. Set text_key to one of {names}.")
        if getattr(feature, "dtype", None) not in ("string", "large_string"):
            raise DataError(f"{word}: the column {text_key!r} holds {feature}, not strings. Set text_key.")
        dataset = dataset.select_columns([text_key])
    add_dataset(inventory, word, f"{word}/{subset or ''}/{split}", dataset)


def load_from_hub(name_at_revision: str, /, **options: Any) -> Any:
    """Load a dataset from the Hugging Face Hub without running its code.

    Args:
        name_at_revision: `NAME`, or `NAME@REVISION` with a branch, tag or commit.
        options: Arguments of `datasets.load_dataset`.

    Raises:
        DataError: Loading the dataset would unpickle it.
    """
    import datasets

    path, at, revision = name_at_revision.partition("@")
    if path == "pandas":
        raise DataError("pandas reads pickles, which can run code. Convert the files to Parquet.")
    if at:
        options["revision"] = revision
    return datasets.load_dataset(path, trust_remote_code=False, **options)


def add_dataset(inventory: Inventory, word: str, name: str, dataset: Any) -> None:
    """Add a loaded dataset, which the user named `word`, unless it is empty."""
    if not len(dataset):
        return
    size = int(dataset.data.nbytes)
    identity = f"{len(dataset)} {dataset._fingerprint}"
    inventory.inputs.append(
        Input("dataset", word, name, size, dataset=len(inventory.datasets), identity=identity)
    )
    inventory.datasets.append(dataset)
