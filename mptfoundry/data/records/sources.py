"""Find the records that a config names: files, folders and datasets.

`hf_name` is a file or folder of JSONL, Parquet or MDS shards, a folder saved by `datasets`, or a dataset on
the Hub. As in llm-foundry, it can also be `json` or `parquet` with `hf_kwargs.data_files` or `data_dir`.
`local` is a file or folder of the same kinds, or the folder for a copy of `remote`. `remote` is a URL of MDS
shards, or a path that is read like `local`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from mptfoundry.config.streams import RecordsConfig
from mptfoundry.data.records.inputs import Input, Inventory, add_dataset, find_inputs, load_from_hub
from mptfoundry.data.shards.index import INDEX, check_shard_files, read_index, refuse_slice
from mptfoundry.data.shards.integrity import fastest_hash, problem_of
from mptfoundry.errors import DataError, MissingError
from mptfoundry.files import whole_or_absent
from mptfoundry.places import is_url
from mptfoundry.stores import FOR_DATA, patiently, reason_of, size_of

BUILDERS = ("json", "parquet")
MANY_SHARDS = 8
# Longer than the timestamp resolution of any file system.
SETTLED_SECONDS = 2.0
SPLIT_NAMES = ("train", "val", "valid", "validation", "test", "eval", "dev")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def find_records(config: RecordsConfig, where: str, cache: Path) -> Inventory:
    """List everything to read from a source.

    Args:
        config: The source's section of the config.
        where: The section's key, for errors.
        cache: Folder for downloads.

    Raises:
        DataError: The source is missing, can't be read or fetched, or has no records.
    """
    if config.remote and is_url(config.remote):
        refuse_slice(config.split, f"{where}.split")
        return _shards(_fetch_shards(config, where, cache), where, cache)
    folder = _local_folder(config, where)
    return _hub(config, where) if folder is None else _local(folder, config, where, cache)


def look_at_records(config: RecordsConfig, where: str) -> tuple[list[str], int | None] | None:
    """List a source's files and, for shards, count samples, without reading records; None if it is remote.

    Raises:
        MissingError: The source should be on this machine but is not.
        DataError: The local files can't be this source.
    """
    if config.remote and is_url(config.remote):
        return None
    folder = _local_folder(config, where)
    if folder is None:
        return None
    split = config.split or ""
    for shards in (folder / split, folder):
        if config.hf_kwargs.get("data_files") is None and (shards / INDEX).is_file():
            return [str(shards)], read_index(shards, where).samples
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return [str(folder)], None
    return [one.path for one in _local(folder, config, where, None).inputs], None


def _local_folder(config: RecordsConfig, where: str) -> Path | None:
    """Return the file or folder of a local source; None for a Hub dataset."""
    key = next(key for key in ("hf_name", "remote", "local") if getattr(config, key))
    place = getattr(config, key)
    data_files, data_dir = config.hf_kwargs.get("data_files"), config.hf_kwargs.get("data_dir", "")
    is_builder = place in BUILDERS and (data_files or data_dir)
    folder = (Path() if is_builder else Path(place).expanduser()) / Path(data_dir).expanduser()
    if folder.exists():
        refuse_slice(config.split, f"{where}.split")
        for other in sorted(set(config.hf_kwargs) - {"data_files", "data_dir"}):
            raise DataError(f"{where}.hf_kwargs.{other}: has no effect on local files. Remove it.")
        return folder
    if key != "hf_name" or is_builder or place.startswith(("/", ".", "~")):
        raise MissingError(f"{where}.{key}: {folder}: there is no such file or folder.")
    if is_url(place):
        raise DataError(f"{where}.hf_name: {place}: a URL of shards is a remote. Copy other files here.")
    return None


def content_digest(inventory: Inventory, cache: Path) -> str:
    """Hash the content of all inputs with sha256, independent of their names and locations.

    The digest is cached by the paths, sizes and modification times of the files. They are only read again if
    one of these changes.
    """
    note = _note_of(inventory.inputs, cache)
    with contextlib.suppress(OSError, ValueError):
        if _DIGEST.fullmatch(known := note.read_text()):
            return known
    whole = hashlib.sha256()
    for source in inventory.inputs:
        whole.update(f"{source.kind} {source.size} {source.identity}\n".encode())
        for path in _files_of(source):
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    whole.update(block)
    # Two changes within the file system's timestamp resolution have the same modification time.
    times = [path.stat().st_mtime for source in inventory.inputs for path in _files_of(source)]
    if time.time() - max(times, default=0) > SETTLED_SECONDS:
        with whole_or_absent(note, overwrite=True) as part:
            part.write_text(whole.hexdigest())
    return whole.hexdigest()


def _note_of(inputs: Sequence[Input], cache: Path) -> Path:
    """Return the cache file with the content digest of these inputs."""
    lines = []
    for source in inputs:
        lines.append(f"{source.kind} {source.identity}")
        for path in _files_of(source):
            status = path.stat()
            # An index is small and fetched at every start, so hash it instead of using its time.
            is_index = source.kind == "mds" and path.name == INDEX
            mark = hashlib.sha256(path.read_bytes()).hexdigest() if is_index else status.st_mtime_ns
            lines.append(f"{path.absolute()}\0{status.st_size}\0{mark}")
    name = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    return cache / "inputs" / name[:32]


def _files_of(source: Input) -> list[Path]:
    """List the files of an input. A Hugging Face dataset has none; `datasets` fingerprints its content."""
    folder = Path(source.path)
    if source.kind == "mds":
        names = [shard["raw_data"]["basename"] for shard in read_index(folder, source.path).shards]
        return [folder / INDEX, *(path for name in names for path in sorted(folder.glob(f"{escape(name)}*")))]
    return [] if source.kind == "dataset" else [folder]


def _local(folder: Path, config: RecordsConfig, where: str, cache: Path | None) -> Inventory:
    if (data_files := config.hf_kwargs.get("data_files")) is not None:
        return find_inputs(_data_files(folder, data_files, config, where), text_key=None)
    split = config.split
    if (folder / (split or "") / INDEX).is_file() or (folder / INDEX).is_file():
        shards = folder / (split or "")
        return _shards(shards if (shards / INDEX).is_file() else folder, where, cache)
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
            f"{where}.split: {folder} has no {split}: no such folder, and no file with that word in "
            f"its name. There are {there}."
        )
    found.inputs = named or found.inputs
    return found


def _words(name: str) -> list[str]:
    """Split a file's path into words, as in `data/train-00000-of-00002.parquet`."""
    return re.split(r"[^a-z0-9]+", name.lower())


