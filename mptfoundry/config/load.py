"""From a YAML file and `key=value` words to a checked, frozen configuration, and back to YAML."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from mptfoundry import plugins
from mptfoundry.architecture.of_run import RUN_CONFIG, read_run, run_of
from mptfoundry.architecture.pretrained import NAMED, fill_architecture
from mptfoundry.config.engine.document import Document, KeyPath, Origin, dotted, parse_key
from mptfoundry.config.engine.nested import leaves, mapped
from mptfoundry.config.engine.plain_yaml import from_text, to_text
from mptfoundry.config.engine.read_document import read_document
from mptfoundry.config.engine.schema import default_of, field_types
from mptfoundry.config.engine.secrets import REDACTED, FromEnvironment, redacted, redactions
from mptfoundry.config.engine.walk import build
from mptfoundry.config.legacy import OTHER_KINDS, REFUSED, top_level_variables, translate
from mptfoundry.config.optim import OwnScheduleConfig
from mptfoundry.config.rules import code_named, tokens_of
from mptfoundry.config.run import TrainConfig
from mptfoundry.config.tasks import GauntletConfig, TaskConfig, TaskFileConfig, missing_benchmarks
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.ranks import rank, say

T = TypeVar("T")
CONFIG_SUFFIXES = (".yaml", ".yml")
# Keys of a run that say how something is evaluated, and what it is.
_NO_EFFECT_WITHOUT = {
    "eval_interval": ("eval_loader", "icl_tasks"),
    "eval_first": ("eval_loader", "icl_tasks"),
    "eval_subset_num_batches": ("eval_loader",),
    "icl_seq_len": ("icl_tasks",),
    "icl_subset_num_batches": ("icl_tasks",),
}
_NOT_IN_EVALUATIONS = {
    "fsdp_config": "a model is sharded over several devices if its run was",
    "run_name": "results are named by the checkpoint",
    "python_log_level": "an evaluation prints warnings and its results",
    "log_config": "the results hold all settings",
    "metadata": "it is for a platform",
    "console_log_interval": "progress is shown anyway",
}


def load_train_config(
    path: str | Path, words: Sequence[str] = (), lacking: dict[str, str] | None = None
) -> tuple[TrainConfig, list[str]]:
    """Read the configuration of a training run; `key=value` words override the YAML file.

    The files of `code_paths` run first, if the words say `allow_code=true`.

    Returns:
        The configuration, and a line for each thing that was translated or that has no effect.

    Raises:
        ConfigError: All problems at once, each with its place.
    """
    name = os.environ.get("RUN_NAME") or os.environ.get("COMPOSER_RUN_NAME") or Path(path).stem
    document = read_document(path, words, {"run_name": name})
    if not {"model", "train_loader"} & document.tree.keys():
        _refuse_another_kind(document)
    _refuse_code_from_file(document)
    if document.tree.get("code_paths"):
        document.notes += _run_code(document, document.tree.get("code_hashes"), say)
    notes = [*document.notes, *translate(document)]
    if isinstance(document.get(NAMED), str):
        notes += fill_architecture(document, lacking)
    _share_top_level(document)
    config = build(TrainConfig, document, REFUSED) if lacking is None else _build_for_check(document, lacking)
    return config, notes + _effects(config)


def load_saved_config(path: str | Path, words: Sequence[str] = ()) -> TrainConfig:
    """Read the `config.yaml` of a run without running its code; names that only the code knows are not
    checked.

    Raises:
        ConfigError: All problems at once, each with its place.
    """
    document = read_document(path, words)
    document.has_unknown_names = bool(document.tree.get("code_paths"))
    document.put(("allow_code",), True, document.origin(()))
    translate(document)
    if isinstance(document.get(NAMED), str):
        fill_architecture(document, None)
    _share_top_level(document)
    return build(TrainConfig, document, REFUSED)


def _run_code(document: Document, saved: Any, say: Callable[[str], None]) -> list[str]:
    """Run the files of `code_paths` if the command line allows it.

    A run's config gets their hashes. `saved` holds those that a run has saved, if there are any.

    Returns:
        A line for each file that has changed since then.
    """
    given = document.tree.get("code_paths") or []
    paths = [str(path) for path in (given if isinstance(given, list) else [given])]
    if not paths or document.tree.get("allow_code") is not True or document.problems:
        document.has_unknown_names = bool(paths)
        return []
    hashes = plugins.run_code(paths, say)
    document.has_unknown_names = len(hashes) < len(paths)  # `check` says which files are missing
    notes = [
        f"code_paths: {path} has changed since the run saved its config (sha256 {saved[path]}, now {digest})."
        for path, digest in hashes.items()
        if isinstance(saved, dict) and str(saved.get(path, digest)) != digest
    ]
    if "model" in document.tree and isinstance(document.tree["model"], dict):
        origin = document.origin(("code_paths",))
        document.put(("code_hashes",), hashes, Origin(origin.place, origin.line))
    return notes


def _run_code_of_model(document: Document) -> None:
    """Run the files that the options of a verb name, or those of the run that its `model` belongs to."""
    model, named, saved = document.tree.get("model"), document.tree.get("code_paths"), {}
    if named is None and isinstance(model, str) and (folder := run_of(Path(model).expanduser())) is not None:
        with suppress(CheckpointError):
            saved = read_run(folder)
        paths = saved.get("code_paths") or []
        if paths and document.tree.get("allow_code") is True:
            document.put(("code_paths",), paths, Origin(str(folder / RUN_CONFIG), 0))
        elif paths:
            note = f"{', '.join(paths)} of {folder} does not run here; allow_code=true runs it."
            _say_aside(f"note: code_paths: {note}")
    for note in _run_code(document, saved.get("code_hashes"), _say_aside):
        _say_aside(f"note: {note}")
    if document.has_unknown_names and document.tree.get("allow_code") is True:
        text = "names a file that is missing here. Say where yours are: code_paths=[mine.py]."
        document.report(("code_paths",), text)


def _say_aside(text: str) -> None:
    """Print on rank 0, next to what the verb prints."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


