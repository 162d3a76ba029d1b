"""Weights in files of `torch.save`: Composer's whole checkpoints and `pytorch_model.bin`.

Such a file is a zip archive with one pickle and the raw bytes of each tensor. We read the pickle with torch's
restricted unpickler, which calls only a short list of harmless constructors; the bytes are memory-mapped, so
that the optimizer's part of a checkpoint is never read.
"""

from __future__ import annotations

import ctypes
import datetime
import mmap
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.torch_version import TorchVersion

from mptfoundry.checkpoints.checksums import (
    Verifier,
    has_checksums,
    members_of,
    outline_parts,
    parts_of_archive,
    why_archive_is_damaged,
    why_other_bytes,
)
from mptfoundry.checkpoints.weights import Rows, TensorOutline, cut, todays_name
from mptfoundry.errors import CheckpointError, first_line

_CHILD = "model."
_END_RECORD = 22
# How files of `torch.save` began before torch 1.6: a pickled number.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_DAMAGE = (RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError, UnicodeError, MemoryError)
_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


class TorchFile:
    """The tensors of one file, memory-mapped.

    Args:
        path: The file.
        tensors: The tensors in it, by name.
        check: Compares the bytes of one tensor with their checksum before they are used.
        prefix: Is removed from their names; tensors with other names are left out.
        notes: What Composer keeps of a Hugging Face model.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Any],
        check: Callable[[str, torch.Tensor], None],
        prefix: str = "",
        notes: Any = None,
    ) -> None:
        self.path = path
        self._check = check
        self._notes = notes
        self._tensors = {
            todays_name(name.removeprefix(prefix)): value
            for name, value in tensors.items()
            if name.startswith(prefix) and isinstance(value, torch.Tensor)
        }
        for name, tensor in self._tensors.items():
            _check_that_it_is_stored(path, name, tensor)

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        """All tensors, by name."""
        return {name: TensorOutline(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def note(self, part: str) -> dict[str, Any]:
        """Return what Composer keeps of a Hugging Face `model` or `tokenizer`; `{}` if nothing."""
        found = self._notes.get(part) if isinstance(self._notes, dict) else None
        return found if isinstance(found, dict) else {}

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        """Read a copy of one tensor, and release the mapped pages at once."""
        self._check(name, self._tensors[name])
        mapped = cut(self._tensors[name], rows)
        copy = mapped.to(dtype or mapped.dtype, copy=True).contiguous()
        _give_back(mapped)
        return copy


def open_composer_file(path: Path, verifier: Verifier | None = None) -> TorchFile:
    """Open the model of a Composer checkpoint; llm-foundry's have the same layout and include a config."""
    verifier = verifier or Verifier()
    content = load_plain(path, verifier=verifier)
    state = content.get("state") if isinstance(content, dict) else None
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(model, dict):
        raise CheckpointError(f"{path}: not a Composer checkpoint; it holds no state.model.")
    integrations = state.get("integrations")
    notes = integrations.get("huggingface") if isinstance(integrations, dict) else None
    return TorchFile(path, model, _Members(path, content, verifier), _CHILD, notes)


def open_state_dict(path: Path, verifier: Verifier | None = None) -> TorchFile:
    """Open the tensors of a file that holds only a state dict, such as `pytorch_model.bin`."""
    verifier = verifier or Verifier()
    content = load_plain(path, verifier=verifier)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors.")
    return TorchFile(path, content, _Members(path, content, verifier))


def load_plain(path: Path, *, mapped: bool = True, verifier: Verifier | None = None) -> Any:
    """Load what `torch.save` wrote, with tensors mapped from the file or read; never runs code.

    Everything but the tensors is compared with its checksum.

    Raises:
        CheckpointError: The file is damaged, or contains more than tensors and plain values.
    """
    if reason := why_file_is_not_whole(path):
        raise CheckpointError(f"{path}: {reason}.")
    verifier = verifier or Verifier()
    if has_checksums(path):
        verifier.once(path, "", lambda: why_archive_is_damaged(path, outline_parts(path)))
    else:
        verifier.note(f"{path} was written without checksums and is read unverified")
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path)) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: damaged, it can't be read ({first_line(error)}).") from error


