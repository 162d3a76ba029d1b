"""A Composer checkpoint in one file, written tensor by tensor.

The file is what `torch.save` writes, an uncompressed zip archive: a pickle with the tree of names, shapes and
places, and one member with the plain bytes of each tensor. `torch.save` wants all tensors at once; here each
is made, written and let go. The layout inside is that of Composer's checkpoints of weights alone.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

_FOLDER = "checkpoint"
# torch maps tensors from the file, so that their bytes have to begin where a processor likes to load.
_ALIGNMENT = 64
_LOCAL_HEADER, _ZIP64_FIELD, _FIELD_HEADER = 30, 20, 4
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


def write_composer_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    progress: Callable[[int], None],
) -> None:
    """Write the weights of a network as a Composer checkpoint; equal weights give equal bytes.

    Args:
        path: The file.
        shapes: Every tensor's shape by its name in the network, in the order in which `tensors` brings them.
        tensors: Names and tensors.
        dtype: Of all tensors: float32, float16 or bfloat16.
        progress: Called with the bytes of each tensor written.
    """
    model = {f"model.{name}": _Stored(str(i), shape, dtype) for i, (name, shape) in enumerate(shapes.items())}
    outline = io.BytesIO()
    _OutlinePickler(outline, protocol=2).dump({"state": {"model": model, "integrations": {}, "metadata": {}}})
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, file, "data.pkl", outline.getvalue())
        _add(archive, file, "byteorder", sys.byteorder.encode())
        for key, name in enumerate(shapes):
            found, tensor = next(tensors)
            assert found == name and tuple(tensor.shape) == shapes[name]
            data = tensor.to(dtype).contiguous().flatten().view(torch.uint8).numpy().data
            _add(archive, file, f"data/{key}", data)
            progress(data.nbytes)
            del tensor, data  # before the next one is made
        _add(archive, file, "version", b"3\n")


@dataclass(frozen=True)
class _Stored:
    """Stands for a tensor in the pickle; its bytes are the member `data/{key}`."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class _OutlinePickler(pickle.Pickler):
    """Writes for a `_Stored` what torch writes for a tensor."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Stored):
            return NotImplemented
        strides = torch.empty(value.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (_Place(value), 0, value.shape, strides, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Place):
            return None
        stored = value.stored
        return "storage", _STORAGES[stored.dtype], stored.key, "cpu", torch.Size(stored.shape).numel()


@dataclass(frozen=True)
class _Place:
    stored: _Stored


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, content: Any) -> None:
    """Add a member whose bytes begin at a multiple of the alignment."""
    member = zipfile.ZipInfo(f"{_FOLDER}/{name}")
    begins = file.tell() + _LOCAL_HEADER + len(member.filename) + _ZIP64_FIELD + _FIELD_HEADER
    filling = bytes(-begins % _ALIGNMENT)
    member.extra = struct.pack("<2sH", b"FB", len(filling)) + filling
    with archive.open(member, "w", force_zip64=True) as stream:
        stream.write(content)
