"""Read a model's architecture from the `config.json` of a Hugging Face folder, or a similar dictionary.

There are four dialects: that of published MPTs and llm-foundry (`norm_eps`), that of transformers' own MPT
classes (`layer_norm_epsilon`, other defaults), ours (both keys), and that of MPT's first generation,
`mosaic_gpt`, where all keys are at the top level. An unknown key is an error: it could change the
mathematics. This module does not need torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mptfoundry.errors import AnotherModelError, CheckpointError
from mptfoundry.files import read_json
from mptfoundry.mpt.config import AttnConfig, InitConfig, MPTConfig, from_values
from mptfoundry.mpt.head_config import head_named

# Defaults of transformers' classes that differ from those of MPTConfig.
_NATIVE_DEFAULTS: dict[str, Any] = {"no_bias": True}
_NATIVE_ATTENTION_DEFAULTS: dict[str, Any] = {"alibi": True}

# Keys of the first generation -> today's path.
FLAT_KEYS: dict[str, str] = {
    "mlp_ratio": "expansion_ratio",
    "param_init_fn": "init_config.name",
    "attn_qk_ln": "attn_config.qk_ln",
    "attn_clip_qkv": "attn_config.clip_qkv",
    **{field.name: f"init_config.{field.name}" for field in fields(InitConfig) if field.name != "name"},
    **{field.name: f"attn_config.{field.name}" for field in fields(AttnConfig)},
}

# Keys that don't affect what a loaded model computes: its origin, name, initialization, runtime, generation.
_WITHOUT_EFFECT_TEXT = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path
    activation_checkpointing_target add_cross_attention
    architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    config_overrides cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty fc_type
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label init_device
    initializer_range is_decoder is_encoder_decoder label2id length_penalty llm_config load_in_4bit
    float8_recipe load_in_8bit loss_fn max_length min_length
    model_type name no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id peft_config prefix pretrained
    pretrained_model_name_or_path problem_type pruned_heads remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate revision sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class tokenizer_name top_k top_p torch_dtype
    torchscript transformers_version typical_p unk_token_id use_bfloat16 use_cache use_pad_tok_in_ffn
    verbose
"""
_WITHOUT_EFFECT = set(_WITHOUT_EFFECT_TEXT.split())
_WITHOUT_EFFECT_IN_ATTENTION = _WITHOUT_EFFECT | {"attn_impl", "norm_type", "tie_word_embeddings"}
_WITHOUT_EFFECT_IN_FFN = {"fc_type"}

# llm-foundry's latest additions, which MPT does not have, with the values that turn them off.
_OFF_IN_ATTENTION: tuple[tuple[str, Any], ...] = (
    ("nope", False),
    ("attn_temperature_tuning", {"attn_scale": 0.0, "floor_scale": 8192}),
)
_MODEL_TYPES = ("mpt", "mptfoundry", "mosaic_gpt")
_LARGEST_NUMBER = 2**31
_DEEPEST = 8


def config_of_folder(folder: Path) -> MPTConfig:
    """The architecture of a Hugging Face folder.

    Raises:
        CheckpointError: `config.json` is missing or damaged, belongs to another model, or has a key or value
            that MPT does not have.
    """
    values = read_json(folder, "config.json")
    file = folder / "config.json"
    model_type = values.get("model_type", "mpt")
    if model_type not in _MODEL_TYPES:
        raise AnotherModelError(f"{file}: model_type is {model_type!r}. Only MPT models are read.")
    return config_of_others(values, str(file))


def config_of_others(values: Mapping[str, Any], where: str) -> MPTConfig:
    """The architecture of a model that may come from llm-foundry, whose query and key norms differ from ours.

    Its `qk_ln` and `qk_gn` are layernorms with an epsilon of 1e-5 for any `norm_type` and `norm_eps`.
    """
    config = config_from_dict(values, where)
    has_their_norms = config.attn_config.qk_ln or config.attn_config.qk_gn
    agrees = config.norm_type.endswith("layernorm") and config.norm_eps == 1e-5
    has_our_code = values.get("model_type") == "mptfoundry"
    is_ours = has_our_code or "layer_norm_epsilon" in values
    if has_their_norms and not agrees and not is_ours:
        raise CheckpointError(
            f"{where}: qk_ln or qk_gn with norm_type: {config.norm_type} and norm_eps: {config.norm_eps}. "
            "llm-foundry computes these as layernorms with 1e-5 in any case, which is not supported here."
        )
    return config.with_plain_heads() if has_our_code else config


