"""A run or a checkpoint into a Hugging Face folder that stock transformers loads without custom code.

transformers' own MPT classes express a part of what MPT can be, and ignore the rest of a config in silence.
So what they express stands in one table here; a model outside it is refused. After writing, the folder is
loaded back and its logits are compared with the checkpoint's; a folder that fails never gets its name.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mptfoundry.checkpoints.reading import ModelSource, expected_shapes, open_model, tokenizer_of
from mptfoundry.checkpoints.weights import EMBEDDING
from mptfoundry.checkpoints.writing import refuse_what_is_there, whole_or_absent
from mptfoundry.errors import CheckpointError
from mptfoundry.export.card import model_card
from mptfoundry.export.comparison import Comparison, compare_logits
from mptfoundry.export.shards import write_shards
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.flops import count_parameters
from mptfoundry.tokenizer import check_tokenizer, load_tokenizer

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}

# What transformers' MPT classes compute: (key, what it must be, whether it is).
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


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote.

    Attributes:
        folder: Where.
        parameters: Of the model.
        dtype: Of the weights.
        weight_bytes: In all weight files together.
        weight_files: How many they are.
        seconds: That writing took, without the comparison.
        comparison: Of the logits.
    """

    folder: Path
    parameters: int
    dtype: torch.dtype
    weight_bytes: int
    weight_files: int
    seconds: float
    comparison: Comparison

    def __str__(self) -> str:
        speed = self.weight_bytes / 2**20 / max(self.seconds, 1e-9)
        return (
            f"{self.folder}: {self.parameters:,} parameters as {str(self.dtype).removeprefix('torch.')} in "
            f"{self.weight_files} file{'s' * (self.weight_files > 1)}, {self.weight_bytes:,} bytes, "
            f"{speed:,.0f} MiB/s.\n{self.comparison}"
        )


def export(
    path: str | Path,
    out: str | Path,
    *,
    dtype: str | None = "bf16",
    tokenizer: str | None = None,
    shard_bytes: int = 5_000_000_000,
    license: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    memory_bytes: int | None = None,
) -> ExportSummary:
    """Write a model as a Hugging Face folder for transformers' own MPT classes, 4.51 and later.

    Args:
        path: A run folder, a checkpoint, or a Hugging Face folder.
        out: The folder to write; there whole or not at all.
        dtype: A key of `DTYPES`; None: as stored.
        tokenizer: Folder or hub name. Default: the run's.
        shard_bytes: Largest weight file.
        license: For the model card, by its SPDX name.
        overwrite: Replace a folder that is there.
        progress: Show a bar over the bytes.
        memory_bytes: For the comparison; see `compare_logits`.

    Raises:
        CheckpointError: The model can't be read, is outside what the classes express (all reasons are
            listed), or the written folder doesn't give the checkpoint's logits.
    """
    out = Path(out)
    refuse_what_is_there(out, overwrite=overwrite)
    source = open_model(path)
    if reasons := why_not_native(source.config):
        raise CheckpointError(
            f"{path}: transformers' own MPT classes can't express this model, and would compute something "
            f"else: {'; '.join(reasons)}."
        )
    chosen = DTYPES[dtype] if dtype is not None else source.weights.outlines[EMBEDDING].dtype
    text = _tokenizer_for(source, tokenizer)
    _check_space(out, count_parameters(source.config) * chosen.itemsize)

    started_at = time.perf_counter()
    with whole_or_absent(out, overwrite=overwrite) as folder:
        folder.mkdir()
        files = _write_weights(source, folder, chosen, shard_bytes, progress)
        seconds = time.perf_counter() - started_at
        _write_the_rest(source, folder, text, chosen)
        card = model_card(out.name, source, chosen, license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        comparison = compare_logits(source, folder, text, chosen, memory_bytes=memory_bytes)
        sizes = [file.stat().st_size for file in files]
    return ExportSummary(
        out, count_parameters(source.config), chosen, sum(sizes), len(files), seconds, comparison
    )


def why_not_native(config: MPTConfig) -> list[str]:
    """Every switch that transformers' MPT classes ignore or can't express; empty for a model they do."""
    values = config.to_dict()
    reasons = []
    for key, allowed, holds in NATIVE_RULES:
        if not holds(config):
            value: Any = values
            for part in key.split("."):
                value = value[part]
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            reasons.append(f"{key} is {shown}, they compute {allowed}")
    return reasons


def native_config(config: MPTConfig, tokenizer: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json`, to the type of each number.

    transformers 5 checks types: `attn_pdrop` and `alibi_bias_max` must be integers, `clip_qkv` and
    `softmax_scale` floats or null, `expansion_ratio` an integer, `embedding_fraction` a float. It and older
    versions read `layer_norm_epsilon`; MPT's own code and other converters read `norm_eps`.
    """
    attention = config.attn_config
    return {
        "architectures": ["MPTForCausalLM"],
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
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _generation_config(tokenizer: Any) -> dict[str, Any]:
    """The default of `use_cache` in MPT's config is false: generation without a cache."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad,
        "use_cache": True,
    }


def _write_weights(
    source: ModelSource, folder: Path, dtype: torch.dtype, shard_bytes: int, progress: bool
) -> list[Path]:
    shapes = expected_shapes(source.config)
    total = count_parameters(source.config) * dtype.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
        return write_shards(folder, shapes, source.tensors(dtype), dtype, shard_bytes, bar.update)


def _write_the_rest(source: ModelSource, folder: Path, tokenizer: Any, dtype: torch.dtype) -> None:
    _write_json(folder / "config.json", native_config(source.config, tokenizer, dtype))
    _write_json(folder / "generation_config.json", _generation_config(tokenizer))
    _write_tokenizer(folder, tokenizer, source.config.max_seq_len)


def _write_tokenizer(folder: Path, tokenizer: Any, max_seq_len: int) -> None:
    """The tokenizer's files, such that `generate(**tokenizer(text))` works in every version."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    values["model_input_names"] = ["input_ids", "attention_mask"]
    values["model_max_length"] = max_seq_len
    for key in ("auto_map", "name_or_path", "backend"):
        values.pop(key, None)
    _write_json(file, values)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_for(source: ModelSource, name: str | None) -> Any:
    """The tokenizer that was named, or the model's own; raises if there is none or it doesn't fit."""
    named = load_tokenizer(name, max_seq_len=source.config.max_seq_len) if name else None
    tokenizer = named if named is not None else tokenizer_of(source)
    if tokenizer is None:
        raise CheckpointError(f"{source.path}: no tokenizer beside it. Name one: tokenizer=FOLDER.")
    check_tokenizer(tokenizer, source.config.vocab_size)
    return tokenizer


def _check_space(out: Path, needed: int) -> None:
    """Raise CheckpointError if the weights won't fit on the disk."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{out}: the weights take {needed:,} bytes, {free:,} are free on that disk. "
            "Free some, or name another."
        )
