from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mptfoundry.export.shards import write_shards

TENSORS = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.randn(2, 2, 2), "d": torch.randn(())}


def write(folder: Path, dtype: torch.dtype, shard_bytes: int) -> tuple[list[Path], list[int]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    sizes: list[int] = []
    files, checksums = write_shards(folder, shapes, iter(TENSORS.items()), dtype, shard_bytes, sizes.append)
    assert set(checksums) == set(TENSORS)
    return files, sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_reads_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    files, sizes = write(tmp_path, dtype, 1 << 30)
    assert [file.name for file in files] == ["model.safetensors"]
    found = load_file(files[0])
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor.to(dtype))
    assert sum(sizes) == 26 * dtype.itemsize


def test_files_stay_under_their_size_and_the_index_names_all_tensors(tmp_path: Path) -> None:
    files, _ = write(tmp_path, torch.float32, 40)
    assert [file.name for file in files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 26 * 4}
    assert index["weight_map"] == {
        name: file.name for name, file in zip("abcd", [*files, files[-1]], strict=True)
    }
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])


def test_only_one_tensor_is_asked_for_at_a_time(tmp_path: Path) -> None:
    events: list[str] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in TENSORS.items():
            events.append(f"read {name}")
            yield name, tensor

    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    write_shards(tmp_path, shapes, tensors(), torch.float32, 40, lambda size: events.append("wrote"))
    assert events == [word for name in "abcd" for word in (f"read {name}", "wrote")]
