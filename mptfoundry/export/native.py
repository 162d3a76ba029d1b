"""The models that transformers' own MPT classes express, and the `config.json` that they read.

The classes express only a part of what MPT can be, and silently ignore the rest of a config. The table here
lists what they express.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.head_config import HeadConfig

# What transformers' MPT classes compute: (key, required value, whether a config has it).
NATIVE_RULES: tuple[tuple[str, str, Callable[[MPTConfig], bool]], ...] = (
    ("attn_config.alibi", "true", lambda c: c.attn_config.alibi),
    ("attn_config.alibi_bias_max", "8", lambda c: c.attn_config.alibi_bias_max == 8),
    ("attn_config.attn_type", "as many key and value heads as heads", lambda c: c.kv_heads == c.n_heads),
    ("attn_config.qk_ln", "false", lambda c: not c.attn_config.qk_ln),
    ("attn_config.qk_gn", "false", lambda c: not c.attn_config.qk_gn),
    ("attn_config.prefix_lm", "false", lambda c: not c.attn_config.prefix_lm),
    ("attn_config.sliding_window_size", "-1", lambda c: c.attn_config.sliding_window_size == -1),
    ("attn_config.attn_logit_softcapping", "null", lambda c: c.attn_config.attn_logit_softcapping is None),
    ("head_dim", "d_model / n_heads", lambda c: c.d_head * c.n_heads == c.d_model),
    ("no_bias", "true", lambda c: c.no_bias),
    ("attention_bias", "false", lambda c: not c.has_qkv_bias),
    ("expansion_ratio", "a hidden width of 4 * d_model", lambda c: c.d_ffn == 4 * c.d_model),
    ("ffn_config.ffn_type", "mptmlp", lambda c: c.ffn_config.ffn_type == "mptmlp"),
    ("ffn_config.ffn_act_fn.name", "gelu", lambda c: c.ffn_config.ffn_act_fn.name == "gelu"),
    ("ffn_config.ffn_act_fn.approximate", "none", lambda c: c.ffn_config.ffn_act_fn.approximate == "none"),
    ("norm_type", "a layernorm", lambda c: c.norm_type.endswith("layernorm")),
    ("tie_word_embeddings", "true", lambda c: c.tie_word_embeddings),
    ("logit_scale", "null", lambda c: c.logit_scale is None),
    ("final_logit_softcapping", "null", lambda c: c.final_logit_softcapping is None),
)


NATIVE_CODE = "modeling_mpt.py"
# transformers' own classes under MPT's original names.
NATIVE_CODE_TEXT = '''"""transformers' own MPT under the names by which some converters know it."""

from transformers import (
    MptConfig,
    MptForCausalLM,
    MptForQuestionAnswering,
    MptForSequenceClassification,
    MptForTokenClassification,
    MptModel,
)


class MPTConfig(MptConfig):
    pass


class MPTModel(MptModel):
    config_class = MPTConfig


class MPTForCausalLM(MptForCausalLM):
    config_class = MPTConfig


class MPTForSequenceClassification(MptForSequenceClassification):
    config_class = MPTConfig


class MPTForTokenClassification(MptForTokenClassification):
    config_class = MPTConfig


class MPTForQuestionAnswering(MptForQuestionAnswering):
    config_class = MPTConfig
'''
# A user who allows the folder's code gets MPTConfig, so every class must be registered for it.
_AUTO_MAP = {
    f"Auto{kind}": f"modeling_mpt.MPT{kind.removeprefix('Model') or kind}"
    for kind in (
        *("Config", "Model", "ModelForCausalLM", "ModelForSequenceClassification"),
        *("ModelForTokenClassification", "ModelForQuestionAnswering"),
    )
}

# transformers 4's pipeline() looks for a tokenizer's class here if it does not know the config's class.
_CODE_KEYS = {"auto_map": _AUTO_MAP, "tokenizer_class": "PreTrainedTokenizerFast"}

# Switches without effect if a head replaces the logits.
_OF_LOGITS = {"tie_word_embeddings", "logit_scale", "final_logit_softcapping"}


def why_not_native(config: MPTConfig) -> list[str]:
    """List every switch that transformers' MPT classes ignore or can't express; empty if they express all."""
    values = config.to_dict()
    reasons = []
    for key, allowed, holds in NATIVE_RULES:
        if not holds(config) and not (isinstance(config, HeadConfig) and key in _OF_LOGITS):
            value: Any = values
            for part in key.split("."):
                value = value[part]
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            reasons.append(f"{key} is {shown}, they compute {allowed}")
    return reasons


def native_config(config: MPTConfig, tokenizer: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of `config.json`, with the exact type of each number.

    transformers 5 checks types: `attn_pdrop` and `alibi_bias_max` must be integers, `clip_qkv` and
    `softmax_scale` floats or null, `expansion_ratio` an integer, `embedding_fraction` a float. It and older
    versions read `layer_norm_epsilon`; MPT's own code and other converters read `norm_eps`.

    `architectures` has transformers' own name, because `transformers serve` looks up its first entry. Two
    converters select by name but support fewer kinds of MPT, so a model gets the name that they look for only
    if they support it. CTranslate2 looks for the class `MPTConfig`, which is in the folder (`NATIVE_CODE`).
    llama.cpp looks for `MPTForCausalLM`, also as the first entry of `architectures`, but prefers the one in
    `llm_config`, a key that transformers keeps and does not interpret.
    """
    attention = config.attn_config
    head = config.head_keys() if isinstance(config, HeadConfig) else {}
    is_plain = attention.softmax_scale is None and config.norm_eps == 1e-5
    return {
        "architectures": ["MptForCausalLM"],
        **({"llm_config": {"architectures": ["MPTForCausalLM"]}} if is_plain and not head else {}),
        **(_CODE_KEYS if is_plain and attention.clip_qkv is None and not head else {}),
        "model_type": "mpt",
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "expansion_ratio": 4,
        "max_seq_len": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "resid_pdrop": config.resid_pdrop or 0,
        "emb_pdrop": config.emb_pdrop or 0,
        "learned_pos_emb": config.learned_pos_emb,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": 8,
            "attn_impl": "torch",
            "attn_pdrop": 0,
            "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False,
            "clip_qkv": _float(attention.clip_qkv),
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": _float(attention.softmax_scale),
        },
        "init_config": config.to_dict()["init_config"],
        "init_device": "cpu",
        "logit_scale": None,
        "no_bias": True,
        "embedding_fraction": float(config.embedding_fraction),
        "norm_type": config.norm_type,
        "norm_eps": float(config.norm_eps),
        "layer_norm_epsilon": float(config.norm_eps),
        "tie_word_embeddings": True,
        "use_cache": True,
        **token_ids(tokenizer),
        "torch_dtype": str(dtype).removeprefix("torch."),
    } | head


def token_ids(tokenizer: Any) -> dict[str, int | None]:
    """Return a config.json's entries for a tokenizer's special tokens; None for those that do not exist."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: getattr(tokenizer, key, None) for key in keys}


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
