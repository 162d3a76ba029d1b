"""The index of MDS shards: the metadata that `prepare` adds, and the checks before a run reads shards.

An MDS folder has `index.json` and shards. `prepare` adds a key `mptfoundry` to the index with the tokenizer
and sequence length of the shards. Other readers ignore it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from mptfoundry.data.shards.index_keys import META_KINDS, check_index_keys, check_keys, shortened
from mptfoundry.data.shards.integrity import CODECS, fastest_hash, problem_of, problems_of, refuse, unpack
from mptfoundry.errors import DataError, MissingError, first_line

INDEX = "index.json"
PREPARING = ".preparing"
META_KEY = "mptfoundry"
# Offsets in a shard are 32-bit integers.
LARGEST_SHARD = 2**32 - 1
# Maximum bytes in a file name on common file systems.
LONGEST_NAME = 255
AGAIN = "Prepare or fetch the folder again."
INTEGER_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


@dataclass(frozen=True)
class ShardMeta:
    """The metadata that `prepare` writes for a finished folder.

    Attributes:
        tokenizer: Name or folder of the tokenizer, as the user gave it.
        fingerprint: Fingerprint of the tokenizer (`mptfoundry.tokenizer.fingerprint`).
        vocab_size: Number of ids of the tokenizer.
        max_seq_len: Tokens in each sample.
        eos_token_id: The id after each document, if one was added.
        documents: Number of documents, also those in the dropped tokens.
        samples: Number of samples of `max_seq_len` tokens.
        tokens: Tokens in the samples, including EOS and BOS.
        bytes: UTF-8 bytes of these documents.
        dropped_tokens: Tokens after the last full sample.
        options: Options of `prepare` that affect the bytes of the shards.
        inputs: Number of files or datasets, bytes, and a digest of names and sizes.
    """

    tokenizer: str
    fingerprint: str
    vocab_size: int
    max_seq_len: int
    eos_token_id: int | None
    documents: int
    samples: int
    tokens: int
    bytes: int
    dropped_tokens: int
    options: Mapping[str, Any]
    inputs: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values for `index.json`."""
        return asdict(self)


