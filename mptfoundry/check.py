"""`mptfoundry check`: check a config, and the files it names if they are on this machine.

A contradiction within the config, or with files on this machine, is an error. Something that only this
machine lacks (a GPU, a package, a folder) is printed on a line that begins with `here:`: another machine may
have it, but `train` refuses to start without it. The check reads shard indexes, `tokenizer.json` and the
files of in-context tasks, but no samples or records. It does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from mptfoundry.architecture.pretrained import published_architecture
from mptfoundry.config.data import OwnSource, sources_by_key
from mptfoundry.config.load import tasks_of_run
from mptfoundry.config.parallel import replicas_and_shards
from mptfoundry.config.run import TrainConfig
from mptfoundry.config.streams import RecordsConfig, StreamConfig
from mptfoundry.data.records.sources import look_at_records
from mptfoundry.data.shards.index import ShardIndex, find_split, read_index
from mptfoundry.data.text.streams import length_problem, tokenizer_problem
from mptfoundry.errors import ConfigError, DataError, MissingError, MPTFoundryError, first_line
from mptfoundry.places import path_of
from mptfoundry.plan.devices import GIB, Device, detect_device, launcher_device
from mptfoundry.plan.plan import Plan, device_batch, make_plan
from mptfoundry.plan.table import Stream, describe_plan, place_of
from mptfoundry.tokenizer import (
    TokenizerFiles,
    borders_of_folder,
    find_tokenizer,
    fingerprint_of_parts,
    read_tokenizer_files,
    vocabulary_problem,
)

BASE = "model.pretrained_model_name_or_path"
REFUSED = "train refuses this here"
MOST_DEVICES = 4096
SHOWN_FILES = 2


@dataclass
class Look:
    """What the check finds on this machine.

    Attributes:
        config: The run.
        tokenizer: Its tokenizer's files, if they are on this machine.
        problems: Errors: contradictions with the config, each with its key.
        lacking: What `train` needs and this machine lacks, each with its key.
        needed: What `train` may need and this machine lacks.
        notes: Other useful facts about this machine.
        streams: What is known about the data, by loader and stream.
    """

    config: TrainConfig
    tokenizer: TokenizerFiles | None = None
    problems: list[MPTFoundryError] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    needed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    streams: dict[tuple[str, str], Stream] = field(default_factory=dict)


def check(config: TrainConfig) -> str:
    """Return what `mptfoundry check` prints: a table of the run, and a line for all that this machine lacks.

    Raises:
        ConfigError, DataError: The config contradicts what is on this machine.
    """
    return check_on(config).text


class Checked(NamedTuple):
    """What a check prints, and how many of its lines say what `train` needs and this machine lacks."""

    text: str
    lacking: int


def check_on(
    config: TrainConfig, device: Device | None = None, absent: Mapping[str, str] | None = None
) -> Checked:
    """Check a config for this machine's devices, or for those of a cluster.

    Args:
        config: The run.
        device: The devices of a cluster. Default: those that the `composer` launcher would use here.
        absent: What was missing when the config was read, by key.

    Raises:
        ConfigError, DataError: The config contradicts what is on this machine, or can't run on the cluster.
    """
    look, problem, absent = look_here(config), None, absent or {}
    if look.problems:
        raise _as_one(look.problems)
    if device is None:
        device, problem = planned_device(config, launcher_device())
    plan = make_plan(config, device)
    lacking = [problem] if problem else []
    lacking += [f"{key}: {text}" for key, text in [*absent.items(), *plan.missing.items()]]
    if device.memory is not None and plan.memory.total > device.memory:
        look.needed.append(
            f"the model does not fit: it needs about {plan.memory.total / GIB:.1f} GiB of a device that has "
            f"{device.memory / GIB:.1f} GiB; more devices with fsdp_config hold it in parts"
        )
    lacking += look.lacking
    lines = [f"here: {text.rstrip('.')}; {REFUSED}" for text in lacking]
    lines += [f"here: {text}" for text in look.needed + look.notes]
    base = config.model.pretrained_model_name_or_path
    if BASE in absent and base is not None and published_architecture(base) is None:
        table = f"{config.run_name}\n  the size of {base} is not known here, and so are the run's numbers"
    else:
        borders = borders_of_folder(config.tokenizer.name, config.tokenizer.kwargs)
        table = describe_plan(config, plan, borders, look.streams)
    return Checked("\n".join([table, *lines]), len(lacking) + len(look.needed))


def refuse_here(config: TrainConfig) -> Plan:
    """Check the config before `train` does its slow imports; return the run's plan on this machine.

    Raises:
        ConfigError, DataError: The config contradicts this machine, or needs something it lacks.
    """
    look, plan = look_here(config), make_plan(config, detect_device())
    problems = [*look.problems, *(ConfigError(f"{key}: {text}") for key, text in plan.missing.items())]
    problems += map(DataError, look.lacking)
    if problems:
        error = _as_one(problems)
        error.of_this_machine = True
        raise error
    return plan


def look_here(config: TrainConfig) -> Look:
    """Check the files that a config names, if they are on this machine."""
    look = Look(config)
    _look_at_tokenizer(look)
    loaders = [("train", "train_loader", config.train_loader)]
    loaders += [(label, f"eval_loader {label}", loader) for label, loader in config.eval_loaders.items()]
    for loader_name, where, loader in loaders:
        sources = sources_by_key(loader, where).items()
        for name, (place, stream) in zip(loader.dataset.sources, sources, strict=True):
            try:
                if isinstance(stream, StreamConfig):
                    known = _look_at_shards(stream, stream.split or loader.dataset.split, place, look)
                else:
                    known = _look_at_records(stream, place)
            except MissingError as error:
                look.lacking.append(str(error))
            except MPTFoundryError as error:
                look.problems.append(error)
            except (OSError, RuntimeError) as error:  # an impossible file name, or an unknown home folder
                look.problems.append(DataError(f"{place}: can't be read: {_reason(error)}."))
            else:
                if known is not None:
                    look.streams[loader_name, name] = known
    for path in config.code_paths:
        if not Path(path).is_file():
            look.lacking.append(f"code_paths: {path} is missing. Name a Python file.")
    if config.load_path:
        _look_at_start(config.load_path, config.run_name, look)
    if config.icl_tasks is not None:
        _look_at_tasks(config, look)
    return look


def planned_device(config: TrainConfig, device: Device) -> tuple[Device, str | None]:
    """Return the devices to plan with: this machine's, or if the batch or the shards don't divide evenly over
    them, the nearest number of devices that works, and the problem."""
    problem = None
    for count in (device.count, *range(device.count - 1, 0, -1), *range(device.count + 1, MOST_DEVICES)):
        planned = replace(device, count=count, per_node=min(count, device.per_node))
        try:
            device_batch(config, planned)
            if config.fsdp_config is not None:
                replicas_and_shards(config.fsdp_config, devices=count, per_node=planned.per_node)
        except ConfigError as error:
            if "WORLD_SIZE" in os.environ:
                raise
            problem = problem or str(error)
        else:
            return planned, problem and f"{problem.rstrip('.')}. Planned with {count}."
    raise ConfigError(problem or "global_train_batch_size: does not split.")


def _reason(error: Exception) -> str:
    """Return an OSError's reason without the file name, which may be long."""
    return getattr(error, "strerror", None) or first_line(error)


