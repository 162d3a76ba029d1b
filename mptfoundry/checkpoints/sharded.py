"""Weights in sharded checkpoints: folders that `torch.distributed.checkpoint` writes, one file per rank.

`.metadata`, a pickle, holds every tensor's size and the location of its pieces. We read it with an unpickler
that allows the few classes of such metadata and nothing else.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as outline

from mptfoundry.checkpoints.checksums import (
    CHECKSUMS,
    Verifier,
    why_file_is_damaged,
    why_piece_is_damaged,
)
from mptfoundry.checkpoints.torch_files import load_plain_bytes
from mptfoundry.checkpoints.weights import Rows, TensorOutline, cut
from mptfoundry.errors import CheckpointError
from mptfoundry.files import confined

METADATA = ".metadata"
_CHILD = "state.model.model."
_NOTES = "state.integrations.huggingface."
DAMAGE = (
    *(RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError),
    *(OSError, EOFError, pickle.UnpicklingError),
)
_OUTLINE_CLASSES = {
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
}


class ShardedWeights:
    """The model of a sharded Composer checkpoint; the optimizer's pieces are never read."""

    def __init__(self, folder: Path, verifier: Verifier | None = None) -> None:
        self.path = folder
        self._verifier = verifier or Verifier()
        self._metadata = read_metadata(folder, self._verifier)
        if not (folder / CHECKSUMS).exists():
            self._verifier.note(
                f"{folder} has no {CHECKSUMS}: its {METADATA} is read unverified, its tensors are verified"
            )
        if reason := why_folder_is_not_whole(folder, self._metadata):
            raise CheckpointError(f"{folder}: {reason}.")
        self._entries = {
            key.removeprefix(_CHILD): entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if key.startswith(_CHILD) and isinstance(entry, outline.TensorStorageMetadata)
        }
        if not self._entries:
            raise CheckpointError(f"{folder}: not a Composer checkpoint; it holds no state.model.")
        self._check_that_it_is_stored()

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        """All tensors, by name."""
        return {
            name: TensorOutline(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._entries.items()
        }

    def note(self, part: str) -> dict[str, Any]:
        """Read what Composer keeps of a Hugging Face `model` or `tokenizer`, stored value by value."""
        prefix = f"{_NOTES}{part}."
        places = {key.fqn: place for key, place in self._metadata.storage_data.items()}
        notes: dict[Any, Any] = {}
        try:
            for key, path in (getattr(self._metadata, "planner_data", None) or {}).items():
                if key.startswith(prefix):
                    section = notes
                    for step in path[4:-1]:
                        section = section.setdefault(step, {})
                    section[path[-1]] = _value_at(self.path, places[key], self._verifier)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{self.path / METADATA}: damaged, {prefix} can't be read.") from error
        return _with_lists(notes)  # type: ignore[no-any-return]

    def _check_that_it_is_stored(self) -> None:
        """Raise CheckpointError if the metadata lists more numbers than the files hold."""
        said = sum(outline.numel * outline.dtype.itemsize for outline in self.outlines.values())
        stored = sum(file.stat().st_size for file in self.path.glob("*.distcp"))
        if said > stored:
            raise CheckpointError(
                f"{self.path}: refused, since {METADATA} tells of {said:,} bytes of weights, and its files "
                f"hold {stored:,}."
            )

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        """Read one tensor from the pieces of all ranks; for some of its rows, it still reads all."""
        entry = self._entries[name]
        state = {_CHILD + name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                reader = Reader(self.path, self._metadata, self._verifier)
                dcp.load(state, storage_reader=reader, no_dist=True)
        except dcp.api.CheckpointException as error:
            raise own_cause(error) or CheckpointError(
                f"{self.path}: damaged, {name} can't be read."
            ) from error
        except DAMAGE as error:
            raise CheckpointError(f"{self.path}: damaged, {name} can't be read.") from error
        whole = state[_CHILD + name].to(dtype or entry.properties.dtype)
        return whole if rows is None else cut(whole, rows).clone()


def read_value(folder: Path, key: str) -> Any:
    """Read one value of a sharded checkpoint that is not a tensor; None if it has none by that key.

    Raises:
        CheckpointError: It is damaged, or not a plain value.
    """
    for index, place in read_metadata(folder).storage_data.items():
        if index.fqn == key:
            return _value_at(folder, place, Verifier())
    return None


def _value_at(folder: Path, place: Any, verifier: Verifier) -> Any:
    file = confined(folder, place.relative_path, folder / METADATA)
    with file.open("rb") as stream:
        stream.seek(place.offset)
        piece = io.BytesIO(stream.read(place.length))
    verifier.once(file, f"at {place.offset}", lambda: why_piece_is_damaged("a note", piece))
    return load_plain_bytes(piece, str(file))


def _with_lists(value: Any) -> Any:
    """Turn sections with the keys 0, 1, 2 ... back into the lists that they were before flattening."""
    if not isinstance(value, dict):
        return value
    inner = {key: _with_lists(item) for key, item in value.items()}
    is_list = bool(inner) and all(isinstance(key, int) for key in inner)
    return [inner[key] for key in sorted(inner)] if is_list else inner


def own_cause(error: dcp.api.CheckpointException) -> CheckpointError | None:
    """Return the first error of ours among those of all ranks."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, CheckpointError)), None)


def read_metadata(folder: Path, verifier: Verifier | None = None) -> outline.Metadata:
    """Read a sharded checkpoint's metadata; runs no code, and every file it names must be in the folder."""
    file = folder / METADATA
    if (folder / CHECKSUMS).exists():
        (verifier or Verifier()).once(folder, METADATA, lambda: why_file_is_damaged(folder, METADATA))
    try:
        with file.open("rb") as stream:
            metadata = _OutlineUnpickler(stream).load()
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{file}: damaged, it can't be read ({type(error).__name__}).") from error
    if not isinstance(metadata, outline.Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{file}: not the outline of a sharded checkpoint.")
    if not _has_the_types_of_an_outline(metadata):
        raise CheckpointError(f"{file}: damaged, its entries are not those of a sharded checkpoint.")
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = outline.StorageMeta()
    return metadata


def _has_the_types_of_an_outline(metadata: outline.Metadata) -> bool:
    """Whether every entry is what torch writes: one changed bit of a pickle can put another value there."""

    def is_entry(entry: Any) -> bool:
        if isinstance(entry, outline.BytesStorageMetadata):
            return True
        sizes = [entry.size, *(size for chunk in entry.chunks for size in (chunk.offsets, chunk.sizes))]
        return isinstance(entry.properties.dtype, torch.dtype) and all(
            isinstance(s, torch.Size) for s in sizes
        )

    try:
        entries, paths = metadata.state_dict_metadata, getattr(metadata, "planner_data", None) or {}
        return (
            all(isinstance(key, str) and is_entry(entry) for key, entry in entries.items())
            and all(isinstance(key, str) and isinstance(path, tuple) for key, path in paths.items())
            and all(
                (type(key.fqn), type(p.relative_path), type(p.offset), type(p.length)) == (str, str, int, int)
                for key, p in metadata.storage_data.items()
            )
        )
    except (AttributeError, TypeError):
        return False


def why_folder_is_not_whole(folder: Path, metadata: outline.Metadata | None = None) -> str | None:
    """Say which file of a sharded checkpoint is missing or too short; None if none is."""
    if not (folder / METADATA).is_file():
        return f"unfinished: {METADATA}, which is written last, is not there"
    try:
        metadata = metadata or read_metadata(folder)
        sizes: dict[str, int] = {}
        for piece in metadata.storage_data.values():
            end = piece.offset + piece.length
            sizes[piece.relative_path] = max(sizes.get(piece.relative_path, 0), end)
        for name, size in sizes.items():
            found = confined(folder, name, folder / METADATA).stat().st_size
            if found < size:
                return f"{name} was cut short at {found:,} of {size:,} bytes"
    except CheckpointError as error:
        return str(error).removeprefix(f"{folder}: ").rstrip(".")
    return None


class Reader(dcp.FileSystemReader):
    """torch's reader with metadata that was read safely and only names files of the folder.

    Each piece is compared with its own checksums before it is used.
    """

    def __init__(self, folder: Path, metadata: outline.Metadata, verifier: Verifier | None = None) -> None:
        super().__init__(folder)
        self._outline = metadata
        self._folder = folder
        self._verifier = verifier or Verifier()
        self._names = {(p.relative_path, p.offset): key.fqn for key, p in metadata.storage_data.items()}

    def read_metadata(self, *args: Any, **kwargs: Any) -> outline.Metadata:
        return self._outline

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        file.seek(sinfo.offset)
        piece = io.BytesIO(file.read(sinfo.length))
        name = self._names[sinfo.relative_path, sinfo.offset].removeprefix(_CHILD)
        what = f"{name} in {sinfo.relative_path}"
        self._verifier.once(self._folder, what, lambda: why_piece_is_damaged(what, piece))
        return piece


class _OutlineUnpickler(pickle.Unpickler):
    """Allows the classes of a checkpoint's metadata, and refuses everything else that a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch.distributed.checkpoint.metadata" and name in _OUTLINE_CLASSES:
            return getattr(outline, name)
        if module == "torch.distributed.checkpoint.filesystem" and name == "_StorageInfo":
            return dcp.filesystem._StorageInfo
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):
            return _path_as_text
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise CheckpointError(f"refused, since reading it would call {module}.{name}.")


def _path_as_text(*parts: str) -> str:
    """Replace a path of the machine that wrote the checkpoint, which means nothing here."""
    return "/".join(parts)
