"""Cases of attention, and its kernels and the plain formula run on them.

The kernels run on a GPU, or without one by Triton's interpreter (the fixture `triton_runs`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mptfoundry.mpt import attention_tiles
from mptfoundry.mpt.attention_tiles import Tile
from mptfoundry.mpt.attention_triton import attend
from mptfoundry.mpt.position import PADDING, AttentionContext, alibi_slopes

from .reference import assert_attention_as_exact, attend_plainly, with_gradients

Case = tuple[list[torch.Tensor], torch.Tensor, AttentionContext]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 as if it were integers.
HALVES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]

# Small blocks, so that short rows have blocks of every kind: (queries, keys) of each kernel.
SMALL_TILES = [
    {"forward": (16, 16), "backward_query": (16, 16), "backward_key": (16, 16)},
    {"forward": (32, 16), "backward_query": (16, 32), "backward_key": (16, 32)},
    {"forward": (16, 32), "backward_query": (16, 16), "backward_key": (32, 16)},
]

# What the arguments of `make_case` say.
FEATURES: dict[str, dict[str, Any]] = {
    "alibi": {"bias_max": 8},
    "documents": {"documents": ((3, 16), (4, 5, 25))},
    "packed documents": {"documents": ((3, 16), (4, 5, 25)), "packed": True},
    "left padding": {"left": 5},
    "right padding": {"right": 19},
    "inner padding": {"inner": ((9, 26), (20, 23))},
    "window 1": {"window": 1},
    "window 10": {"window": 10},
    "grouped queries": {"n_heads": 4, "kv_heads": 2},
    "one key head": {"kv_heads": 1},
    "prefix": {"prefix": ((10, 34), (0, 21))},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.7},
    "past": {"past": 23},
    "head_dim 24": {"head_dim": 24},
}


def use_tiles(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, tuple[int, int]]) -> None:
    sizes = {**sizes, "backward_key_grouped": sizes["backward_key"]}
    table = {kernel: {2**power: Tile(*size, 4, 1) for power in range(4, 9)} for kernel, size in sizes.items()}
    monkeypatch.setattr(attention_tiles, "TILES", dict.fromkeys(attention_tiles.TILES, table))


def make_case(
    seq: int = 40,
    batch: int = 2,
    past: int = 0,
    n_heads: int = 2,
    kv_heads: int | None = None,
    head_dim: int = 16,
    bias_max: float | None = None,
    scale: float | None = None,
    documents: tuple[tuple[int, ...], ...] = (),
    left: int = 0,
    right: int = 0,
    inner: tuple[tuple[int, int], ...] = (),
    prefix: tuple[tuple[int, int], ...] = (),
    slopes: tuple[float, ...] = (),
    packed: bool = False,
    **options: Any,
) -> Case:
    """Inputs, a gradient of the output that is zero for padding, and a context.

    ``documents`` (where each begins but the first), ``inner`` (where padding begins and ends) and ``prefix``
    are for each row; where rows don't differ there is one. ``packed`` says, where it is true, that padding
    stands only at the end of rows.
    """
    keys, kv_heads = past + seq, kv_heads or n_heads
    batch = min(batch, 2 if left or right else max(1, len(documents), len(inner), len(prefix)))
    generator = torch.Generator().manual_seed(0)
    query, grad = torch.randn(2, batch, seq, n_heads, head_dim, generator=generator)
    key, value = torch.randn(2, batch, keys, kv_heads, head_dim, generator=generator)
    places = torch.arange(keys)
    numbers = torch.zeros(batch, keys, dtype=torch.int64)
    for row, begins in enumerate(documents[:batch]):
        for begin in begins:
            numbers[row] += places >= begin
    for row in range(batch):
        numbers[row, : left // (row + 1)] = PADDING
        numbers[row, max(0, keys - right // (row + 1)) :] = PADDING
    for row, (begin, end) in enumerate(inner[:batch]):
        numbers[row, begin:end] = PADDING
    if documents or left or right or inner:
        options["documents"] = numbers
        options["max_documents"] = 9 if packed and not left and not inner else None
        grad[numbers[:, past:] == PADDING] = 0
    if prefix:
        options["prefix"] = torch.stack([(places >= begin) & (places < end) for begin, end in prefix[:batch]])
    if slopes or bias_max is not None:
        options["slopes"] = torch.tensor(slopes) if slopes else alibi_slopes(n_heads, bias_max)
    return [query, key, value], grad, AttentionContext(scale=scale or head_dim**-0.5, **options)


def on_device(context: AttentionContext) -> AttentionContext:
    moved = {
        name: value.to(DEVICE) for name, value in vars(context).items() if isinstance(value, torch.Tensor)
    }
    return dataclasses.replace(context, _made={}, **moved)


def by_kernels(
    inputs: list[torch.Tensor], grad: torch.Tensor, context: AttentionContext, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output and gradients, with padding's rows of the output seen to be zero."""
    there = on_device(context)
    results = with_gradients(lambda *x: attend(*(y.to(DEVICE) for y in x), there).cpu(), inputs, grad, dtype)
    is_padding = padding_of(context, grad)
    assert not results[0][is_padding].any()
    return results


def plainly(
    inputs: list[torch.Tensor],
    grad: torch.Tensor,
    context: AttentionContext,
    dtype: torch.dtype,
    **options: Any,
) -> list[torch.Tensor]:
    """The plain formula; half precision as tensor cores compute it."""

    def attend_in_half(*x: torch.Tensor) -> torch.Tensor:
        return attend_plainly(*(y.float() for y in x), context, half=dtype, **options).to(dtype)

    def attend_exactly(*x: torch.Tensor) -> torch.Tensor:
        return attend_plainly(*x, context, **options)

    results = with_gradients(attend_in_half if dtype in HALVES else attend_exactly, inputs, grad, dtype)
    results[0][padding_of(context, grad)] = 0
    return results


def padding_of(context: AttentionContext, grad: torch.Tensor) -> torch.Tensor:
    if context.documents is None:
        return torch.zeros(grad.shape[:2], dtype=torch.bool)
    return context.documents[:, -grad.shape[1] :] == PADDING


def assert_kernels_as_exact(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Output and gradients; the yardstick is the plain formula in ``dtype``."""
    inputs, grad, context = [x.to(dtype) for x in case[0]], case[1].to(dtype), case[2]
    assert_attention_as_exact(
        by_kernels(inputs, grad, context, dtype),
        plainly(inputs, grad, context, dtype),
        plainly(inputs, grad, context, torch.float64),
        context,
    )


class Calls(TorchDispatchMode):
    """The operators that are called: their names, arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.arguments: dict[str, tuple[Any, ...]] = {}
        self.results: dict[str, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2]
        self.names.append(name)
        self.arguments[name], self.results[name] = args, out
        return out