def _as_one(problems: list[MPTFoundryError]) -> MPTFoundryError:
    """Return all problems as one error: a DataError if all of them are about data, else a ConfigError."""
    texts = [str(problem) for problem in problems]
    return (ConfigError if any(isinstance(p, ConfigError) for p in problems) else DataError)("\n".join(texts))


def _look_at_start(load_path: str, run_name: str, look: Look) -> None:
    """Check the checkpoint of `load_path`; a run that already has its own checkpoint doesn't need it."""
    place = load_path.replace("{run_name}", run_name).replace("{rank}", "0")
    start = path_of(place)
    if start is not None and not os.path.lexists(start):
        look.needed.append(
            f"load_path: {place} is not on this machine; train needs it unless the run has its own checkpoint"
        )


def _look_at_tasks(config: TrainConfig, look: Look) -> None:
    """Read the files of the in-context tasks, and their data if it is on this machine."""
    from mptfoundry.tasks.questions import read_lines

    try:
        tasks, _ = tasks_of_run(config)
    except MPTFoundryError as error:
        look.problems.append(error)
        return
    for task in tasks:
        path = path_of(task.dataset_uri)
        if path is not None and not path.exists():
            look.lacking.append(f"icl_tasks: {path} is missing. It is the data of {task.label}.")
        elif path is not None:
            try:
                read_lines(path, task)
            except MPTFoundryError as error:
                look.problems.append(error)


