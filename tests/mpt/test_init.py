from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mptfoundry.mpt.config import AttnConfig, InitConfig, MPTConfig
from mptfoundry.mpt.head_config import SequenceClassifierConfig, SpanFinderConfig, TokenClassifierConfig
from mptfoundry.mpt.heads import make_network
from mptfoundry.mpt.init import _BLOCK_NUMBERS, draw
from mptfoundry.mpt.network import MPT


def config(attention: AttnConfig | None = None, **init: object) -> MPTConfig:
    return MPTConfig(
        d_model=128,
        n_heads=4,
        n_layers=3,
        vocab_size=500,
        max_seq_len=100,
        tie_word_embeddings=False,
        attn_config=attention or AttnConfig(qk_ln=True),
        init_config=InitConfig(**init),  # type: ignore[arg-type]
    )


def weights(config: MPTConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: x.detach() for name, x in MPT(config, seed=seed).named_parameters()}


@pytest.mark.parametrize("head", [None, SequenceClassifierConfig, TokenClassifierConfig, SpanFinderConfig])
def test_a_module_draws_its_weights_unless_empty_ones_are_asked_for(head: type[MPTConfig] | None) -> None:
    shape: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 50, "max_seq_len": 16}
    config = (head or MPTConfig)(**shape)
    torch.manual_seed(3)
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(3)
    network, other = make_network(config), make_network(config)
    for name, weight in network.named_parameters():
        assert torch.equal(weight, draw(name, tuple(weight.shape), config, seed)), name
    assert not torch.equal(network.transformer.wte.weight, other.transformer.wte.weight)
    state = torch.get_rng_state()
    assert make_network(config, device="meta").transformer.wte.weight.is_meta
    assert not make_network(config, empty=True).transformer.wte.weight.is_meta
    make_network(config, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


QKV, UP = "transformer.blocks.1.attn.Wqkv.weight", "transformer.blocks.1.ffn.up_proj.weight"
OUT, DOWN = "transformer.blocks.1.attn.out_proj.weight", "transformer.blocks.1.ffn.down_proj.weight"
WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
RESIDUAL = math.sqrt(2 * 3)

# Standard deviations of Wqkv, up_proj, down_proj, wte, by hand: Wqkv is drawn head by head, 32 x 128 each.
SCHEMES = {
    "baseline_": ({"init_std": 0.02}, (0.02, 0.02, 0.02 / RESIDUAL, 0.02)),
    "kaiming_normal_": (
        {},
        (math.sqrt(2 / 128), math.sqrt(2 / 128), math.sqrt(2 / 512) / RESIDUAL, math.sqrt(2 / 128)),
    ),
    "kaiming_uniform_": (
        {"fan_mode": "fan_out", "init_nonlinearity": "linear"},
        (math.sqrt(1 / 32), math.sqrt(1 / 512), math.sqrt(1 / 128) / RESIDUAL, math.sqrt(1 / 500)),
    ),
    "xavier_normal_": (
        {"init_gain": 2.0},
        (2 * math.sqrt(2 / 160), 2 * math.sqrt(2 / 640), 2 * math.sqrt(2 / 640) / RESIDUAL, None),
    ),
    "xavier_uniform_": (
        {"init_gain": 1.0},
        (math.sqrt(2 / 160), math.sqrt(2 / 640), math.sqrt(2 / 640) / RESIDUAL, None),
    ),
    "small_init_": ({}, (0.4**0.5 / 128**0.5, 0.4**0.5 / 128**0.5, 0.4**0.5 / 128**0.5 / RESIDUAL, None)),
    "neox_init_": (
        {},
        (0.4**0.5 / 128**0.5, 0.4**0.5 / 128**0.5, 0.4**0.5 / 128**0.5 / 3 * 10**0.5, None),
    ),
    "default_": ({}, (1 / math.sqrt(3 * 128), 1 / math.sqrt(3 * 128), 1 / math.sqrt(3 * 512), 1.0)),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_each_scheme_has_its_spread(name: str) -> None:
    options, expected = SCHEMES[name]
    drawn = weights(config(name=name, **options))
    for key, std in zip((QKV, UP, DOWN, WTE), expected, strict=True):
        if std is not None:
            assert drawn[key].std().item() == pytest.approx(std, rel=0.03), key
    flat = drawn[UP].flatten()
    is_uniform = name.endswith("uniform_") or name == "default_"
    assert (flat.abs().max() < 1.74 * flat.std()) == is_uniform


def test_norms_are_ones_and_biases_zero() -> None:
    for name, value in weights(config()).items():
        if "norm" in name or "_ln" in name:
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert not value.any(), name
        else:
            assert value.std() > 0, name


@pytest.mark.parametrize("divisor", [False, True, 5.0])
def test_what_writes_into_the_residual_stream_is_smaller(divisor: bool | float) -> None:
    drawn = weights(config(name="baseline_", init_std=1.0, init_div_is_residual=divisor))
    by = RESIDUAL if divisor is True else divisor or 1.0
    for key in (OUT, DOWN):
        assert drawn[key].std().item() == pytest.approx(1 / by, rel=0.03)
    for key in (QKV, UP, WTE, WPE, HEAD):
        assert drawn[key].std().item() == pytest.approx(1, rel=0.03)


def test_embeddings_may_have_a_spread_of_their_own() -> None:
    drawn = weights(config(emb_init_std=0.5))
    assert drawn[WTE].std().item() == pytest.approx(0.5, rel=0.03)
    assert drawn[WPE].std().item() == pytest.approx(0.5, rel=0.03)
    assert drawn[HEAD].std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.03)
    drawn = weights(config(emb_init_uniform_lim=(-0.1, 0.3)))
    assert -0.1 <= drawn[WTE].min() < -0.09 and 0.29 < drawn[WTE].max() <= 0.3
    assert weights(config(emb_init_uniform_lim=0.2))[WTE].abs().max() <= 0.2


def test_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = (weights(config(), seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[UP], other[UP])
    assert not torch.equal(first[UP], first[UP.replace("1", "2")])
    deeper = MPTConfig(**{**vars(config()), "n_layers": 5, "init_config": InitConfig()})
    assert torch.equal(weights(deeper, 1)[UP], first[UP])


def test_a_shard_draws_the_rows_it_holds() -> None:
    shape = (3 * _BLOCK_NUMBERS // 128, 128)
    whole = draw(WTE, shape, config(), seed=1)
    for rows in ((0, 5), (100, shape[0] - 1), (_BLOCK_NUMBERS // 128, 2 * _BLOCK_NUMBERS // 128)):
        assert torch.equal(draw(WTE, shape, config(), 1, rows), whole[slice(*rows)])
