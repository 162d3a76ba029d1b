"""What changed in a run's config and data between its checkpoint and this start, and which changes are
refused.

Some keys make the run: with other values it would be a different run, and nothing in its curves would show
that. They may change only if `allow_changes` names them. All other keys may change, and the changes are
printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mptfoundry.checkpoints.checkpoint import checkpoint_at
from mptfoundry.config.engine.plain_yaml import from_text
from mptfoundry.config.load import load_saved_config, to_yaml, values_by_key
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import CheckpointError, ConfigError, first_line

# The key of a checkpoint that holds its notes about the run.
RUN = "run"
# A run with another value of one of these keys is a different run; `*` is the name of a stream.
MAKES_THE_RUN: dict[str, str] = {
    "": (
        "seed max_seq_len global_train_batch_size accumulate_train_batch_on_tokens train_subset_num_batches"
    ),
    "model": (
        "d_model n_heads n_layers head_dim expansion_ratio max_seq_len vocab_size resid_pdrop "
        "emb_pdrop learned_pos_emb logit_scale no_bias attention_bias embedding_fraction norm_type "
        "norm_eps tie_word_embeddings final_logit_softcapping name load_in_8bit load_in_4bit float8_recipe "
        "num_labels id2label problem_type classifier_dropout"
    ),
    "model.attn_config": (
        "attn_type attn_pdrop qk_ln qk_gn fused_qkv clip_qkv softmax_scale attn_uses_sequence_id "
        "sliding_window_size attn_logit_softcapping alibi alibi_bias_max rope rope_theta rope_impl "
        "kv_n_heads prefix_lm"
    ),
    "model.attn_config.rope_dail_config": "type pos_idx_in_fp32 xpos_scale_base",
    "model.attn_config.rope_hf_config": "type factor",
    "model.ffn_config": "ffn_type ffn_hidden_size",
    "model.ffn_config.ffn_act_fn": "name approximate",
    "model.init_config": (
        "name fan_mode init_nonlinearity init_div_is_residual emb_init_std emb_init_uniform_lim "
        "init_std init_gain"
    ),
    "model.peft_config": "peft_type task_type r lora_alpha lora_dropout target_modules use_rslora bias",
    "tokenizer": "name kwargs",
    "train_loader": "name drop_last",
    "train_loader.dataset.streams.*": (
        "remote local split proportion repeat choose hf_name hf_kwargs preprocessing_fn"
    ),
    "train_loader.dataset": (
        "remote local split max_seq_len shuffle shuffle_seed shuffle_algo shuffle_block_size "
        "num_canonical_nodes epoch_size partition_algo sampling_method sampling_granularity "
        "batching_method replication allow_unsafe_types token_encoding_type special_tokens "
        "eos_token_id bos_token_id hf_name fields hf_kwargs preprocessing_fn decoder_only_format "
        "target_prompts target_responses packing_ratio allow_pad_trimming max_dropped"
    ),
    "optimizer": "name lr betas weight_decay disable_grad param_groups eps amsgrad momentum_dtype",
}
# All other keys: lengths, locations, hardware, reporting, and how something is computed or fetched. A section
# listed here as a whole includes all keys in it.
MAY_CHANGE: dict[str, str] = {
    "": (
        "run_name algorithms max_duration device_train_microbatch_size device_eval_batch_size "
        "spin_dataloaders eval_interval eval_first eval_subset_num_batches precision "
        "icl_tasks eval_gauntlet icl_seq_len icl_subset_num_batches keep_best "
        "max_split_size_mb expandable_segments cuda_load_lazy dist_timeout save_folder save_interval "
        "save_num_checkpoints_to_keep save_overwrite save_weights_only save_filename "
        "save_latest_filename save_ignore_keys save_async autoresume resume_past_damage allow_changes "
        "load_path load_weights_only load_strict_model_weights load_ignore_keys callbacks loggers "
        "progress_bar log_to_console console_log_interval log_config python_log_level metadata "
        "code_paths code_hashes allow_code variables eval_loader eval_metrics scheduler fsdp_config "
        "compile_config"
    ),
    "model.attn_config": "attn_impl alibi_skips",
    "optimizer": "fused bf16_weights",
    "model": (
        "loss_fn init_device pretrained_model_name_or_path revision pretrained config_overrides "
        "activation_checkpointing_target"
    ),
    "train_loader.dataset.streams.*": "download_retry download_timeout validate_hash keep_zip",
    "train_loader.dataset": (
        "predownload cache_limit download_retry download_timeout verify validate_hash keep_zip "
        "safe_load max_bad_records cache_folder"
    ),
    "train_loader": "label num_workers pin_memory prefetch_factor persistent_workers timeout",
}


def listed_keys(table: Mapping[str, str]) -> set[str]:
    """Return the dotted keys of one of these tables."""
    return {f"{section}.{name}".lstrip(".") for section, names in table.items() for name in names.split()}


_MAKES, _FREE = listed_keys(MAKES_THE_RUN), listed_keys(MAY_CHANGE)
# The first and the last key of a saved config, in every version.
_ENDS_OF_A_RUNS = ("run_name", "variables")
# Keys that decide which examples share a row, and which rows an epoch has.
_MAKES_ROWS = re.compile(r"(seed|max_seq_len|tokenizer|train_loader(\.dataset)?)(\..*)?")
_LOCAL = re.compile(r"train_loader\.dataset(\.streams\.[^.]+)?\.local")


@dataclass(frozen=True)
class RunNotes:
    """What a checkpoint records about its run.

    Attributes:
        config: The resolved config as YAML, as in the run's `config.yaml`.
        fingerprints: The content of each stream and of the tokenizer, as hexadecimal digits by its key in the
            config; see `config.changes.changed_inputs`.
        fused: The optimizer's step was the fused one.
    """

    config: str
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    fused: bool = False

    def to_text(self) -> str:
        """Return the notes in the form that the checkpoint stores."""
        return json.dumps(asdict(self))


def read_notes(checkpoint: Path) -> RunNotes | None:
    """Read a checkpoint's notes about its run; None if an older version or another program wrote it.

    Raises:
        CheckpointError: It is damaged, or loading it would run code.
    """
    text = checkpoint_at(checkpoint).value(RUN)
    if text is None:
        return None
    try:
        values = json.loads(text)
        config, fingerprints = values["config"], values["fingerprints"]
        if not all(isinstance(each, str) for each in (config, *fingerprints.values())):
            raise TypeError("not texts")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint}: is damaged: its record of the run can't be read.") from error
    return RunNotes(config, fingerprints, fused=values.get("fused") is True)


@dataclass(frozen=True)
class Change:
    """One changed key of the config; None stands for a key that is not set."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {_show(self.before)} -> {_show(self.after)}"

    def refusal(self, place: Path) -> str:
        """Say in an error where the two values are."""
        return f"{self.key}: {_show(self.before)} in the run of {place}, {_show(self.after)} here."


