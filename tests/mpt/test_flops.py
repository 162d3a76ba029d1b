from __future__ import annotations

import itertools

import pytest
import torch

from mptfoundry.mpt.config import AttnConfig, FFNConfig, MPTConfig
from mptfoundry.mpt.flops import block_activations, count_parameters, flops_per_token, parameter_shapes
from mptfoundry.mpt.head_config import HEADS
from mptfoundry.mpt.heads import make_network
from mptfoundry.mpt.network import MPT

PUBLISHED = {"7b": (4096, 32, 32, 6_649_286_656), "30b": (7168, 64, 48, 29_957_200_896)}
LLM_FOUNDRY = {
    "125m": (768, 12, 12, 125_311_488),
    "350m": (1024, 16, 24, 355_985_408),
    "760m": (1536, 12, 24, 760_470_528),
    "1b": (2048, 16, 24, 1_315_950_592),
    "3b": (2560, 20, 32, 2_651_837_440),
    "7b": (4096, 32, 32, 6_658_859_008),
    "13b": (5120, 40, 40, 12_853_954_560),
    "30b": (7168, 56, 48, 29_975_214_080),
    "70b": (8192, 64, 80, 64_862_437_376),
}


def small(*, attn: dict | None = None, ffn: dict | None = None, **fields: object) -> MPTConfig:
    base: dict = {"d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 10, "vocab_size": 37}
    return MPTConfig(
        **{**base, **fields}, attn_config=AttnConfig(**(attn or {})), ffn_config=FFNConfig(**(ffn or {}))
    )


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_models_have_their_published_size(size):
    d_model, n_heads, n_layers, parameters = PUBLISHED[size]
    config = MPTConfig(
        d_model=d_model,
        n_heads=n_heads,
        n_layers=n_layers,
        vocab_size=50432,
        no_bias=True,
        attn_config=AttnConfig(alibi=True),
    )
    assert count_parameters(config) == parameters


@pytest.mark.parametrize("size", LLM_FOUNDRY)
def test_llm_foundrys_shapes_have_their_size(size):
    d_model, n_heads, n_layers, parameters = LLM_FOUNDRY[size]
    assert count_parameters(MPTConfig(d_model=d_model, n_heads=n_heads, n_layers=n_layers)) == parameters


def test_a_network_of_one_feature_is_counted_by_hand():
    # wte 3, wpe 5, norms 2 + 2 + 2, Wqkv 3 + 3, out_proj 1 + 1, up_proj 4 + 4, down_proj 4 + 1
    config = MPTConfig(d_model=1, n_heads=1, n_layers=1, max_seq_len=5, vocab_size=3)
    assert count_parameters(config) == 3 + 5 + 6 + 6 + 2 + 8 + 5


def grid() -> list[MPTConfig]:
    attentions: list[dict] = [
        {},
        {"alibi": True},
        {"rope": True},
        {"qk_ln": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2},
        {"qk_gn": True, "attn_type": "multiquery_attention"},
    ]
    norms = ["low_precision_layernorm", "layernorm", "rmsnorm", "low_precision_rmsnorm"]
    configs = [
        small(attn=attn, no_bias=no_bias, norm_type=norm)
        for attn, no_bias, norm in itertools.product(attentions, [False, True], norms)
    ]
    configs += [
        small(attn=attn, no_bias=no_bias, attention_bias=attention_bias, head_dim=8)
        for attn, no_bias, attention_bias in itertools.product(attentions, [False, True], [False, True])
    ]
    configs += [
        small(
            ffn={"ffn_type": ffn_type, "ffn_hidden_size": hidden}, no_bias=no_bias, tie_word_embeddings=tied
        )
        for ffn_type, hidden, no_bias, tied in itertools.product(
            ["mptmlp", "mptglu"], [None, 40], [False, True], [False, True]
        )
    ]
    configs += [small(learned_pos_emb=False), small(expansion_ratio=2)]
    return configs


def test_the_count_is_that_of_the_network_for_every_switch():
    for config in grid():
        network = MPT(config, device="meta")
        assert sum(p.numel() for p in network.parameters()) == count_parameters(config), config


def test_the_shapes_are_those_of_the_network_for_every_switch():
    for config in grid():
        found = {name: tuple(p.shape) for name, p in MPT(config, device="meta").named_parameters()}
        assert parameter_shapes(config) == found, config


@pytest.mark.parametrize("kind", HEADS)
def test_the_shapes_are_those_of_the_network_with_a_head(kind):
    config = kind(d_model=24, n_heads=4, n_layers=2, max_seq_len=10, vocab_size=37)
    found = {name: tuple(p.shape) for name, p in make_network(config, device="meta").named_parameters()}
    assert parameter_shapes(config) == found


def test_flops_follow_the_published_convention():
    config = small()
    assert flops_per_token(config, 10, causal=False) == 6 * count_parameters(config) + 12 * 2 * 24 * 10


def test_causal_attention_costs_half():
    config = small()
    assert flops_per_token(config, 10, causal=True) == 6 * count_parameters(config) + 6 * 2 * 24 * 10


def test_attention_is_as_wide_as_its_heads_together():
    wide = small(head_dim=12)
    assert flops_per_token(wide, 10, causal=False) - 6 * count_parameters(wide) == 12 * 2 * 48 * 10


def test_a_window_bounds_the_keys_that_a_token_meets():
    config = small(attn={"sliding_window_size": 3})
    assert flops_per_token(config, 100, causal=False) - 6 * count_parameters(config) == 12 * 2 * 24 * 4
    # in 100 positions: 4 keys each, less half a window at the start
    assert flops_per_token(config, 100, causal=True) - 6 * count_parameters(config) == int(12 * 2 * 24 * 3.92)


def test_a_window_longer_than_the_sequence_changes_nothing():
    windowed, plain = small(attn={"sliding_window_size": 500}), small()
    for causal in (True, False):
        assert flops_per_token(windowed, 100, causal=causal) == flops_per_token(plain, 100, causal=causal)


def test_an_untied_embedding_costs_no_arithmetic():
    tied, untied = small(), small(tie_word_embeddings=False)
    assert count_parameters(untied) == count_parameters(tied) + 37 * 24
    assert flops_per_token(untied, 10, causal=False) == flops_per_token(tied, 10, causal=False)


def numbers_kept(config: MPTConfig, tokens: int) -> int:
    """float32 numbers that a training forward of the network keeps for backward, weights aside."""
    network = MPT(config, device="cpu", seed=0).train()
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    ids = torch.randint(0, config.vocab_size, (2, tokens // 2))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = network(ids, labels=ids)
    assert output.loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("attn", "fields", "tolerance"),
    [
        ({"alibi": True}, {}, 0.02),
        ({}, {"no_bias": False}, 0.02),
        ({"alibi": True}, {"ffn_config": FFNConfig(ffn_type="mptglu")}, 0.02),
        ({"alibi": True, "clip_qkv": 6.0}, {}, 0.02),
        ({"alibi": True, "qk_ln": True}, {}, 0.1),
        ({"rope": True}, {}, 0.1),
    ],
    ids=str,
)
def test_a_block_keeps_what_it_is_said_to_keep(attn, fields, tolerance):
    """The rest of the tolerance are the norms' statistics and the attention's own."""
    shape: dict = {"d_model": 128, "n_heads": 4, "max_seq_len": 128, "vocab_size": 32, "no_bias": True}
    two, four = (
        MPTConfig(**{**shape, "n_layers": layers, **fields}, attn_config=AttnConfig(**attn))
        for layers in (2, 4)
    )
    kept = (numbers_kept(four, 256) - numbers_kept(two, 256)) / 2 / 256
    assert kept == pytest.approx(block_activations(two), rel=tolerance)
