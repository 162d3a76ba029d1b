from __future__ import annotations

import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mptfoundry.checkpoints.torch_files import open_composer_file
from mptfoundry.export.composer_file import write_composer_file

SHAPES = {"transformer.wte.weight": (11, 3), "transformer.norm_f.weight": (3,), "lm_head.weight": (11, 3)}


def tensors() -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in SHAPES.items():
        yield name, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_reads_what_was_written_mapped_and_not(tmp_path: Path, dtype: torch.dtype) -> None:
    written: list[int] = []
    write_composer_file(tmp_path / "a.pt", SHAPES, tensors(), dtype, written.append)
    assert sum(written) == (33 + 3 + 33) * dtype.itemsize
    for mmap in (True, False):
        state = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)["state"]
        assert list(state["model"]) == [f"model.{name}" for name in SHAPES]
        for name, tensor in tensors():
            assert torch.equal(state["model"][f"model.{name}"], tensor.to(dtype))
    weights = open_composer_file(tmp_path / "a.pt")
    assert {name: outline.shape for name, outline in weights.outlines.items()} == SHAPES


def test_every_member_is_whole_and_begins_where_memory_is_aligned(tmp_path: Path) -> None:
    write_composer_file(tmp_path / "a.pt", SHAPES, tensors(), torch.float32, lambda _: None)
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None
    model = torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)["state"]["model"]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in model.values())


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        write_composer_file(tmp_path / name, SHAPES, tensors(), torch.float32, lambda _: None)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_no_tensor_outlives_its_writing(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name in SHAPES:
            assert not any(tensor() is not None for tensor in alive)
            tensor = torch.ones(SHAPES[name])
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    write_composer_file(tmp_path / "a.pt", SHAPES, watched(), torch.float32, lambda _: None)
    assert len(alive) == 3