def _build_for_check(document: Document, lacking: dict[str, str]) -> TrainConfig:
    """Build a config that is only checked: what only this machine or this command lacks (a base on the hub
    that can't be reached, permission to run code) is described in `lacking`, by key, and is not a problem.
    """
    if document.has(("allow_code",)):
        return build(TrainConfig, document, REFUSED)
    document.put(("allow_code",), True, document.origin(()))  # a check runs no code
    config = build(TrainConfig, document, REFUSED)
    lacking |= {str(key): text for key, text in code_named(config)}
    return config


def parse_words(words: Sequence[str], schema: type[T], path: str | Path | None = None) -> T:
    """Read the options of a verb from the command line, and from a YAML file where one is given.

    Raises:
        ConfigError: All problems at once.
    """
    document = read_document(path, words)
    options: Any = schema
    if "code_paths" in field_types(options):
        _run_code_of_model(document)
    return build(schema, document, REFUSED)


def load_evaluations(
    path: str | Path, words: Sequence[str] = (), lacking: dict[str, str] | None = None
) -> tuple[dict[str, EvalConfig], list[str]]:
    """Read a file that describes an evaluation, as llm-foundry's do: one or more models, and their tasks.

    Args:
        path: The YAML file.
        words: The command line's `key=value`.
        lacking: If given, a blank place of a model's weights is described here, by key, and is not a problem.

    Returns:
        The options of each model's evaluation by its name, and notes for the user.

    Raises:
        ConfigError: All problems at once, also of the files of tasks that it names.
    """
    document = read_document(path, words)
    _refuse_code_from_file(document)
    notes = list(document.notes)
    for key, because in _NOT_IN_EVALUATIONS.items():
        if document.take((key,)) is not None:
            notes.append(f"{document.origin((key,)).place}: {key} is left out: {because}.")
    _older_evaluation(document, notes)
    batches, size = document.take(("icl_subset_num_batches",)), document.get(("device_eval_batch_size",))
    if batches is not None and batches != -1:
        origin = document.origin(("icl_subset_num_batches",))
        limit = batches * size if isinstance(size, int) and isinstance(batches, int) else batches
        document.put(("limit",), limit, origin)
        notes.append(f"{origin.place}: icl_subset_num_batches is now limit: {limit} documents of each task.")
    models = document.tree.get("models")
    entries: list[KeyPath] = [("models", n) for n in range(len(models))] if isinstance(models, list) else [()]
    evaluations = {}
    for entry in entries:
        one = deepcopy(document)
        name = _take_model(one, entry, lacking)
        one.take(("models",))
        _run_code_of_model(one)
        evaluations[name] = build(EvalConfig, one, REFUSED)
        tasks_of(evaluations[name])
    return evaluations, notes


