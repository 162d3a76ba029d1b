"""Where the records of finetuning lie: files, folders and data sets, by the keys that a config has for them.

`hf_name` is a file or folder of JSONL, Parquet or MDS shards, a folder that `datasets` saved, a data set of
the hub, or, as llm-foundry's files have it, `json` or `parquet` with `hf_kwargs.data_files` or `data_dir`;
`local` is the same without the hub; `remote` is a URL of MDS shards.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

from mptfoundry.data.records.inputs import Input, Inventory, add_dataset, find_inputs, load_from_hub
from mptfoundry.data.shards.index import INDEX, check_shard_files, read_index, refuse_slice
from mptfoundry.data.shards.integrity import fastest_hash, problem_of
from mptfoundry.errors import DataError, MissingError
from mptfoundry.places import is_url
from mptfoundry.stores import FOR_DATA, patiently, reason_of, size_of

BUILDERS = ("json", "parquet")
MANY_SHARDS = 8
SPLIT_NAMES = ("train", "val", "valid", "validation", "test", "eval", "dev")


@dataclass(frozen=True)
class Source:
    """One stream of records, in the keys of a config.

    Attributes:
        where: What the user calls it, for errors: `train_loader.dataset.streams.chat`.
        preprocessing: What makes records of ours from the user's; see ExamplePlan.
        token_encoding_type: Integer type of ids that records hold as bytes.
        as_text: Text that spells a special token stays text.
    """

    where: str
    hf_name: str | None = None
    hf_kwargs: Mapping[str, Any] = field(default_factory=dict)
    remote: str | None = None
    local: str | None = None
    split: str | None = None
    preprocessing: str | Mapping[str, str] | None = None
    token_encoding_type: str = "int64"
    as_text: bool = False


def find_records(source: Source, cache: Path) -> Inventory:
    """All that is to be read of a source.

    Args:
        source: What the user says.
        cache: Folder for what is downloaded.

    Raises:
        DataError: It is missing, can't be read or fetched, or holds no records.
    """
    if source.remote and is_url(source.remote):
        refuse_slice(source.split, f"{source.where}.split")
        return _shards(_fetch_shards(source, cache), source)
    folder = _local_folder(source)
    return _hub(source) if folder is None else _local(folder, source.hf_kwargs.get("data_files"), source)


def look_at_records(source: Source) -> tuple[list[str], int | None] | None:
    """The files of a source and, for shards, their samples, without reading a record; None: not here.

    Raises:
        MissingError: It should lie on this machine and does not.
        DataError: What lies here can't be what is read.
    """
    if source.remote and is_url(source.remote):
        return None
    folder = _local_folder(source)
    if folder is None:
        return None
    split = source.split or ""
    for shards in (folder / split, folder):
        if source.hf_kwargs.get("data_files") is None and (shards / INDEX).is_file():
            return [str(shards)], read_index(shards, source.where).samples
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return [str(folder)], None
    return [one.path for one in _local(folder, source.hf_kwargs.get("data_files"), source).inputs], None


def _local_folder(source: Source) -> Path | None:
    """The file or folder of a source that lies on this machine; None for a data set of the hub."""
    key = next(key for key in ("hf_name", "remote", "local") if getattr(source, key))
    place = getattr(source, key)
    data_files, data_dir = source.hf_kwargs.get("data_files"), source.hf_kwargs.get("data_dir", "")
    is_builder = place in BUILDERS and (data_files or data_dir)
    folder = (Path() if is_builder else Path(place).expanduser()) / Path(data_dir).expanduser()
    if folder.exists():
        refuse_slice(source.split, f"{source.where}.split")
        for other in sorted(set(source.hf_kwargs) - {"data_files", "data_dir"}):
            raise DataError(f"{source.where}.hf_kwargs.{other}: has no effect on local files. Remove it.")
        return folder
    if key != "hf_name" or is_builder or place.startswith(("/", ".", "~")):
        raise MissingError(f"{source.where}.{key}: {folder}: there is no such file or folder.")
    if is_url(place):
        raise DataError(
            f"{source.where}.hf_name: {place}: a URL of shards is a remote. Copy other files here."
        )
    return None


def digest_of(inventory: Inventory) -> str:
    """A sha256 of the content of all inputs, whatever they are called and wherever they lie."""
    whole = hashlib.sha256()
    for source in inventory.inputs:
        whole.update(f"{source.kind} {source.size} {source.identity}\n".encode())
        folder = Path(source.path)
        files = []
        if source.kind == "mds":
            names = [shard["raw_data"]["basename"] for shard in read_index(folder, source.path).shards]
            files = [
                folder / INDEX,
                *(path for name in names for path in sorted(folder.glob(f"{escape(name)}*"))),
            ]
        elif source.kind != "dataset":
            files = [folder]
        for path in files:
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    whole.update(block)
    return whole.hexdigest()


def _local(folder: Path, data_files: Any, source: Source) -> Inventory:
    if data_files is not None:
        return find_inputs(_data_files(folder, data_files, source), text_key=None)
    split = source.split
    if (folder / (split or "") / INDEX).is_file() or (folder / INDEX).is_file():
        return _shards(folder / split if split and (folder / split / INDEX).is_file() else folder, source)
    is_saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    if is_saved or folder.is_file() or not split:
        return find_inputs([str(folder)], text_key=None, hf_split=split or "train")
    if (folder / split).is_dir():
        return find_inputs([str(folder / split)], text_key=None)
    found = find_inputs([str(folder)], text_key=None)
    named = [one for one in found.inputs if split in _words(one.name)]
    is_split = any(name in _words(one.name) for one in found.inputs for name in SPLIT_NAMES)
    if not named and (is_split or split != "train"):
        there = ", ".join(one.name for one in found.inputs[:8])
        raise DataError(
            f"{source.where}.split: {folder} has no {split}: no such folder, and no file with that word in "
            f"its name. There are {there}."
        )
    found.inputs = named or found.inputs
    return found


def _words(name: str) -> list[str]:
    """The words of a file's path, as in `data/train-00000-of-00002.parquet`."""
    return re.split(r"[^a-z0-9]+", name.lower())