def load_plain_bytes(content: BinaryIO, what: str) -> Any:
    """Load what `torch.save` wrote into a piece of a file, called `what` in errors; never runs code.

    Raises:
        CheckpointError: It is damaged, or contains more than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        raise CheckpointError(f"{what}: refused, since reading it would need more than values.") from error


def why_file_is_not_whole(path: Path) -> str | None:
    """Say what is wrong with the structure of a file of `torch.save`; None if nothing. Reads no values."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                return "a compressed archive, and torch.save writes plain ones"
            if any(name.endswith("/data.pkl") for name in archive.namelist()):
                return None
        return "damaged, or a zip archive that torch.save did not write"
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        with path.open("rb") as file:
            if file.read(len(_LEGACY_START)) == _LEGACY_START:
                return (
                    "written in the format of torch before 1.6, which isn't read here. Write it again in "
                    f'today\'s, by torch.save(torch.load("{path.name}", weights_only=True), "{path.name}")'
                )
        size = path.stat().st_size
        return f"damaged or cut short at {size:,} bytes ({str(error) or type(error).__name__})"


def ends_as_written(path: Path) -> bool:
    """Whether a file ends like an archive that `torch.save` wrote."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _END_RECORD))
        return file.read(4) == b"PK\5\6"


class _Members:
    """Compares a mapped tensor with the checksum of its member in the archive.

    All tensors are mapped from one block of memory that starts with the file: the first tensor is the first
    member. If that does not hold, such as for numbers that torch byte-swapped in memory because another
    machine's byte order differs, the whole file is compared at once.
    """

    def __init__(self, path: Path, content: Any, verifier: Verifier) -> None:
        self._path = path
        self._verifier = verifier
        try:
            members = members_of(path) if has_checksums(path) else []
            is_swapped = bool(members) and _byteorder(path) != sys.byteorder
        except (OSError, ValueError, struct.error, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path}: damaged, it can't be read ({first_line(error)}).") from error
        self._members = {member.offset: member for member in members if member.size}
        storages = [tensor.untyped_storage() for tensor in _tensors_in(content)]
        stored = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
        self._start = min(stored, default=0) - min(self._members, default=0)
        if not self._members:
            return
        if is_swapped or any(
            (member := self._members.get(address - self._start)) is None or member.size != size
            for address, size in stored.items()
        ):
            self._members = {}
            verifier.once(path, "all", lambda: why_archive_is_damaged(path, parts_of_archive(path)))

    def __call__(self, name: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if member := self._members.get(storage.data_ptr() - self._start):
            content = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            self._verifier.once(
                self._path, member.name, lambda: why_other_bytes(name, content.numpy(), member.crc)
            )
            _give_back(content)


def _tensors_in(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        if content.layout is torch.strided and content.device.type == "cpu":
            yield content
    elif isinstance(content, (dict, list, tuple, set)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _tensors_in(value)


def _byteorder(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith("/byteorder")), None)
        return sys.byteorder if name is None else archive.read(name).decode()


def _harmless() -> list[Any]:
    """List what a Composer checkpoint needs besides tensors: times, random states, versions."""
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]
    reconstruct: Any = multiarray._reconstruct  # type: ignore[attr-defined]
    scalar: Any = multiarray.scalar  # type: ignore[attr-defined]
    return [
        datetime.timedelta,
        TorchVersion,
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdSU"},
        *[(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")],
        *[(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")],
    ]


def _check_that_it_is_stored(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise CheckpointError for a tensor that claims more numbers than the file holds."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise CheckpointError(f"{path}: {name} is not a plain tensor.")
    stored, said = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
    if said > stored:
        raise CheckpointError(
            f"{path}: refused, since {name} says it has the shape {tuple(tensor.shape)}, {said:,} bytes, and "
            f"{stored:,} are stored."
        )


def _refusal(path: Path) -> str:
    """Say in one sentence what a refused file would call."""
    try:
        with torch.serialization.safe_globals(_harmless()):
            calls = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged pickle may fail in any way here too
        calls = []
    if not calls:
        return f"{path}: damaged, its outline can't be read."
    return (
        f"{path}: refused, since loading it would call {', '.join(calls)}. Only tensors and plain "
        "values are read from a checkpoint."
    )


def _give_back(mapped: torch.Tensor) -> None:
    """Drop the file's pages behind a mapped tensor, so that they don't use memory."""
    if _DONTNEED is None or mapped.numel() == 0:
        return
    page = mmap.PAGESIZE
    start = -(-mapped.data_ptr() // page) * page
    end = (mapped.data_ptr() + mapped.numel() * mapped.element_size()) // page * page
    if end > start:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(_DONTNEED))
