from __future__ import annotations

import pytest
import torch

from mptfoundry.mpt.attention import BACKENDS, Attention, choose_backend
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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_finds_a_backend_and_says_why(device: str) -> None:
    name, reason = choose_backend(config(), device)
    assert name in BACKENDS and f"serves this model on {device}" in reason
    assert choose_backend(config(attn_impl="torch"), device) == ("torch", "asked for")


def test_a_backend_that_cannot_serve_is_an_error_with_the_alternatives() -> None:
    for name in {"flash", "triton"} - set(BACKENDS):
        with pytest.raises(ValueError) as caught:
            choose_backend(config(attn_impl=name), "cpu")
        assert str(caught.value) == (
            f"attn_config.attn_impl: {name} can't be used: this version has no such backend. "
            "Use auto or torch; all give the same mathematics."
        )


def test_a_backend_may_refuse_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["torch"], "cannot", lambda config, device: "it is Sunday")
    with pytest.raises(ValueError, match=r"torch can't be used: it is Sunday\. Use auto;"):
        choose_backend(config(attn_impl="torch"), "cpu")
    with pytest.raises(ValueError, match=r"finds no backend\. not torch: it is Sunday"):
        choose_backend(config(), "cpu")


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