def _data_files(folder: Path, given: Any, config: RecordsConfig, where: str) -> list[str]:
    key = f"{where}.hf_kwargs.data_files"
    if isinstance(given, Mapping):
        if config.split not in given:
            raise DataError(f"{key}: there is no {config.split}. Use split: {' or '.join(map(str, given))}.")
        given = given[config.split]
    patterns = [given] if isinstance(given, str) else list(given)
    files: list[str] = []
    for pattern in map(str, patterns):
        root = Path(pattern).expanduser()
        root, relative = (Path("/"), str(root)[1:]) if root.is_absolute() else (folder, str(root))
        is_named = (root / relative).is_file()
        matches = [str(root / relative)] if is_named else sorted(map(str, root.glob(relative)))
        if not matches:
            raise MissingError(f"{key}: {root / relative}: there is no such file.")
        files += matches
    return files


def _shards(folder: Path, where: str, cache: Path | None) -> Inventory:
    """List a folder of shards. Their hashes are checked unless the cache has a digest of these files."""
    index = read_index(folder, where)
    size = sum(int(shard["raw_data"]["bytes"]) for shard in index.shards)
    inventory = Inventory([Input("mds", str(folder), folder.name, size)])
    is_known = cache is not None and _note_of(inventory.inputs, cache).is_file()
    title = where if len(index.shards) >= MANY_SHARDS else ""
    check_shard_files(index, where, by_hash=not is_known, title=title)
    return inventory


def _fetch_shards(config: RecordsConfig, where: str, cache: Path) -> Path:
    """Fetch the shards of a remote dataset that are missing or bad here."""
    from streaming.base.storage.download import CloudDownloader
    from tqdm import tqdm

    assert config.remote is not None
    name = hashlib.sha256(f"{config.remote}\0{config.split}".encode()).hexdigest()[:16]
    folder = (Path(config.local).expanduser() if config.local else cache / "shards" / name) / (
        config.split or ""
    )
    remote = "/".join(filter(None, [config.remote.rstrip("/"), config.split]))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        loader = CloudDownloader.get(remote)

        def fetch(basename: str) -> None:
            # Fetch under a temporary name, so nobody reads an incomplete file.
            part = folder / f"{basename}.part"
            part.unlink(missing_ok=True)
            patiently(
                lambda: loader.download(f"{remote}/{basename}", str(part)),
                what=f"{where}.remote: {remote}/{basename} can't be fetched",
                patience=FOR_DATA,
                sign=lambda: size_of(part),
            )
            part.replace(folder / basename)

        fetch(INDEX)
        shards = read_index(folder, where).shards
        is_known = _note_of([Input("mds", str(folder), folder.name, 0)], cache).is_file()
        for shard in tqdm(shards, desc=where, unit="shard", disable=len(shards) < MANY_SHARDS):
            entry = shard["zip_data"] or shard["raw_data"]
            algorithm = None if is_known else fastest_hash(entry["hashes"])
            if problem_of(folder / entry["basename"], entry, algorithm):
                fetch(entry["basename"])
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}.remote: {remote} can't be fetched: {reason_of(error)}.") from error
    return folder


def _hub(config: RecordsConfig, where: str) -> Inventory:
    name, split = str(config.hf_name), config.split or "train"
    try:
        dataset = load_from_hub(name, split=split, **config.hf_kwargs)
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{where}.hf_name: {name} is not a file or folder here, and as a data set of the hub it can't "
            f"be loaded: {first_line}"
        ) from error
    inventory = Inventory()
    add_dataset(inventory, name, f"{name}/{split}", dataset)
    if not inventory.inputs:
        raise DataError(f"{where}.hf_name: {name} has no records in {split}.")
    return inventory