@dataclass(frozen=True)
class ChangedInput(Change):
    """A stream or the tokenizer with other content under the same key; values are fingerprints."""

    def __str__(self) -> str:
        return f"{self.key}: its content has changed ({self.before[:8]} -> {self.after[:8]})"

    def refusal(self, place: Path) -> str:
        """Say in an error where the two contents are."""
        return (
            f"{self.key}: its content is not what the run of {place} read (fingerprint "
            f"{self.after[:8]}, then {self.before[:8]})."
        )


def changed_inputs(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    """List the inputs whose content differs from before under the same key, sorted by key."""
    keys = sorted(before.keys() & after.keys())
    return [ChangedInput(key, before[key], after[key]) for key in keys if before[key] != after[key]]


def changes_since(path: Path, config: TrainConfig) -> list[Change]:
    """List the keys whose values in a run's `config.yaml` differ from those of `config`, sorted by name.

    Raises:
        ConfigError: The file is damaged.
    """
    saved_config(path)
    try:
        # A file from an older version lacks newer keys; their defaults are not changes.
        there = to_yaml(load_saved_config(path))
    except ConfigError:
        there = path.read_text()
    here = to_yaml(config)
    before, after = values_by_key(there), values_by_key(here)
    keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    opened = {parent for key in keys for parent in _parents(key)}
    return [Change(key, before.get(key), after.get(key)) for key in keys if key not in opened]


def saved_config(path: Path) -> dict[str, Any]:
    """Read a run's `config.yaml`.

    Raises:
        ConfigError: It is damaged, or cut short.
    """
    try:
        saved = from_text(path.read_text(encoding="utf-8"))
    except Exception as error:  # from YAML, or decoding
        raise _damaged(path, first_line(error)) from error
    first, last = _ENDS_OF_A_RUNS
    if not saved or not isinstance(saved, dict) or (first in saved and not isinstance(saved.get(last), dict)):
        raise _damaged(path, "it is cut short")
    return {str(key): value for key, value in saved.items()}


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"save_folder: {path} is damaged ({reason}), and can't be compared with this start's config. "
        "Restore it, or remove it to continue without that comparison."
    )


def refuse_changes(changes: Sequence[Change], config: TrainConfig, place: Path) -> None:
    """Raise ConfigError for changes that would make this a different run, unless they are allowed."""
    refused = [
        change for change in changes if makes_the_run(change.key, config) and not is_allowed(change, config)
    ]
    if not refused:
        return
    keys = ",".join(change.key for change in refused)
    lines = [change.refusal(place) for change in refused]
    raise ConfigError(
        "\n".join(lines)
        + f"\nThe run would continue as a different one. Restore {'it' if len(refused) == 1 else 'them'}, "
        f"use another run_name, or set allow_changes=[{keys}]."
    )


def makes_the_run(key: str, config: TrainConfig) -> bool:
    """Whether a run with another value of a key is a different run."""
    if _LOCAL.fullmatch(key) and _is_a_cache(key, config):
        return False
    place = re.sub(r"(\.streams\.)[^.]+", r"\1*", key)
    while place:
        if place in _MAKES or place in MAKES_THE_RUN:  # a section: the key is from an older version
            return True
        if place in _FREE:
            return False
        place = place.rpartition(".")[0]
    return False


def is_allowed(change: Change, config: TrainConfig) -> bool:
    """Whether `allow_changes` names the key, or a section that contains it."""
    return any(f"{change.key}.".startswith(f"{allowed}.") for allowed in config.allow_changes)


def allows_other_rows(config: TrainConfig) -> bool:
    """Whether `allow_changes` names something that changes the rows of an epoch."""
    return any(map(_MAKES_ROWS.fullmatch, config.allow_changes))


def _is_a_cache(key: str, config: TrainConfig) -> bool:
    """Whether a `local` folder is only a cache of a `remote`."""
    value: Any = config
    for step in key.split(".")[:-1]:
        value = value.get(step) if isinstance(value, Mapping) else getattr(value, step, None)
    return getattr(value, "remote", None) is not None


def _parents(key: str) -> Iterator[str]:
    steps = key.split(".")
    for length in range(1, len(steps)):
        yield ".".join(steps[:length])


def _show(value: Any) -> str:
    return "not given" if value is None else str(value)
