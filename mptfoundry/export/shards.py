"""Write weights into safetensors files, tensor by tensor.

A safetensors file is eight bytes with the header's length (little-endian), the header (JSON: for each tensor
its dtype, shape and offsets), and the tensors' bytes one after the other
(https://github.com/huggingface/safetensors#format). The header is known beforehand, so there is never more
than one tensor in memory.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from mptfoundry.checkpoints.weights import bytes_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_ALIGNMENT = 8


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    shard_bytes: int,
    progress: Callable[[int], None],
) -> tuple[list[Path], dict[str, int]]:
    """Write `model.safetensors`, or several files and `model.safetensors.index.json`.

    Args:
        folder: An existing folder to write to.
        shapes: Every tensor's shape, in the order in which `tensors` yields them.
        tensors: Names and tensors.
        dtype: The dtype of all tensors.
        shard_bytes: Largest file; a single tensor that is larger gets its own file.
        progress: Called with the number of bytes of each tensor written.

    Returns:
        The weight files, and each tensor's CRC-32.
    """
    checksums: dict[str, int] = {}
    shards = _split(shapes, dtype, shard_bytes)
    names = _file_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header({tensor: shapes[tensor] for tensor in shard}, dtype))
            for expected in shard:
                found, tensor = next(tensors)
                assert found == expected and tuple(tensor.shape) == shapes[expected]
                content = bytes_of(tensor.to(dtype))
                checksums[found] = zlib.crc32(content)
                file.write(content)
                progress(tensor.numel() * dtype.itemsize)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        total = sum(_bytes(shape, dtype) for shape in shapes.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {
                tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
            },
        }
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return [folder / name for name in names], checksums


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _split(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int) -> list[list[str]]:
    """Return the names of the tensors of each file, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = _bytes(shape, dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + _bytes(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