@dataclass(frozen=True)
class ShardIndex:
    """A folder's `index.json`, checked.

    Attributes:
        folder: The folder of the index.
        shards: The index entries of the shards, as streaming writes them.
        meta: The metadata from `prepare`, or None if another tool wrote the shards.
    """

    folder: Path
    shards: Sequence[Mapping[str, Any]]
    meta: ShardMeta | None

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(int(shard["samples"]) for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of the shards' content, independent of file names and compression.

        Files without hashes in the index contribute only their size.
        """
        shards = []
        for shard in self.shards:
            raw, packed = shard["raw_data"], shard["zip_data"]
            hashes = raw["hashes"] or (packed["hashes"] if packed else {})
            shards.append([shard["samples"], raw["bytes"], hashes])
        return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()


def narrowest_dtype(vocab_size: int) -> str:
    """Return the smallest unsigned integer type for the ids 0 to `vocab_size` - 1."""
    return next(f"uint{bits}" for bits in (8, 16, 32) if vocab_size <= 2**bits)


def read_index(folder: str | Path, where: str) -> ShardIndex:
    """Read and check `folder/index.json`; `where` is the stream's key in the config, for errors.

    Raises:
        DataError: The index is missing, half prepared, damaged or empty, names files outside its folder, or
            has more samples than fit in its files.
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        raise DataError(f"{where}: {_why_no_index(folder)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_index_keys(content)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: {path} is damaged: {first_line(error)}. {AGAIN}") from error
    shards = content["shards"]
    for problem in filter(None, map(_problem_of_entry, shards)):
        raise DataError(f"{where}: {path} {problem}")
    samples = sum(shard["samples"] for shard in shards)
    if samples == 0:
        raise DataError(f"{where}: {folder} holds no samples. Prepare more text than max_seq_len tokens.")
    meta = _read_meta(content.get(META_KEY), path, where)
    if meta is not None and meta.samples != samples:
        said = f"its shards hold {samples:,} samples, and {META_KEY} says {meta.samples:,}"
        raise DataError(f"{where}: {path} is damaged: {said}. {AGAIN}")
    return ShardIndex(folder, shards, meta)


def find_split(folder: str | Path, split: str | None, where: str) -> Path:
    """Return the folder of one split of a local dataset.

    Raises:
        DataError: The folder or the split is missing; the error lists the existing splits.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise MissingError(f"{where}: the folder {folder} is missing. Prepare it with `mptfoundry prepare`.")
    chosen = folder / split if split else folder
    if not chosen.is_dir():
        _refuse_split(folder, split, where)
    return chosen


def _refuse_split(folder: Path, split: str | None, where: str) -> NoReturn:
    refuse_slice(split, f"{where}: split")
    splits = sorted(entry.name for entry in folder.iterdir() if (entry / INDEX).is_file())
    have = f"It has {', '.join(splits)}." if splits else "It has no splits."
    raise DataError(f"{where}: {folder} has no split {split!r}. {have}")


def refuse_slice(split: str | None, where: str) -> None:
    """Raise DataError if the split of a local dataset is a slice, such as `train[:50%]`."""
    if split and "[" in split:
        raise DataError(
            f"{where}: {split}: only data sets on the hub can be read in slices. "
            f"Use {split.partition('[')[0]}, and put the samples to read into their own file."
        )


def check_shard_files(index: ShardIndex, where: str, *, by_hash: bool = True, title: str = "") -> None:
    """Check all files of a folder against its index, by size and, if available, by hash.

    Args:
        index: The index of a local folder.
        where: The stream's key in the config, for errors.
        by_hash: Whether to check hashes. If False, only sizes are checked.
        title: Title of a progress bar; empty for no bar.

    Raises:
        DataError: Files are missing or damaged; the error lists the first ones.
    """
    folder = index.folder

    def stored(shard: Mapping[str, Any]) -> Mapping[str, Any]:
        raw, packed = shard["raw_data"], shard["zip_data"]
        return packed if packed and not (folder / raw["basename"]).is_file() else raw

    def look(entry: Mapping[str, Any]) -> str | None:
        algorithm = fastest_hash(entry["hashes"]) if by_hash else None
        return problem_of(folder / entry["basename"], entry, algorithm)

    problems = problems_of(map(stored, index.shards), look, lambda entry: entry["bytes"], title=title)
    refuse(where, [f"{folder / entry['basename']} {problem}" for entry, problem in problems])


def _problem_of_entry(shard: Mapping[str, Any]) -> str | None:
    """Why a shard must not be read, as words that follow the index's name; None if it may be."""
    samples, raw, packed = shard["samples"], shard["raw_data"], shard["zip_data"]
    if shard["format"] != "mds":
        return f"is of {shortened(shard['format'])} shards. Only mds shards are read."
    for part in filter(None, (raw, packed)):
        if problem := _problem_of_name(part["basename"]):
            return f"names the shard {shortened(part['basename'])}, which {problem}"
    if packed and str(shard["compression"]).split(":")[0] not in CODECS:
        return f"names the compression {shortened(shard['compression'])}. Known are {', '.join(CODECS)}."
    # A shard starts with the number of samples, the offset of each sample, and the offset of the end.
    if not 4 * samples + 8 <= raw["bytes"] <= LARGEST_SHARD:
        size = f"{samples} samples in {raw['bytes']} bytes"
        return f"says that {raw['basename']} holds {size}, which is impossible. {AGAIN}"
    for name, encoding in zip(shard["column_names"], shard["column_encodings"], strict=True):
        if encoding.partition(":")[0] == "pkl":
            text = f"the column {shortened(name)} is pickled, and reading it could run code"
            return f"is refused, since {text}. Write it in another encoding."
    return None


def _problem_of_name(name: str) -> str | None:
    parts = name.split("/")
    if {"", ".", "..", INDEX} & set(parts) or "\\" in name or "\0" in name:
        return "is not a valid path for a shard inside the folder. Don't use the folder."
    if max(map(len, map(os.fsencode, parts))) > LONGEST_NAME:
        return f"is longer than a file's name can be. {AGAIN}"
    return None


def _read_meta(content: Any, path: Path, where: str) -> ShardMeta | None:
    if content is None:
        return None
    try:
        check_keys(content, META_KINDS, META_KEY, others="kept")
    except ValueError as error:
        raise DataError(f"{where}: {path} is damaged: {error}. Prepare the text again.") from error
    return ShardMeta(
        **{field.name: content[field.name] for field in fields(ShardMeta) if field.name in content}
    )


def _why_no_index(folder: Path) -> str:
    if not folder.is_dir():
        return f"the folder {folder} is missing. Prepare it with `mptfoundry prepare`."
    if (folder / PREPARING).is_dir():
        return f"{folder} is half prepared. Run the same `mptfoundry prepare` again, and it continues."
    splits = sorted(entry.name for entry in folder.iterdir() if (entry / INDEX).is_file())
    if splits:
        return f"{folder} holds splits, not shards. Set split to one of {', '.join(splits)}."
    return f"{folder} has no {INDEX}. Prepare it with `mptfoundry prepare`."


def read_samples(index: ShardIndex, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Read samples directly from the files, for previews and records; training streams them instead.

    Args:
        index: The index of a local folder.
        numbers: Sample numbers, ascending.

    Raises:
        DataError: A shard is missing or damaged.
    """
    import numpy as np
    from streaming.base.format import reader_from_json

    starts = np.cumsum([0, *(int(shard["samples"]) for shard in index.shards)])
    opened = -1
    reader: Any = None
    with tempfile.TemporaryDirectory() as unpacked:
        for number in numbers:
            position = int(np.searchsorted(starts, number, side="right")) - 1
            entry = dict(index.shards[position])
            name = entry["raw_data"]["basename"]
            try:
                if position != opened:
                    folder = index.folder
                    if not (folder / name).is_file() and entry["zip_data"]:
                        packed = (folder / entry["zip_data"]["basename"]).read_bytes()
                        folder = Path(unpacked)
                        (folder / name).parent.mkdir(parents=True, exist_ok=True)
                        raw = unpack(entry["compression"], packed, entry["raw_data"]["bytes"])
                        (folder / name).write_bytes(raw)
                    opened, reader = position, reader_from_json(str(folder), "", entry)
                yield reader[number - int(starts[position])]
            except Exception as error:  # a damaged sample can raise anything
                raise DataError(
                    f"{index.folder / name}: the shard can't be read ({first_line(error)}). Prepare or fetch "
                    "the folder again."
                ) from error
