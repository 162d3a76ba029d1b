"""A model's architecture out of the `config.json` of a Hugging Face folder, or a dictionary of its kind.

Three dialects are understood: the published MPT's and llm-foundry's (`norm_eps`), that of transformers' own
MPT classes (`layer_norm_epsilon`, other defaults), and ours (both keys). A key that is not known is an error:
it could change the mathematics.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mptfoundry.errors import CheckpointError
from mptfoundry.mpt.config import InitConfig, MPTConfig, from_values

# What transformers' classes assume where their config.json is silent, and MPTConfig assumes otherwise.
_NATIVE_DEFAULTS: dict[str, Any] = {"no_bias": True}
_NATIVE_ATTENTION_DEFAULTS: dict[str, Any] = {"alibi": True}

# Keys without influence on what a loaded model computes: how it was made, named, drawn or run.
_WITHOUT_EFFECT = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "fc_type",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "init_device",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "loss_fn",
    "model_type",
    "name",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "prefix",
    "problem_type",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "tokenizer_name",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "use_pad_tok_in_ffn",
    "verbose",
}
_WITHOUT_EFFECT_IN_ATTENTION = _WITHOUT_EFFECT | {"attn_impl", "norm_type"}
_WITHOUT_EFFECT_IN_FFN = {"fc_type"}

# llm-foundry's latest additions, which MPT does not have, as it writes them where they are off.
_OFF_IN_ATTENTION: tuple[tuple[str, Any], ...] = (
    ("nope", False),
    ("attn_temperature_tuning", {"attn_scale": 0.0, "floor_scale": 8192}),
)
_MODEL_TYPES = ("mpt", "mptfoundry")


def config_of_folder(folder: Path) -> MPTConfig:
    """The architecture of a Hugging Face folder.

    Raises:
        CheckpointError: `config.json` is missing or damaged, is of another model, or holds a key or value
            that MPT does not have.
    """
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: config.json is missing.") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: can't be read ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: not a dictionary.")
    model_type = values.get("model_type", "mpt")
    if model_type not in _MODEL_TYPES:
        raise CheckpointError(f"{file}: model_type is {model_type!r}. Only MPT models are read.")
    return config_of_others(values, str(file))


def config_of_others(values: Mapping[str, Any], where: str) -> MPTConfig:
    """The architecture of a model that may come from llm-foundry, whose query and key norms differ from ours.

    There `qk_ln` and `qk_gn` are layernorms with an epsilon of 1e-5, whatever `norm_type` and `norm_eps` say.
    """
    config = config_from_dict(values, where)
    has_their_norms = config.attn_config.qk_ln or config.attn_config.qk_gn
    agrees = config.norm_type.endswith("layernorm") and config.norm_eps == 1e-5
    if has_their_norms and not agrees and "layer_norm_epsilon" not in values:
        raise CheckpointError(
            f"{where}: qk_ln or qk_gn beside norm_type: {config.norm_type} and norm_eps: {config.norm_eps}. "
            "llm-foundry computes these as layernorms with 1e-5 all the same, which can't be expressed here."
        )
    return config


def config_from_dict(values: Mapping[str, Any], where: str) -> MPTConfig:
    """The architecture that `values` describes, in any of the three dialects.

    Args:
        values: Keys of a `config.json`, or of the `model` section of a run's config.
        where: Begins every error.
    """
    values = {key: value for key, value in values.items() if key not in _WITHOUT_EFFECT}
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
        return from_values(MPTConfig, values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _known_init(values: Mapping[str, Any]) -> dict[str, Any]:
    """The init scheme, which matters for new weights only: what is not known is left out."""
    known = {field.name for field in fields(InitConfig)}
    return {key: value for key, value in values.items() if key in known}
