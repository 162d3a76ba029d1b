from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mptfoundry.mpt.linear import Linear, linear

from .reference import assert_as_exact


class Products(TorchDispatchMode):
    """Notes the shape of what each matrix product gives."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (8,), (8, 1), (2, 5), (33,), (3, 11), (64, 1)])
def test_any_number_of_rows_is_as_exact_as_pytorchs(shape: tuple[int, ...], has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 96, generator=generator)
    weight = torch.randn(130, 96, generator=generator)
    bias = torch.randn(130, generator=generator) if has_bias else None
    with torch.no_grad():
        out = linear(x, weight, bias)
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert out.shape == (*shape, 130) and out.is_contiguous()
    assert_as_exact([out], [F.linear(x, weight, bias)], [truth])


def test_a_batch_that_generates_goes_through_the_matrix_once_and_nothing_else_does() -> None:
    layer = Linear(16, 24, bias=False)

    def shapes(rows: int, dtype: torch.dtype = torch.float32) -> list[tuple[int, ...]]:
        with Products() as products:
            layer.to(dtype)(torch.randn(rows, 1, 16, dtype=dtype))
        return products.shapes

    assert shapes(8) == [(8, 24)]  # in training
    with torch.no_grad():
        assert shapes(8) == [(24, 8)]
        assert shapes(32) == [(24, 32)]
        assert shapes(7) == [(7, 24)]
        assert shapes(33) == [(33, 24)]
        assert shapes(8, torch.bfloat16) == [(8, 24)]
