"""Weights in Hugging Face folders: safetensors or `pytorch_model.bin`, in one file or many."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mptfoundry.checkpoints.torch_files import TorchFile, open_state_dict
from mptfoundry.checkpoints.weights import PROJECTION, TensorOutline, confined
from mptfoundry.errors import CheckpointError

SAFETENSORS = "model.safetensors"
_BIN = "pytorch_model.bin"
_ROOT = "transformer."
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FolderWeights:
    """The tensors of a Hugging Face folder.

    A folder with both formats is read from safetensors. Names without `transformer.`, as a base model saves
    them, get it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._stores: dict[str, tuple[SafetensorsFile | TorchFile, str]] = {}
        for file in _weight_files(folder):
            store = SafetensorsFile(file) if file.suffix == ".safetensors" else open_state_dict(file)
            for name in store.outlines:
                has_root = name.startswith(_ROOT) or name == PROJECTION
                self._stores[name if has_root else _ROOT + name] = (store, name)

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        """All tensors, by name."""
        outlines = {id(store): store.outlines for store, _ in self._stores.values()}
        return {name: outlines[id(store)][stored] for name, (store, stored) in self._stores.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor."""
        store, stored = self._stores[name]
        return store.read(stored, dtype)


class SafetensorsFile:
    """The tensors of one safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outlines: dict[str, TensorOutline] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    piece = file.get_slice(name)
                    dtype = DTYPES.get(piece.get_dtype())
                    if dtype is None:
                        raise CheckpointError(
                            f"{path}: {name} is stored as {piece.get_dtype()}. Read are {', '.join(DTYPES)}."
                        )
                    self.outlines[name] = TensorOutline(tuple(piece.get_shape()), dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged, it can't be read ({error}).") from error

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor; the file is mapped for it alone, so that its pages don't stay in memory."""
        with safe_open(self.path, framework="pt") as file:
            tensor = file.get_tensor(name)
        return tensor.to(dtype or tensor.dtype, copy=True)


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights that a folder names, each confined to it."""
    for single in (SAFETENSORS, _BIN):
        index = folder / f"{single}.index.json"
        if index.is_file():
            return [confined(folder, name, index) for name in _names_in_index(index)]
        if (folder / single).is_file():
            return [folder / single]
    raise CheckpointError(
        f"{folder}: no weights. Looked for {SAFETENSORS} and {_BIN}, whole and with an index."
    )


def _names_in_index(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: damaged, it holds no weight_map.") from error
    wrong = [
        name
        for name in names
        if not isinstance(name, str) or Path(name).suffix not in (".safetensors", ".bin")
    ]
    if wrong:
        raise CheckpointError(f"{index}: {wrong[0]!r} is no file of weights.")
    return sorted(names)