def _look_at_tokenizer(look: Look) -> None:
    model, tokenizer = look.config.model, look.config.tokenizer
    name, revision = tokenizer.name, tokenizer.kwargs.get("revision")
    if revision is not None and "@" not in name and not os.path.lexists(name):
        name = f"{name}@{revision}"
    try:
        folder = find_tokenizer(name)
        if folder is None:
            _note_missing_tokenizer(name, look)
        else:
            look.tokenizer = read_tokenizer_files(folder)
    except (OSError, RuntimeError) as error:
        look.problems.append(ConfigError(f"tokenizer.name: can't be read: {_reason(error)}."))
    except ConfigError as error:
        look.problems.append(error)
    if look.tokenizer is not None and (problem := vocabulary_problem(look.tokenizer.ids, model.vocab_size)):
        look.problems.append(ConfigError(f"{model.vocabulary_key}: {problem}"))


def _note_missing_tokenizer(name: str, look: Look) -> None:
    if name.startswith(("/", "./", "../", "~")) or Path(name).exists():
        text = f"tokenizer.name: {name} is not a folder. Give a folder that holds tokenizer.json."
        look.lacking.append(text)
    elif os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        look.lacking.append(
            f"tokenizer.name: {name} is neither a folder nor in the Hugging Face cache, "
            "and HF_HUB_OFFLINE is set"
        )
    else:
        look.notes.append(f"tokenizer.name: {name} is not on this machine; train fetches it from the hub")


def _cached_shards(stream: StreamConfig, split: str | None) -> Path | None:
    """The folder of a URL's local cache, if it has an index."""
    folder = Path(stream.local).expanduser() / (split or "") if stream.local else None
    return folder if folder is not None and (folder / "index.json").is_file() else None


def _look_at_shards(stream: StreamConfig, split: str | None, where: str, look: Look) -> Stream | None:
    """Read a stream's index if it is on this machine; for a URL, look in its local cache."""
    config, tokenizer, origin = look.config, look.tokenizer, path_of(stream.place)
    folder = _cached_shards(stream, split) if origin is None else find_split(origin, split, where)
    if folder is None:
        return None
    index = read_index(folder, where)
    if problem := length_problem(index, config.max_seq_len):
        raise DataError(f"{where}: {problem}")
    problem = None
    if tokenizer is not None and index.meta is not None:
        problem = tokenizer_problem(index, fingerprint_of_parts(tokenizer.parts))
    if problem:
        _report_another_tokenizer(f"{where}: {problem}", index, where, look)
    return Stream(place_of(stream.place, split), index.samples)


def _report_another_tokenizer(problem: str, index: ShardIndex, where: str, look: Look) -> None:
    """Raise DataError if the tokenizer is nothing but its files; else note that it may be another one."""
    assert look.tokenizer is not None and index.meta is not None
    if look.tokenizer.is_plain:
        raise DataError(problem)
    look.notes.append(
        f"{where}: {index.folder} seems to be prepared with another tokenizer than "
        f"{look.config.tokenizer.name} ({index.meta.tokenizer}); train compares them"
    )


def _look_at_records(stream: RecordsConfig | OwnSource, where: str) -> Stream | None:
    """List the files of a stream of records, if they are on this machine; only its code knows an own one."""
    if isinstance(stream, OwnSource):
        return None
    records = look_at_records(stream, where)
    if records is None:
        return None
    files, samples = records
    more = f" and {len(files) - SHOWN_FILES:,} more files" if len(files) > SHOWN_FILES else ""
    return Stream(", ".join(files[:SHOWN_FILES]) + more, samples)