def config_from_dict(values: Mapping[str, Any], where: str) -> MPTConfig:
    """The architecture that `values` describes, in any of the dialects.

    Args:
        values: Keys of a `config.json`, or of the `model` section of a run's config.
        where: Prefix of every error.
    """
    _refuse_absurd(values, where)
    values = _from_first_generation(values, where)
    kind, head = _head_of(values)
    values = {key: value for key, value in values.items() if key not in _WITHOUT_EFFECT and key not in head}
    attention = dict(values.pop("attn_config", None) or {})
    epsilon = values.pop("layer_norm_epsilon", None)
    if epsilon is not None:
        if values.setdefault("norm_eps", epsilon) != epsilon:
            raise CheckpointError(
                f"{where}: norm_eps is {values['norm_eps']}, layer_norm_epsilon {epsilon}. They are the same."
            )
        values = {**_NATIVE_DEFAULTS, **values}
        attention = {**_NATIVE_ATTENTION_DEFAULTS, **attention}
    attention = {
        key: value
        for key, value in attention.items()
        if key not in _WITHOUT_EFFECT_IN_ATTENTION and (key, value) not in _OFF_IN_ATTENTION
    }
    ffn = dict(values.pop("ffn_config", None) or {})
    values["ffn_config"] = {k: v for k, v in ffn.items() if k not in _WITHOUT_EFFECT_IN_FFN}
    values["attn_config"] = attention
    values["init_config"] = _known_init(values.get("init_config") or {})
    try:
        return from_values(kind, {**values, **head})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _head_of(values: Mapping[str, Any]) -> tuple[type[MPTConfig], dict[str, Any]]:
    """The kind of network, from a run's `name` or a folder's `architectures`, and its head's keys."""
    classes = values.get("architectures")
    told = [values.get("name"), *(classes if isinstance(classes, list) else [])]
    kind = next((kind for kind in map(head_named, told) if kind is not None), None)
    if kind is None:
        return MPTConfig, {}
    own = {field.name for field in fields(kind)} - {field.name for field in fields(MPTConfig)} - {"name"}
    head = {key: values[key] for key in own if values.get(key) is not None}
    if isinstance(head.get("id2label"), dict):  # config.json has the labels' names, but not their number
        head.setdefault("num_labels", len(head["id2label"]))
    return kind, head


def _known_init(values: Mapping[str, Any]) -> dict[str, Any]:
    """The init scheme without unknown keys: it only matters for new weights."""
    known = {field.name for field in fields(InitConfig)}
    return {key: value for key, value in values.items() if key in known}


def _from_first_generation(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same values under today's keys."""
    values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    if (low_precision := values.pop("low_precision_layernorm", None)) is not None:
        values.setdefault("norm_type", "low_precision_layernorm" if low_precision else "layernorm")
        heads = values.get("n_heads")
        if values.get("alibi") and isinstance(heads, int) and heads & (heads - 1):
            raise CheckpointError(
                f"{where}: alibi with n_heads: {heads}, which is not a power of two. This generation of "
                "models used other slopes there, which are not supported."
            )
    if (multiquery := values.pop("multiquery_attention", None)) is not None:
        values["attn_type"] = "multiquery_attention" if multiquery else "multihead_attention"
    for old, new in FLAT_KEYS.items():
        if old not in values:
            continue
        section, _, key = new.rpartition(".")
        value, target = values.pop(old), values
        if section:
            target = values[section] = values.get(section) or {}
        if target.setdefault(key, value) != value:
            raise CheckpointError(f"{where}: {old} is {value}, {new} {target[key]}. They are the same.")
    return values


def _refuse_absurd(values: Mapping[str, Any], where: str, depth: int = 0) -> None:
    """Raise CheckpointError for impossible values before anything is computed with them."""
    if not depth:
        for name in ("attn_config", "ffn_config", "init_config"):
            if values.get(name) is not None and not isinstance(values[name], Mapping):
                raise CheckpointError(f"{where}: {name}: {values[name]!r} is not a section.")
    if depth > _DEEPEST:
        raise CheckpointError(f"{where[:200]}: refused, since it is nested too deeply.")
    for key, value in values.items():
        if isinstance(value, Mapping):
            _refuse_absurd(value, f"{where}: {key}", depth + 1)
        elif isinstance(value, (int, float)) and not abs(value) < _LARGEST_NUMBER:
            raise CheckpointError(
                f"{where}: {key}: {str(value)[:40]} is refused. No model has such a number."
            )
