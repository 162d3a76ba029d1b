"""The interface of all weight readers: shapes without reading, then one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from mptfoundry.errors import CheckpointError

PROJECTION = "lm_head.weight"
EMBEDDING = "transformer.wte.weight"
POSITIONS = "transformer.wpe.weight"

# Integers and 8-bit numbers belong to a quantized model: without its scales, which are stored elsewhere, they
# are not the weights.
_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# The first row to read and the one after the last; None: all.
Rows = tuple[int, int] | None


@dataclass(frozen=True)
class TensorOutline:
    """Shape and number format of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class Weights(Protocol):
    """A model's weights on disk, by MPT's names (`transformer.blocks.0.attn.Wqkv.weight`)."""

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        """All tensors, by name."""

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        """Read a copy of one tensor, or of some of its rows, on the CPU, in `dtype` or as stored."""


def check_number_formats(path: object, outlines: Mapping[str, TensorOutline], names: Iterable[str]) -> None:
    """Raise CheckpointError for a weight that is not stored in floating point of at least 16 bits; `path` is
    for the error, and only tensors of these names are weights."""
    for name in names:
        if name in outlines and outlines[name].dtype not in _READABLE:
            raise CheckpointError(
                f"{path}: {name} is stored as {format_name(outlines[name].dtype)}. Weights are read as "
                f"{', '.join(map(format_name, _READABLE))}: give the model as it was before it was quantized."
            )


def check_finite(path: object, name: str, tensor: torch.Tensor) -> None:
    """Raise CheckpointError for a tensor that holds NaN or infinity; `path` is for the error."""
    if not all(extreme.isfinite() for extreme in tensor.aminmax()):  # one pass, without extra memory
        raise CheckpointError(f"{path}: {name} holds NaN or infinity as {format_name(tensor.dtype)}.")


def format_name(dtype: torch.dtype) -> str:
    """Return a number format's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


# Names in MPT's first generation that have changed since.
_FIRST_NAMES = {
    ".ln_1.": ".norm_1.",
    ".ln_2.": ".norm_2.",
    ".ln_f.": ".norm_f.",
    ".mlp.mlp_up.": ".ffn.up_proj.",
    ".mlp.mlp_down.": ".ffn.down_proj.",
}


def todays_name(name: str) -> str:
    """Return the current name of a tensor, as MPT calls it since its second generation."""
    name = f".{name}"
    for old, new in _FIRST_NAMES.items():
        name = name.replace(old, new)
    return name[1:]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes as they are in a file."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def cut(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return a view of those rows."""
    return tensor if rows is None else tensor[rows[0] : rows[1]]
