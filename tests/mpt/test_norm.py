from __future__ import annotations

import pytest
import torch

from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.norm import Norm, compute_dtype


def norm(norm_type: str, **options: object) -> torch.nn.Module:
    shape = MPTConfig(d_model=8, n_heads=2, n_layers=1, norm_type=norm_type, norm_eps=0.1, **options)  # type: ignore[arg-type]
    made = Norm(8, shape, "cpu")
    assert (made.weight == 1).all() and (made.bias is None or (made.bias == 0).all())
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("norm_type", ["layernorm", "low_precision_layernorm"])
def test_layer_norm_by_its_formula(norm_type: str) -> None:
    made, x = norm(norm_type), torch.randn(3, 8)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * made.weight + made.bias
    torch.testing.assert_close(made(x), expected)
    assert norm(norm_type, no_bias=True).bias is None


@pytest.mark.parametrize("norm_type", ["rmsnorm", "low_precision_rmsnorm"])
def test_rms_norm_by_its_formula(norm_type: str) -> None:
    made, x = norm(norm_type), torch.randn(3, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * made.weight
    torch.testing.assert_close(made(x), expected)
    assert [name for name, _ in made.named_parameters()] == ["weight"]


def test_the_compute_dtype_is_autocasts() -> None:
    x = torch.zeros(1)
    assert compute_dtype(x) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(x) is torch.bfloat16
        assert norm("low_precision_layernorm")(torch.randn(3, 8)).dtype is torch.bfloat16
