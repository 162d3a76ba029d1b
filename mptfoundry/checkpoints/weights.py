"""What every store of weights offers: shapes without reading, then one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mptfoundry.errors import CheckpointError

PROJECTION = "lm_head.weight"
EMBEDDING = "transformer.wte.weight"


@dataclass(frozen=True)
class TensorOutline:
    """Shape and number format of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class Weights(Protocol):
    """A model's weights on disk, by MPT's names (`transformer.blocks.0.attn.Wqkv.weight`)."""

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        """All tensors, by name."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor in memory of its own, on the CPU, in `dtype` or as stored."""


def confined(folder: Path, name: str, named_by: Path) -> Path:
    """The file `name` of `folder`; raises CheckpointError unless it lies in that very folder."""
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
        raise CheckpointError(
            f"{named_by}: refused, since it names {name!r}, which is not a file of its own folder."
        )
    file = folder / name
    if not file.is_file():
        raise CheckpointError(f"{folder}: {name} is missing, which {named_by.name} names.")
    return file
