"""A foreign model into a run of ours: any MPT folder in Hugging Face format, and llm-foundry's checkpoints.

The run's folder holds a Composer checkpoint of weights alone, `config.yaml` with the architecture, and the
tokenizer: what training, evaluation, generation and export read. No code of the source is run, and nothing
but tensors and plain values is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from mptfoundry.architecture.dialects import config_of_others
from mptfoundry.architecture.hub import locate
from mptfoundry.architecture.of_run import RUN_CONFIG, architecture_of
from mptfoundry.checkpoints.reading import open_model, with_overrides
from mptfoundry.checkpoints.source import ModelSource, expected_shapes
from mptfoundry.checkpoints.staging import check_space, staged
from mptfoundry.config.engine.read_document import read_document
from mptfoundry.config.legacy import translate
from mptfoundry.config.pretrained import fill_architecture
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.export.composer_file import write_composer_file
from mptfoundry.export.shards import DTYPES
from mptfoundry.files import read_json, refuse_what_is_there, whole_or_absent
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.flops import count_parameters
from mptfoundry.tokenizer import count_ids, load_tokenizer, vocabulary_problem

CHECKPOINT = "ep0-ba0-rank0.pt"
# What an import writes; what `overwrite` replaces holds nothing else, such as a run's own metrics.
_NAMES = (CHECKPOINT, RUN_CONFIG, "tokenizer")
# The files of a tokenizer that a checkpoint may carry along.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class ImportSummary:
    """What an import wrote.

    Attributes:
        folder: Where.
        source: What was read, as it was named.
        config: The architecture as written.
        rows: Rows of the embedding that were stored.
        dtype: Of the weights as written.
        tokenizer: Whether one was found.
    """

    folder: Path
    source: str
    config: MPTConfig
    rows: int
    dtype: str
    tokenizer: bool

    def __str__(self) -> str:
        config = self.config
        lines = [
            f"{self.folder}: {count_parameters(config):,} parameters in {self.dtype}, from {self.source}",
            "weights only: optimizer state, schedule and step count are not carried over",
        ]
        if config.vocab_size > self.rows:
            lines.append(f"embedding: {self.rows:,} rows padded to {config.vocab_size:,} with their mean")
        elif config.vocab_size < self.rows:
            lines.append(
                f"embedding: the last {self.rows - config.vocab_size:,} of {self.rows:,} rows cut off"
            )
        if not self.tokenizer:
            lines.append(
                "tokenizer: there is none; evaluation and generation need one, named with tokenizer="
            )
        lines.append(f"train from it: model.pretrained_model_name_or_path={self.folder}")
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
    """Write a model as the folder of a run, whole or not at all; one tensor is in memory at a time.

    Arguments are ImportConfig's, and `progress` shows a bar over the bytes.

    Raises:
        CheckpointError: The source can't be read, is no MPT, or its weights don't fit its config.
        ConfigError: The tokenizer can't be read or has more ids than the model has rows.
    """
    out = Path(out)
    refuse_what_is_there(out, overwrite=overwrite, names=_NAMES, source=source)
    with staged(source, out, None, progress=progress) as place:
        path = locate(str(place), revision)
        found = open_model(path, None if config is None else _config_in(Path(config)), verify=verify)
        rows = found.config.vocab_size
        found = with_overrides(found, config_overrides or {})
        shapes, number = expected_shapes(found.config), DTYPES[dtype]
        total = count_parameters(found.config) * number.itemsize
        check_space(out, total, "the weights take")
        with whole_or_absent(out, overwrite=overwrite) as folder:
            folder.mkdir()
            has_tokenizer = _write_tokenizer(found, tokenizer, folder / "tokenizer")
            (folder / RUN_CONFIG).write_text(_run_config(found.config, source, path), encoding="utf-8")
            with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
                write_composer_file(folder / CHECKPOINT, shapes, found.tensors(number), number, bar.update)
            open_model(folder)
    return ImportSummary(out, source, found.config, rows, dtype, has_tokenizer)


def _config_in(path: Path) -> MPTConfig:
    """The architecture that a file or a folder tells; llm-foundry's YAMLs are understood."""
    if path.suffix == ".json":
        return config_of_others(read_json(path.parent, path.name), str(path))
    if path.suffix not in (".yaml", ".yml"):
        return architecture_of(path)
    document = read_document(path, [])
    translate(document)
    fill_architecture(document)
    document.raise_problems()
    model = document.tree.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: has no section `model`.")
    if model.get("max_seq_len") is None and "max_seq_len" in document.tree:
        model["max_seq_len"] = document.tree["max_seq_len"]
    return config_of_others(model, f"{path}: model")


def _run_config(config: MPTConfig, source: str, path: Path) -> str:
    """As a run's own: the architecture, and where it came from."""
    model = {"name": "mpt_causal_lm", **json.loads(json.dumps(config.to_dict()))}
    origin = (
        {"source": source, "snapshot": path.name} if path.parent.name == "snapshots" else {"source": source}
    )
    run = {"max_seq_len": config.max_seq_len, "model": model, "metadata": {"imported_from": origin}}
    return yaml.safe_dump(run, sort_keys=False)


def _write_tokenizer(found: ModelSource, name: str | None, folder: Path) -> bool:
    """Save the tokenizer that was named, or the model's own, beside the model; False if there is none."""
    if name is None and found.tokenizer_folder is None:
        _write_carried(found, folder)
        name = str(folder) if folder.is_dir() else None
    elif name is None:
        name = str(found.tokenizer_folder)
    if name is None:
        return False
    tokenizer: Any = load_tokenizer(name, max_seq_len=found.config.max_seq_len)
    if problem := vocabulary_problem(count_ids(tokenizer), found.config.vocab_size):
        raise ConfigError(f"config_overrides.vocab_size: {problem}")
    tokenizer.save_pretrained(folder)
    return True


def _write_carried(found: ModelSource, folder: Path) -> None:
    """The files of the tokenizer that llm-foundry puts into its checkpoints; others of any name are left."""
    note = getattr(found.weights, "note", None)
    for name, carried in (note("tokenizer") if note is not None else {}).items():
        content = carried.get("content") if isinstance(carried, dict) else None
        if name in _TOKENIZER_FILES and isinstance(content, dict):
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