def _data_files(folder: Path, given: Any, source: Source) -> list[str]:
    where = f"{source.where}.hf_kwargs.data_files"
    if isinstance(given, Mapping):
        if source.split not in given:
            raise DataError(
                f"{where}: there is no {source.split}. Use split: {' or '.join(map(str, given))}."
            )
        given = given[source.split]
    patterns = [given] if isinstance(given, str) else list(given)
    files: list[str] = []
    for pattern in map(str, patterns):
        root = Path(pattern).expanduser()
        root, relative = (Path("/"), str(root)[1:]) if root.is_absolute() else (folder, str(root))
        is_named = (root / relative).is_file()
        matches = [str(root / relative)] if is_named else sorted(map(str, root.glob(relative)))
        if not matches:
            raise MissingError(f"{where}: {root / relative}: there is no such file.")
        files += matches
    return files


def _shards(folder: Path, source: Source) -> Inventory:
    index = read_index(folder, source.where)
    check_shard_files(index, source.where, title=source.where if len(index.shards) >= MANY_SHARDS else "")
    size = sum(int(shard["raw_data"]["bytes"]) for shard in index.shards)
    return Inventory([Input("mds", str(folder), folder.name, size)])


def _fetch_shards(source: Source, cache: Path) -> Path:
    """Copy a remote data set's shards here, where they are not."""
    from streaming.base.storage.download import CloudDownloader
    from tqdm import tqdm

    assert source.remote is not None
    name = hashlib.sha256(f"{source.remote}\0{source.split}".encode()).hexdigest()[:16]
    folder = (Path(source.local).expanduser() if source.local else cache / "shards" / name) / (
        source.split or ""
    )
    remote = "/".join(filter(None, [source.remote.rstrip("/"), source.split]))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        loader = CloudDownloader.get(remote)

        def fetch(basename: str) -> None:
            # None is seen half under its own name.
            part = folder / f"{basename}.part"
            part.unlink(missing_ok=True)
            patiently(
                lambda: loader.download(f"{remote}/{basename}", str(part)),
                what=f"{source.where}.remote: {remote}/{basename} can't be fetched",
                patience=FOR_DATA,
                sign=lambda: size_of(part),
            )
            part.replace(folder / basename)

        fetch(INDEX)
        shards = read_index(folder, source.where).shards
        for shard in tqdm(shards, desc=source.where, unit="shard", disable=len(shards) < MANY_SHARDS):
            entry = shard["zip_data"] or shard["raw_data"]
            if problem_of(folder / entry["basename"], entry, fastest_hash(entry["hashes"])):
                fetch(entry["basename"])
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{source.where}.remote: {remote} can't be fetched: {reason_of(error)}.") from error
    return folder


def _hub(source: Source) -> Inventory:
    name, split = str(source.hf_name), source.split or "train"
    try:
        dataset = load_from_hub(name, split=split, **source.hf_kwargs)
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source.where}.hf_name: {name} is no file or folder here, and as one of the hub it can't "
            f"be loaded: {first_line}"
        ) from error
    inventory = Inventory()
    add_dataset(inventory, name, f"{name}/{split}", dataset)
    if not inventory.inputs:
        raise DataError(f"{source.where}.hf_name: {name} has no records in {split}.")
    return inventory
