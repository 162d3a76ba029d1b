from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mptfoundry.mpt.config import ActivationConfig, FFNConfig, MPTConfig
from mptfoundry.mpt.ffn import FFN, make_activation


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "gelu"}, lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
        ({"name": "gelu", "approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
        ({"name": "quick_gelu"}, lambda x: x / (1 + torch.exp(-1.702 * x))),
        ({"name": "relu"}, lambda x: x.clamp(min=0)),
        ({"name": "silu"}, lambda x: x / (1 + torch.exp(-x))),
    ],
)
def test_activations_by_their_formulas(options: dict[str, str], expected: object) -> None:
    x = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(make_activation(ActivationConfig(**options))(x), expected(x))


def test_a_gate_multiplies_the_hidden_layer() -> None:
    shape = MPTConfig(d_model=8, n_heads=2, n_layers=1, ffn_config=FFNConfig("mptglu", 12))
    ffn, x = FFN(shape, "cpu"), torch.randn(2, 3, 8)
    expected = ffn.down_proj(F.gelu(ffn.gate_proj(x)) * ffn.up_proj(x))
    torch.testing.assert_close(ffn(x), expected)
    assert ffn.gate_proj.weight.shape == (12, 8)


def test_without_a_gate_there_are_two_matrices() -> None:
    shape = MPTConfig(d_model=8, n_heads=2, n_layers=1, no_bias=True, expansion_ratio=3)
    ffn, x = FFN(shape, "cpu"), torch.randn(2, 3, 8)
    torch.testing.assert_close(ffn(x), ffn.down_proj(F.gelu(ffn.up_proj(x))))
    assert [name for name, _ in ffn.named_parameters()] == ["up_proj.weight", "down_proj.weight"]
    assert ffn.up_proj.weight.shape == (24, 8)
