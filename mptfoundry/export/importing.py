"""Import a foreign model as a Hugging Face folder: any MPT folder, and llm-foundry's checkpoints.

The result is what `export` writes for our own models, in float32, so training, evaluation and generation read
it in the same way. We run no code of the source, and unpickle only tensors and plain values.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mptfoundry.architecture.dialects import config_from_dict, config_of_others
from mptfoundry.architecture.hub import locate
from mptfoundry.architecture.of_run import architecture_of, differing
from mptfoundry.architecture.pretrained import NAMED, fill_architecture
from mptfoundry.checkpoints.reading import open_model, with_overrides
from mptfoundry.checkpoints.source import ModelSource
from mptfoundry.checkpoints.staging import staged
from mptfoundry.config.engine.read_document import read_document
from mptfoundry.config.legacy import translate
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.export.folder import NAMES, ExportSummary, write_folder
from mptfoundry.export.native import native_config, why_not_native
from mptfoundry.export.shards import DTYPES
from mptfoundry.files import read_json, refuse_what_is_there
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.head_config import HeadConfig
from mptfoundry.tokenizer import count_ids, load_tokenizer, vocabulary_problem

# The tokenizer files that a checkpoint may include.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class ImportSummary:
    """What an import wrote.

    Attributes:
        written: The folder.
        source: The source, as the user named it.
        config: The architecture as written.
        rows: Number of stored rows of the embedding.
        has_tokenizer: Whether the folder has a tokenizer.
    """

    written: ExportSummary
    source: str
    config: MPTConfig
    rows: int
    has_tokenizer: bool

    def __str__(self) -> str:
        lines = [
            str(self.written),
            f"source: {self.source}",
            "weights only: optimizer state, schedule and step count are not carried over",
        ]
        rows = self.config.vocab_size
        if rows > self.rows:
            lines.append(f"embedding: {self.rows:,} rows padded to {rows:,} with their mean")
        elif rows < self.rows:
            lines.append(f"embedding: the last {self.rows - rows:,} of {self.rows:,} rows cut off")
        if not self.has_tokenizer:
            lines.append(
                "tokenizer: there is none; evaluation and generation need one, named with tokenizer="
            )
        lines.append(f"train from it: model.pretrained_model_name_or_path={self.written.folder}")
        return "\n".join(lines)


def import_model(
    source: str,
    out: str | Path,
    *,
    revision: str | None = None,
    config: str | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    dtype: str = "fp32",
    verify: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> ImportSummary:
    """Write a foreign model as a Hugging Face folder, atomically, one tensor at a time.

    Arguments are ImportConfig's, and `progress` shows a progress bar in bytes.

    Raises:
        CheckpointError: The source can't be read, is not an MPT, its weights don't fit its config, or the
            written folder doesn't give its logits.
        ConfigError: The tokenizer can't be read or has more ids than the model has rows.
    """
    out = Path(out)
    refuse_what_is_there(out, overwrite=overwrite, names=NAMES, source=source)
    with staged(source, out, None, progress=progress) as place, tempfile.TemporaryDirectory() as carried:
        path = locate(str(place), revision)
        opened = open_model(path, None if config is None else _config_in(Path(config)), verify=verify)
        model = with_overrides(opened, config_overrides or {})
        text = _tokenizer_of(model, tokenizer, Path(carried))
        lost = _lost_in_native(model.config, text, DTYPES[dtype])
        written = write_folder(
            model, out, text, DTYPES[dtype], format="custom" if lost else "auto",
            origin=_origin(source, path, has_tokenizer=text is not None), allow_absurd=not verify,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if lost:
        written = replace(written, format=f"custom, since a native config.json can't hold {', '.join(lost)}")
    return ImportSummary(written, source, model.config, opened.config.vocab_size, text is not None)


def _config_in(path: Path) -> MPTConfig:
    """Read the architecture from a file or a folder; llm-foundry's YAMLs are supported."""
    if path.suffix == ".json":
        return config_of_others(read_json(path.parent, path.name), str(path))
    if path.suffix not in (".yaml", ".yml"):
        return architecture_of(path)
    document = read_document(path, [])
    translate(document)
    if isinstance(document.get(NAMED), str):
        fill_architecture(document)
    document.raise_problems()
    model = document.tree.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: has no section `model`.")
    if model.get("max_seq_len") is None and "max_seq_len" in document.tree:
        model["max_seq_len"] = document.tree["max_seq_len"]
    return config_of_others(model, f"{path}: model")


def _lost_in_native(config: MPTConfig, tokenizer: Any, dtype: torch.dtype) -> list[str]:
    """List what a native folder of this model would lose, such as dropout: keys with their values.

    It doesn't affect the logits, but it affects a run that starts from the folder.
    """
    if isinstance(config, HeadConfig) or why_not_native(config):
        return []
    kept = config_from_dict(native_config(config, tokenizer, dtype), "config.json")
    return [f"{'.'.join(path)}: {value}" for path, _, value in differing(kept, config.to_dict())]


def _origin(source: str, path: Path, *, has_tokenizer: bool) -> str:
    """Say where the model came from: a name on the hub with its commit, or the last part of another path."""
    name = f"{source} at {path.name}" if path.parent.name == "snapshots" else Path(source).name
    text = f"Imported from {name}."
    return text if has_tokenizer else f"{text} It came without a tokenizer: use the one it was trained with."


def _tokenizer_of(model: ModelSource, name: str | None, carried: Path) -> Any:
    """Load the named tokenizer, or the model's own, or the one in its checkpoint; None if there is none."""
    if name is None and model.tokenizer_folder is None:
        _write_carried(model, carried)
        name = str(carried) if any(carried.iterdir()) else None
    elif name is None:
        name = str(model.tokenizer_folder)
    if name is None:
        return None
    tokenizer = load_tokenizer(name, max_seq_len=model.config.max_seq_len)
    if problem := vocabulary_problem(count_ids(tokenizer), model.config.vocab_size):
        raise ConfigError(f"config_overrides.vocab_size: {problem}")
    return tokenizer


def _write_carried(model: ModelSource, folder: Path) -> None:
    """Write the tokenizer files that llm-foundry puts into its checkpoints, and no other files."""
    note = getattr(model.weights, "note", None)
    for name, carried in (note("tokenizer") if note is not None else {}).items():
        content = carried.get("content") if isinstance(carried, dict) else None
        if name in _TOKENIZER_FILES and isinstance(content, dict):
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
