from __future__ import annotations

import pytest
import torch

from mptfoundry.mpt.attention import BACKENDS, Attention
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.position import AttentionContext


def config(**attention: object) -> MPTConfig:
    return MPTConfig(d_model=32, n_heads=4, n_layers=1, no_bias=True, attn_config=AttnConfig(**attention))  # type: ignore[arg-type]


def attention(**options: object) -> Attention:
    made = Attention(config(**options), 0, "cpu")
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def test_the_backend_is_chosen_once_for_all_layers_by_what_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def choose(config: MPTConfig, device_type: str, dtype: str, capability: None) -> tuple[str, str]:
        asked.append((device_type, dtype))
        return "torch", "asked for"

    monkeypatch.setattr("mptfoundry.mpt.attention.choose_backend", choose)
    x, context = torch.randn(1, 6, 32), AttentionContext(scale=0.5)
    made = attention()
    assert torch.equal(made(x, context), made(x, context))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made(x, AttentionContext(scale=0.5))
    assert asked == [("cpu", "float32"), ("cpu", "bfloat16")]


def test_a_backend_that_cannot_serve_is_never_replaced() -> None:
    refused = attention(attn_impl="flash")
    with pytest.raises(ValueError, match=r"flash can't be used: it needs a GPU\. Use auto or torch"):
        refused(torch.randn(1, 6, 32), AttentionContext(scale=0.5))


def test_queries_keys_and_values_are_clamped() -> None:
    x, context = torch.randn(1, 6, 32), AttentionContext(scale=0.5)
    clipped, plain = attention(clip_qkv=0.7), attention()
    qkv = plain.Wqkv(x).clamp(-0.7, 0.7).unflatten(-1, (3, 4, 8))
    expected = BACKENDS["torch"].attend(*qkv.unbind(2), context)
    torch.testing.assert_close(clipped(x, context), plain.out_proj(expected.flatten(2)))


@pytest.mark.parametrize("norm", ["qk_ln", "qk_gn"])
def test_queries_and_keys_are_normalised_together_or_by_head(norm: str) -> None:
    made = attention(**{norm: True})
    x, context = torch.randn(1, 6, 32), AttentionContext(scale=0.5)
    query, key, value = made.Wqkv(x).unflatten(-1, (3, 4, 8)).unbind(2)

    def normal(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        width = x.flatten(2) if norm == "qk_ln" else x
        width = (width - width.mean(-1, keepdim=True)) / (width.var(-1, False, keepdim=True) + 1e-5).sqrt()
        return (width * weight).view_as(x)

    out = BACKENDS["torch"].attend(
        normal(query, made.q_ln.weight), normal(key, made.k_ln.weight), value, context
    )
    torch.testing.assert_close(made(x, context), made.out_proj(out.flatten(2)), atol=1e-4, rtol=1e-4)
