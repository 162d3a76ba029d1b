"""What changed in a run's config and in its data between its checkpoint and this start, and which changes are
refused.

Some keys make the run: with other values it would continue as a different run, and nothing in its curves
would show that. They may change only where `allow_changes` names them. All other keys may change, and are
shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mptfoundry.checkpoints.sharded import read_value
from mptfoundry.checkpoints.torch_files import load_plain
from mptfoundry.config.load import load_train_config, to_yaml
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import CheckpointError, ConfigError, first_line

# The key of a checkpoint under which its notes of the run lie.
RUN = "run"
# With another one of these the run is another run ...
_MAKES_THE_RUN = re.compile(
    r"(seed|max_seq_len|global_train_batch_size|accumulate_train_batch_on_tokens|train_subset_num_batches|"
    r"model|tokenizer|optimizer|train_loader\.name|train_loader\.drop_last|train_loader\.dataset)(\..*)?"
)
# ... except those that say how something is computed or fetched, and not what it is.
_MAKES_NO_DIFFERENCE = re.compile(
    r"model\.(loss_fn|init_device|pretrained\w*|revision|config_overrides|activation_checkpointing_target|"
    r"attn_config\.(attn_impl|alibi_skips))(\..*)?|"
    r"train_loader\.dataset(\.streams\.[^.]+)?\.(predownload|cache_limit|download_retry|download_timeout|"
    r"validate_hash|verify|keep_zip|cache_folder|safe_load|max_bad_records)"
)
# The first and the last key of what a run saves, whichever version has saved it.
_ENDS_OF_A_RUNS = ("run_name", "variables")
# What decides which examples share a row, and which rows an epoch has.
_MAKES_ROWS = re.compile(r"(seed|max_seq_len|tokenizer|train_loader(\.dataset)?)(\..*)?")
_LOCAL = re.compile(r"train_loader\.dataset(\.streams\.[^.]+)?\.local")


@dataclass(frozen=True)
class RunNotes:
    """What a run was.

    Attributes:
        config: The resolved config as YAML, as in the run's `config.yaml`.
        fingerprints: The content of each stream and of the tokenizer, as hexadecimal digits by its key in the
            config; see `config.changes.changed_inputs`.
    """

    config: str
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """What the checkpoint holds."""
        return json.dumps(asdict(self))


def read_notes(checkpoint: Path) -> RunNotes | None:
    """What a checkpoint remembers of its run; None if an older version or another program wrote it.

    Raises:
        CheckpointError: It is damaged, or loading it would run code.
    """
    if checkpoint.is_dir():
        text = read_value(checkpoint, RUN)
    else:
        content = load_plain(checkpoint)
        text = content.get(RUN) if isinstance(content, dict) else None
    if text is None:
        return None
    try:
        values = json.loads(text)
        config, fingerprints = values["config"], values["fingerprints"]
        if not all(isinstance(each, str) for each in (config, *fingerprints.values())):
            raise TypeError("not texts")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint}: damaged, what it notes of its run can't be read.") from error
    return RunNotes(config, fingerprints)


@dataclass(frozen=True)
class Change:
    """One key of the config; a value of None means that it is not given."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {_show(self.before)} -> {_show(self.after)}"

    def refusal(self, place: Path) -> str:
        """Where the values are, for an error."""
        return f"{self.key}: {_show(self.before)} in the run of {place}, {_show(self.after)} here."


@dataclass(frozen=True)
class ChangedInput(Change):
    """A stream or the tokenizer with other content under the same key; values are fingerprints."""

    def __str__(self) -> str:
        return f"{self.key}: has other content than before ({self.before[:8]} -> {self.after[:8]})"

    def refusal(self, place: Path) -> str:
        """Where the content is which, for an error."""
        return (
            f"{self.key}: its content is not what the run of {place} has read (fingerprint "
            f"{self.after[:8]}, then {self.before[:8]})."
        )


def changed_inputs(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    """What has other content than before, of what is read by the same key; by the keys' order."""
    keys = sorted(before.keys() & after.keys())
    return [ChangedInput(key, before[key], after[key]) for key in keys if before[key] != after[key]]


def changes_since(path: Path, config: TrainConfig) -> list[Change]:
    """The keys whose values in a run's `config.yaml` are not those of `config`, by their names' order.

    Raises:
        ConfigError: The file is damaged.
    """
    saved_config(path)
    try:
        # A file of an older version lacks keys that are new since; their defaults are not changes.
        there = to_yaml(load_train_config(path, ["allow_code=true"])[0])
    except ConfigError:
        there = path.read_text()
    here = to_yaml(config)
    before, after = (dict(_leaves(OmegaConf.to_container(OmegaConf.create(text)))) for text in (there, here))
    keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    opened = {parent for key in keys for parent in _parents(key)}
    return [Change(key, before.get(key), after.get(key)) for key in keys if key not in opened]


def saved_config(path: Path) -> dict[str, Any]:
    """What a run's `config.yaml` says.

    Raises:
        ConfigError: It is damaged, or cut short.
    """
    try:
        saved = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
    except Exception as error:  # a YAML's, OmegaConf's, or one of decoding
        raise _damaged(path, first_line(error)) from error
    first, last = _ENDS_OF_A_RUNS
    if not saved or not isinstance(saved, dict) or (first in saved and not isinstance(saved.get(last), dict)):
        raise _damaged(path, "it is cut short")
    return {str(key): value for key, value in saved.items()}


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"save_folder: {path} is damaged ({reason}), so that what has changed since the checkpoint can't be "
        "told. Restore it, or remove it to continue without that comparison."
    )


def refuse_changes(changes: Sequence[Change], config: TrainConfig, place: Path) -> None:
    """Raise ConfigError for changes that would make another run of it and that nobody has allowed."""
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
    return bool(_MAKES_THE_RUN.fullmatch(key)) and not _MAKES_NO_DIFFERENCE.fullmatch(key)


def is_allowed(change: Change, config: TrainConfig) -> bool:
    """Whether `allow_changes` names the key, or a section that it lies in."""
    return any(f"{change.key}.".startswith(f"{allowed}.") for allowed in config.allow_changes)


def allows_other_rows(config: TrainConfig) -> bool:
    """Whether `allow_changes` names something that changes the rows of an epoch."""
    return any(map(_MAKES_ROWS.fullmatch, config.allow_changes))


def _is_a_cache(key: str, config: TrainConfig) -> bool:
    """Whether a `local` only keeps what comes from a `remote`."""
    value: Any = config
    for step in key.split(".")[:-1]:
        value = value.get(step) if isinstance(value, Mapping) else getattr(value, step, None)
    return getattr(value, "remote", None) is not None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif path.split(".")[0] not in ("allow_changes", "variables"):
        yield path, value


def _parents(key: str) -> Iterator[str]:
    steps = key.split(".")
    for length in range(1, len(steps)):
        yield ".".join(steps[:length])


def _show(value: Any) -> str:
    return "not given" if value is None else str(value)
