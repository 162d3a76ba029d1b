from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mptfoundry.errors import CheckpointError
from mptfoundry.export import native
from mptfoundry.export.folder import choose_format
from mptfoundry.export.native import native_config, why_not_native
from mptfoundry.mpt.config import ActivationConfig, AttnConfig, FFNConfig, MPTConfig
from tests.conftest import TINY

NOT_NATIVE = {
    "attn_config.alibi": replace(TINY, attn_config=AttnConfig()),
    "attn_config.alibi_bias_max": replace(TINY, attn_config=AttnConfig(alibi=True, alibi_bias_max=16)),
    "attn_config.attn_type": replace(
        TINY, attn_config=AttnConfig(alibi=True, attn_type="grouped_query_attention", kv_n_heads=2)
    ),
    "attn_config.qk_ln": replace(TINY, attn_config=AttnConfig(alibi=True, qk_ln=True)),
    "attn_config.qk_gn": replace(TINY, attn_config=AttnConfig(alibi=True, qk_gn=True)),
    "attn_config.prefix_lm": replace(TINY, attn_config=AttnConfig(alibi=True, prefix_lm=True)),
    "attn_config.sliding_window_size": replace(
        TINY, attn_config=AttnConfig(alibi=True, sliding_window_size=8)
    ),
    "attn_config.attn_logit_softcapping": replace(
        TINY, attn_config=AttnConfig(alibi=True, attn_logit_softcapping=30.0)
    ),
    "head_dim": replace(TINY, head_dim=16),
    "no_bias": replace(TINY, no_bias=False, attention_bias=False),
    "attention_bias": replace(TINY, attention_bias=True),
    "expansion_ratio": replace(TINY, expansion_ratio=2),
    "ffn_config.ffn_type": replace(TINY, ffn_config=FFNConfig(ffn_type="mptglu")),
    "ffn_config.ffn_act_fn.name": replace(TINY, ffn_config=FFNConfig(ffn_act_fn=ActivationConfig("relu"))),
    "ffn_config.ffn_act_fn.approximate": replace(
        TINY, ffn_config=FFNConfig(ffn_act_fn=ActivationConfig("gelu", "tanh"))
    ),
    "norm_type": replace(TINY, norm_type="rmsnorm"),
    "tie_word_embeddings": replace(TINY, tie_word_embeddings=False),
    "logit_scale": replace(TINY, logit_scale=0.5),
    "final_logit_softcapping": replace(TINY, final_logit_softcapping=30.0),
}


def test_every_rule_has_its_case() -> None:
    assert [key for key, _, _ in native.NATIVE_RULES] == list(NOT_NATIVE)


@pytest.mark.parametrize(("key", "config"), NOT_NATIVE.items())
def test_a_switch_that_transformers_ignores_is_refused_by_its_name(key: str, config: MPTConfig) -> None:
    assert [reason.split(" ")[0] for reason in why_not_native(config)] == [key]
    with pytest.raises(CheckpointError, match=rf"native can't express this model.*{key} is.*format=custom"):
        choose_format(config, "native")
    assert choose_format(config, "auto")[0] == "custom"


def test_all_reasons_are_told_at_once() -> None:
    config = replace(TINY, logit_scale=0.5, attn_config=AttnConfig(alibi=True, alibi_bias_max=16))
    assert why_not_native(config) == [
        "attn_config.alibi_bias_max is 16, they compute 8",
        "logit_scale is 0.5, they compute null",
    ]


def test_no_switch_of_the_architecture_is_forgotten() -> None:
    """A new field must be looked at: written out, judged by a rule, or without effect on logits."""
    judged = {key for key, _, _ in native.NATIVE_RULES} | {
        "attn_config.kv_n_heads",
        "ffn_config.ffn_hidden_size",
    }
    written = {
        *("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size", "norm_eps"),
        *("attn_config.clip_qkv", "attn_config.softmax_scale"),
    }
    without_effect = {
        *("resid_pdrop", "emb_pdrop", "learned_pos_emb", "embedding_fraction", "init_config"),
        *(f"attn_config.{key}" for key in ("attn_pdrop", "attn_impl", "alibi_skips", "fused_qkv")),
        "attn_config.attn_uses_sequence_id",
        *(f"attn_config.{key}" for key in MPTConfig().to_dict()["attn_config"] if key.startswith("rope")),
    }

    def keys(values: dict[str, Any], path: str = "") -> set[str]:
        found = set()
        for key, value in values.items():
            is_section = isinstance(value, dict) and not key.startswith(("rope", "init"))
            found |= keys(value, f"{path}{key}.") if is_section else {path + key}
        return found

    assert keys(MPTConfig().to_dict()) == judged | written | without_effect


def test_config_json_has_the_types_that_every_version_takes(tiny_tokenizer: Any) -> None:
    config = replace(
        TINY, attn_config=AttnConfig(alibi=True, clip_qkv=6), expansion_ratio=4.0, embedding_fraction=1
    )
    text = json.dumps(native_config(config, tiny_tokenizer, torch.bfloat16), indent=2)
    assert text == (Path(__file__).parent / "native_config.json").read_text().rstrip("\n")