def _older_evaluation(document: Document, notes: list[str]) -> None:
    """Names that other values refer to, and one checkpoint for the file's models, as before `variables`."""
    known = {*field_types(EvalConfig), "models", "model_name", "load_path", "icl_subset_num_batches"}
    top_level_variables(document, [key for key in document.tree if key not in known], notes)
    models = document.get(("models",))
    if isinstance(models, list) and document.has(("load_path",)):
        origin, place = document.origin(("load_path",)), document.take(("load_path",))
        for n in range(len(models)):
            if document.get(("models", n, "load_path")) is None:
                document.put(("models", n, "load_path"), place, origin)


def kind_of(path: str) -> Literal["run", "evaluation", "tasks"]:
    """What a YAML file describes, by its keys."""
    keys = read_document(path, ()).tree.keys() if path.endswith(CONFIG_SUFFIXES) else set()
    if keys and keys <= {"icl_tasks", "eval_gauntlet"}:
        return "tasks"
    is_evaluation = "train_loader" not in keys and keys & {"models", "icl_tasks", "tasks"}
    return "evaluation" if is_evaluation else "run"


def _take_model(document: Document, entry: KeyPath, lacking: dict[str, str] | None) -> str:
    """Replace the description of a model by the place of its weights; returns the model's name."""
    kind, load_path = document.get((*entry, "model", "name")), (*entry, "load_path")
    place = load_path if document.get(load_path) else (*entry, "model", "pretrained_model_name_or_path")
    weights, tokenizer = document.get(place), document.get((*entry, "tokenizer", "name"))
    name = document.get((*entry, "model_name")) or weights
    if kind not in ("mpt_causal_lm", "hf_causal_lm"):
        text = f"{kind} is not an MPT model. Evaluate others with lm-evaluation-harness: lm_eval --model hf."
        document.report((*entry, "model", "name"), text)
    elif weights is None and lacking is not None:
        lacking[dotted(load_path)] = "is blank. Name a run, a checkpoint or an exported folder."
        weights = "a model that load_path does not name yet"
    elif not isinstance(weights, str):
        document.report(load_path, "is blank. Name a run, a checkpoint or an exported folder.")
    document.raise_problems()
    origins = document.origin(place), document.origin((*entry, "tokenizer", "name"))
    for key in ("model_name", "model", "tokenizer", "load_path"):
        document.take((*entry, key))
    document.put(("model",), weights, origins[0])
    if tokenizer is not None:
        document.put(("tokenizer",), tokenizer, origins[1])
    return str(name or Path(document.name).stem)


def tasks_of(options: EvalConfig | TrainConfig) -> tuple[tuple[TaskConfig, ...], GauntletConfig | None]:
    """The tasks of an evaluation or a run and their gauntlet, read from the files that it names.

    Raises:
        ConfigError: A file is missing or wrong, or has no tasks.
    """
    tasks, gauntlet = options.icl_tasks, options.eval_gauntlet
    if isinstance(tasks, str):
        file = parse_words([], TaskFileConfig, tasks)
        tasks, gauntlet = file.icl_tasks, gauntlet or file.eval_gauntlet
    if isinstance(gauntlet, str):
        gauntlet = parse_words([], TaskFileConfig, gauntlet).eval_gauntlet
    if options.icl_tasks is not None and not tasks:
        raise ConfigError(f"icl_tasks: {options.icl_tasks or '[]'} names no task.")
    return tasks or (), gauntlet


