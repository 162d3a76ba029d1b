"""Weights in Hugging Face folders: safetensors or `pytorch_model.bin`, in one file or many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mptfoundry.checkpoints.checksums import (
    CHECKSUMS,
    Verifier,
    changed_texts,
    hub_digest,
    tensor_checksums,
    why_other_bytes,
    why_other_digest,
)
from mptfoundry.checkpoints.torch_files import TorchFile, open_state_dict
from mptfoundry.checkpoints.weights import PROJECTION, Rows, TensorOutline, bytes_of, todays_name
from mptfoundry.errors import CheckpointError
from mptfoundry.files import confined, read_json

SAFETENSORS = "model.safetensors"
_BIN = "pytorch_model.bin"
_ROOT = "transformer."
# Safetensors' names of PyTorch's number formats.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class FolderWeights:
    """The tensors of a Hugging Face folder.

    If a folder has both formats, we read safetensors. If no name begins with `transformer.`, as in a folder
    saved from a base model, we add it to all names but that of the output matrix.
    """

    def __init__(self, folder: Path, verifier: Verifier | None = None) -> None:
        self.path = folder
        verifier = verifier or Verifier()
        for name in changed_texts(folder) if verifier.is_on else ():
            verifier.note(f"{folder / name} is not as it was written")
        opened = [
            SafetensorsFile(file, verifier)
            if file.suffix == ".safetensors"
            else open_state_dict(file, verifier)
            for file in _weight_files(folder)
        ]
        stores = [store for store in opened if isinstance(store, SafetensorsFile)]
        if stores and not any(store.has_checksums for store in stores):
            verifier.note(f"{folder} has no {CHECKSUMS} and is read unverified")
            verifier.is_on &= len(stores) < len(opened)
        else:
            for file in stores:
                file.note_if_unverified()
        stored = [(store, name) for store in opened for name in store.outlines]
        root = "" if any(name.startswith(_ROOT) for _, name in stored) else _ROOT
        self._stores: dict[str, tuple[SafetensorsFile | TorchFile, str]] = {}
        for store, name in stored:
            full = todays_name(name if name == PROJECTION else root + name)
            if full in self._stores:
                raise CheckpointError(f"{folder}: {full} is stored twice.")
            self._stores[full] = (store, name)

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        """All tensors, by name."""
        outlines = {id(store): store.outlines for store, _ in self._stores.values()}
        return {name: outlines[id(store)][stored] for name, (store, stored) in self._stores.items()}

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        """Read one tensor, or some of its rows."""
        store, stored = self._stores[name]
        return store.read(stored, dtype, rows)


class SafetensorsFile:
    """The tensors of one safetensors file, a format without checksums.

    They are compared with `checksums.json` next to it, or with the digest that the hub's client keeps.
    """

    def __init__(self, path: Path, verifier: Verifier | None = None) -> None:
        self.path = path
        self.outlines: dict[str, TensorOutline] = {}
        self._verifier = verifier or Verifier()
        self._checksums: dict[str, int] | None = None
        self._digest: str | None = None
        if self._verifier.is_on:
            self._checksums = tensor_checksums(path.parent)
            self._digest = hub_digest(path) if self._checksums is None else None
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    piece = file.get_slice(name)
                    dtype = _DTYPES.get(piece.get_dtype())
                    if dtype is None:
                        raise CheckpointError(
                            f"{path}: {name} is stored as {piece.get_dtype()}, which PyTorch can't read."
                        )
                    self.outlines[name] = TensorOutline(tuple(piece.get_shape()), dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged, it can't be read ({error}).") from error

    @property
    def has_checksums(self) -> bool:
        """Whether there is a checksum of any kind for it."""
        return self._checksums is not None or self._digest is not None

    def note_if_unverified(self) -> None:
        """Tell the user if there is no checksum."""
        if not self.has_checksums:
            self._verifier.note(f"{self.path} has no checksums and is read unverified")

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        """Read one tensor; the file is mapped for each read, so that its pages don't stay in memory."""
        if self._digest is not None:
            digest = self._digest
            self._verifier.once(self.path, "", lambda: why_other_digest(self.path, digest))
        with safe_open(self.path, framework="pt") as file:
            if self._checksums is not None:
                self._verifier.once(self.path, name, lambda: self._why_damaged(name, file.get_tensor(name)))
            tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows[0] : rows[1]]
        return tensor.to(dtype or tensor.dtype, copy=True)

    def _why_damaged(self, name: str, tensor: torch.Tensor) -> str | None:
        assert self._checksums is not None
        reason = (
            why_other_bytes(name, bytes_of(tensor), self._checksums[name])
            if name in self._checksums
            else f"{name} is not in {CHECKSUMS}"
        )
        return reason and f"{reason}. If the folder was written again since, remove its {CHECKSUMS}"


def _weight_files(folder: Path) -> list[Path]:
    """List the weight files that a folder names; each must be inside it."""
    for single in (SAFETENSORS, _BIN):
        index = folder / f"{single}.index.json"
        if index.is_file():
            return [confined(folder, name, index) for name in _names_in_index(index)]
        if (folder / single).is_file():
            return [confined(folder, single, folder / single)]
    raise CheckpointError(
        f"{folder}: no weights. Looked for {SAFETENSORS} and {_BIN}, whole and with an index."
    )


def _names_in_index(index: Path) -> list[str]:
    names = read_json(index.parent, index.name).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: damaged, it holds no weight_map.")
    wrong = [
        name
        for name in names.values()
        if not isinstance(name, str) or Path(name).suffix not in (".safetensors", ".bin")
    ]
    if wrong:
        raise CheckpointError(f"{index}: {wrong[0]!r} is not a file of weights.")
    return sorted(set(names.values()))
