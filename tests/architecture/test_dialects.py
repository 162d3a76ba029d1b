from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.architecture.dialects import config_from_dict, config_of_folder, config_of_others
from mptfoundry.errors import CheckpointError
from mptfoundry.mpt.config import AttnConfig, FFNConfig, InitConfig, MPTConfig
from mptfoundry.mpt.flops import count_parameters

PUBLISHED_7B: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {
        "emb_init_std": None,
        "emb_init_uniform_lim": None,
        "fan_mode": "fan_in",
        "init_div_is_residual": True,
        "init_gain": 0,
        "init_nonlinearity": "relu",
        "init_std": 0.02,
        "name": "kaiming_normal_",
        "verbose": 0,
    },
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}


def test_the_published_config_gives_the_published_model() -> None:
    config = config_from_dict(PUBLISHED_7B, "config.json")
    assert config.attn_config == AttnConfig(alibi=True)
    assert config.init_config == InitConfig(init_std=0.02)
    assert count_parameters(config) == 6_649_286_656


def test_storywriters_switches_are_kept() -> None:
    attention = {**PUBLISHED_7B["attn_config"], "clip_qkv": 6, "alibi_bias_max": 16}
    config = config_from_dict({**PUBLISHED_7B, "attn_config": attention, "max_seq_len": 65536}, "config.json")
    assert (config.attn_config.clip_qkv, config.attn_config.alibi_bias_max) == (6, 16)
    assert config.max_seq_len == 65536


def test_transformers_own_config_is_read_with_its_own_defaults(tmp_path: Path) -> None:
    from transformers import MptConfig

    MptConfig(d_model=64, n_heads=4, layer_norm_epsilon=1e-6).save_pretrained(tmp_path)
    config = config_of_folder(tmp_path)
    assert config.norm_eps == 1e-6
    assert config.no_bias and config.attn_config.alibi

    (tmp_path / "config.json").write_text('{"model_type": "mpt", "layer_norm_epsilon": 1e-05, "d_model": 64}')
    assert config_of_folder(tmp_path).attn_config.alibi


def test_all_that_transformers_base_class_can_write_is_known() -> None:
    from transformers import MptConfig

    values = json.loads(MptConfig(d_model=64, n_heads=4).to_json_string(use_diff=False))
    assert "return_dict" in values and config_from_dict(values, "x").d_model == 64


def test_llm_foundrys_silence_means_llm_foundrys_defaults() -> None:
    config = config_from_dict(
        {"d_model": 64, "n_heads": 4, "norm_eps": 1e-5, "fc_type": {"name": "torch"}}, "x"
    )
    assert not config.no_bias
    assert not config.attn_config.alibi


def test_llm_foundrys_latest_additions_are_taken_where_they_are_off() -> None:
    off = {"nope": False, "attn_temperature_tuning": {"attn_scale": 0.0, "floor_scale": 8192}, "kv_dim": None}
    assert config_from_dict({"attn_config": off, "block_overrides": None}, "x") == MPTConfig()
    with pytest.raises(CheckpointError, match=r"attn_config.nope: True. MPT has no such option"):
        config_from_dict({"attn_config": {**off, "nope": True}}, "x")


def test_llm_foundrys_query_norms_are_not_taken_for_something_else() -> None:
    values = {"attn_config": {"qk_ln": True}, "norm_type": "low_precision_layernorm", "norm_eps": 1e-5}
    assert config_of_others(values, "x").attn_config.qk_ln
    for change in ({"norm_type": "rmsnorm"}, {"norm_eps": 1e-6}):
        with pytest.raises(CheckpointError, match=r"llm-foundry computes these as layernorms with 1e-5"):
            config_of_others({**values, **change}, "x")
        assert config_from_dict({**values, **change}, "x").attn_config.qk_ln


def test_our_own_dictionary_comes_back() -> None:
    config = MPTConfig(
        d_model=48,
        n_heads=4,
        attn_config=AttnConfig(attn_type="grouped_query_attention", kv_n_heads=2, rope=True, clip_qkv=6.0),
        ffn_config=FFNConfig(ffn_type="mptglu", ffn_hidden_size=96),
        init_config=InitConfig(emb_init_uniform_lim=(-0.1, 0.2)),
        logit_scale="inv_sqrt_d_model",
    )
    assert config_from_dict(json.loads(json.dumps(config.to_dict())), "x") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_config": {"qk_lm": True}}, "config.json: attn_config.qk_lm: True. MPT has no such option"),
        ({"n_layer": 3}, "config.json: n_layer: 3. MPT has no such option here"),
        ({"n_layers": "3"}, "config.json: n_layers: '3'. Allowed: int"),
        ({"no_bias": 1}, "config.json: no_bias: 1. Allowed: bool"),
        ({"norm_type": "batchnorm"}, "norm_type: 'batchnorm'. Allowed: low_precision_layernorm, layernorm"),
        ({"d_model": 63}, "config.json: d_model: 63 does not split over 16 heads"),
        ({"ffn_config": {"ffn_type": "mb_dmoe"}}, "ffn_config.ffn_type: 'mb_dmoe'. Allowed: mptmlp, mptglu"),
        ({"norm_eps": 1e-6, "layer_norm_epsilon": 1e-5}, "norm_eps is 1e-06, layer_norm_epsilon 1e-05"),
    ],
)
def test_what_could_change_the_mathematics_is_an_error_that_names_it(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        config_from_dict(change, "config.json")
    assert message in str(error.value)


def test_another_models_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"model_type is 'llama'. Only MPT models are read"):
        config_of_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"can't be read"):
        config_of_folder(tmp_path)