def tasks_of_run(config: TrainConfig) -> tuple[tuple[TaskConfig, ...], GauntletConfig | None]:
    """The tasks of a training run and their gauntlet, read from the files that it names.

    Raises:
        ConfigError: A file is missing or wrong, or the gauntlet counts a task that is not evaluated.
    """
    tasks, gauntlet = tasks_of(config)
    file = config.eval_gauntlet or config.icl_tasks
    if gauntlet is not None:
        document = read_document(file, ()) if isinstance(file, str) else Document("icl_tasks")
        for key, text in missing_benchmarks(tasks, gauntlet):
            document.report(parse_key(f"eval_gauntlet.{key}"), text)
        document.raise_problems()
    return tasks, gauntlet


def to_yaml(config: Any) -> str:
    """A configuration as YAML text that loads to an equal one.

    Fields that are None by default and permissions of the command line are left out, and secrets replaced.
    """
    return to_text(redacted(mapped(config, _plain)))


def values_by_key(text: str) -> dict[str, Any]:
    """Return the values of a saved config by key, without those that have no effect by themselves."""
    pairs = leaves(from_text(text), lists=False)
    return {
        ".".join(map(str, path)): value
        for path, value in pairs
        if path and path[0] not in ("allow_changes", "variables")
    }


def refuse_redacted(config: Any) -> None:
    """Raise ConfigError where a run would be started with what stands for a secret in a saved config."""
    problems = [
        f"{'.'.join(map(str, path))}: {REDACTED} stands for a secret, which is not saved with a run. Give it "
        "on the command line, or name the file that the run was first started with."
        for path in redactions(mapped(config, _plain))
    ]
    if problems:
        raise ConfigError(problems)


def _plain(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Sections as dicts, without what is None by default, and text as OmegaConf reads it back."""
    if is_dataclass(value) and not isinstance(value, type):
        items = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "allow_code"}
        optional = {f.name for f in fields(value) if default_of(f) is None}
        return mapped({n: v for n, v in items.items() if v is not None or n not in optional}, _plain)
    if isinstance(value, str) and not isinstance(value, FromEnvironment):
        # OmegaConf takes an escaped `${` for text, and halves the backslashes before it.
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _refuse_another_kind(document: Document) -> None:
    """Raise ConfigError for a file that describes something else than a training run."""
    for key, text in OTHER_KINDS.items():
        if key in document.tree:
            raise ConfigError(f"{document.origin((key,)).place}: {key}: {text}")


def _refuse_code_from_file(document: Document) -> None:
    if "allow_code" in document.tree and not document.origin(("allow_code",)).is_word:
        document.report(("allow_code",), "is only taken from the command line. Remove it from the file.")


def _share_top_level(document: Document) -> None:
    """Give the model the `max_seq_len` of the run, unless it says it itself."""
    model, length = document.tree.get("model"), document.tree.get("max_seq_len")
    if isinstance(model, dict) and model.get("max_seq_len") is None and isinstance(length, int):
        document.put(("model", "max_seq_len"), length, document.origin(("max_seq_len",)))


def _effects(config: TrainConfig) -> list[str]:
    """What a user should know about a valid configuration."""
    notes = []
    if not config.model.attn_config.attn_uses_sequence_id and config.train_loader.dataset.separates_documents:
        notes.append(
            "train_loader.dataset: documents are separated, but model.attn_config.attn_uses_sequence_id is "
            "false: tokens of a packed row see the documents before theirs."
        )
    for key, needed in _NO_EFFECT_WITHOUT.items():
        if getattr(config, key) != getattr(TrainConfig, key) and not any(getattr(config, n) for n in needed):
            notes.append(f"{key}: has no effect without {' or '.join(needed)}.")
    if config.load_path is None and (config.load_weights_only or config.load_ignore_keys):
        notes.append("load_weights_only and load_ignore_keys have no effect without load_path.")
    if isinstance(config.scheduler, OwnScheduleConfig):
        return notes
    warmup = tokens_of(config.scheduler.t_warmup, config)
    whole = tokens_of(config.max_duration, config)
    if warmup is not None and whole is not None and warmup > whole:
        notes.append(_warmup_is_longer(config.scheduler.t_warmup, config.max_duration))
    return notes


def _warmup_is_longer(warmup: int | str, duration: int | str) -> str:
    return (
        f"scheduler.t_warmup: {warmup} is longer than the run, max_duration: {duration}: the learning rate "
        "never reaches its peak."
    )
