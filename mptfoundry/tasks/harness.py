"""Public tasks through EleutherAI's lm-evaluation-harness; only this module and `harness_model.py` import it.

It reads a task's data, writes the prompts and computes the scores; our network answers its requests. Its own
view is that of a single device on each rank.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import logging
import math
import random
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.metrics
import lm_eval.api.task
import lm_eval.tasks
import numpy as np
import torch
import yaml
from lm_eval.api.registry import get_aggregation, get_metric, get_metric_aggregation
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import hash_string
from tqdm import tqdm

from mptfoundry.config.verbs import EvalConfig
from mptfoundry.errors import ConfigError, DataError, MPTFoundryError
from mptfoundry.ranks import once_per_node, rank, say, world_size
from mptfoundry.stores import reason_of
from mptfoundry.tasks.answers import Samples
from mptfoundry.tasks.harness_model import HarnessModel, gold_index, label_of
from mptfoundry.tasks.scoring import Model
from mptfoundry.tokenizer import default_template

# The seeds of `lm_eval` on the command line.
_PYTHON_SEED, _OTHER_SEED = 0, 1234
_BOOTSTRAP_ROUNDS = 1000
_GOLD_BITS = "gold_bits_per_byte"

# A task, a group and a tag are each named in a line of their own, with keys that may be quoted. A tag is a
# name or a list of them. lm-eval's own index of its tasks takes a minute or more.
_NAME = re.compile(r"""^["']?(?:task|group)["']?:[ ]*["']?([^\s"'#\[\]{}]+)""", re.MULTILINE)
_TAGS = re.compile(r"""^["']?tag["']?:[ ]*(.*(?:\n[ ]*-.*)*)""", re.MULTILINE)
_INCLUDE = re.compile(r"""^["']?include["']?:[ ]*["']?([^\s"'#]+)""", re.MULTILINE)
_WORD = re.compile(r"[\w./:+-]*\w")

Results = dict[str, dict[str, float]]


@dataclass(frozen=True)
class HarnessTasks:
    """The public tasks of an evaluation, with their data.

    Attributes:
        tasks: lm-eval's tasks by name.
        groups: Its groups by name, whose scores are means over tasks.
        options: The evaluation's.
        settings: All that changes their numbers.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any]
    options: EvalConfig
    settings: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """The names of the tasks in all results."""
        return [label_of(name, task) for name, task in self.tasks.items()]


def load_tasks(options: EvalConfig, tokenizer: Any) -> HarnessTasks:
    """Find the public tasks that the options name, and read their data; all ranks call it.

    Raises:
        ConfigError: A name is unknown, or its definition may not be used as it is.
        DataError: A data set is missing.
    """
    if options.apply_chat_template and default_template(tokenizer) is None:
        raise ConfigError(
            "apply_chat_template: the tokenizer has no chat template. Remove it, or name another tokenizer."
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _own_random_state():
        names, manager = _manager(options)
        if world_size() > 1:  # one rank of a node fetches the data, the others find it there
            once_per_node(partial(_read_all, manager, names), what="reading the data of public tasks")
        tasks: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        for loaded in _read(manager, names):
            tasks |= loaded["tasks"]
            groups |= loaded.get("groups", {})
        for name, task in tasks.items():
            _refuse(name, task, options)
            _set_examples(name, task, options.num_fewshot)
            _add_metrics(task)
        settings = _settings(options, tasks, groups, tokenizer)
    return HarnessTasks(tasks, groups, options, settings)


def _settings(
    options: EvalConfig, tasks: Mapping[str, Any], groups: Mapping[str, Any], tokenizer: Any
) -> dict[str, Any]:
    return {
        "lm_eval": metadata.version("lm_eval"),
        "datasets": metadata.version("datasets"),
        "tasks": {name: {**task.dump_config(), "documents": _digest(task)} for name, task in tasks.items()},
        "groups": {name: group.to_dict() for name, group in groups.items()},
        "chat": [options.apply_chat_template, options.fewshot_as_multiturn, options.system_instruction],
        "chat_template": tokenizer.chat_template if options.apply_chat_template else None,
    }


def evaluate_harness_tasks(
    model: Model, tasks: HarnessTasks, samples: Samples | None, *, tokens: int, max_seq_len: int
) -> Results:
    """Evaluate public tasks; all ranks call it.

    Args:
        model: The model; the same on all ranks.
        tasks: From `load_tasks`.
        samples: Where the first rank keeps answers; None on other ranks.
        tokens: The most tokens, with padding, of a batch.
        max_seq_len: The most tokens of a text; what exceeds it is cut on the left.

    Returns:
        `task/N-shot`, and the name of each group with a score -> metric -> value.
    """
    options = tasks.options
    network = HarnessModel(
        model, tasks.tasks, samples, tokens=tokens, max_seq_len=max_seq_len, seed=options.seed
    )
    is_multiturn = options.fewshot_as_multiturn
    with _own_random_state(), _quietly():
        try:
            answered = evaluate(
                network,
                {"tasks": tasks.tasks, "groups": tasks.groups},
                limit=None if options.limit < 0 else options.limit,
                bootstrap_iters=_BOOTSTRAP_ROUNDS if rank() == 0 else 0,
                log_samples=False,
                system_instruction=options.system_instruction,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.apply_chat_template if is_multiturn is None else is_multiturn,
                confirm_run_unsafe_code=options.allow_code,
            )
        except MPTFoundryError:
            raise
        except Exception as error:  # a task's own code, and its templates, raise anything
            if network.is_computing:
                raise
            raise DataError(
                f"tasks: lm-eval can't evaluate them ({type(error).__name__}: {error})."
            ) from error
    return _results(answered, tasks, network.seconds)


def _manager(options: EvalConfig) -> tuple[list[str], TaskManager]:
    """The names of the evaluation's tasks, groups and tags without patterns, and what loads them."""
    own = Path(options.include_path) if options.include_path is not None else None
    if own is not None and not own.is_dir():
        raise ConfigError(f"include_path: {own} is not a folder. Name the folder with the tasks' YAML files.")
    if own is not None and not options.allow_code:
        for place in filter(None, map(code_in, sorted(own.rglob("*.yaml")))):
            raise ConfigError(f"include_path: {place} runs Python code. Read it, and add allow_code=true.")
    local = files_of_names(own) if own is not None else {}
    names = [found for name in options.public_tasks for found in _names(name, local, options.allow_code)]
    # lm-eval's own tasks are read only where a name, or a member of a group, is not one of these.
    public: set[str] = set()
    while True:
        paths = [*folders_of(public), *([own] if own is not None else [])]
        manager = TaskManager(include_path=list(paths), include_defaults=False)
        missing = set(_missing(manager, names))
        if not (more := (missing & files_of_public_names().keys() if missing else set()) - public):
            break
        public |= more
    for name in names:
        if name in missing and not name.endswith(".yaml"):
            _refuse_broken(name, local.get(name) or files_of_public_names()[name])
    return names, manager


def _names(name: str, local: Mapping[str, Any], allow_code: bool) -> list[str]:
    """The tasks, groups and tags that a name or a pattern means."""
    if name.endswith(".yaml"):
        return [_checked_file(name, allow_code)]
    known = fnmatch.filter(local, name) or fnmatch.filter(files_of_public_names(), name)
    if not known:
        raise ConfigError(f"tasks: {name} {_unknown(name, [*local, *files_of_public_names()])}")
    return sorted(known)


def _checked_file(name: str, allow_code: bool) -> str:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"tasks: {name}: there is no such file.")
    if not allow_code and (place := code_in(path)):
        raise ConfigError(f"tasks: {place} runs Python code. Read it, and add allow_code=true.")
    return name


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=5, cutoff=0.6)
    text = f"is not a task of lm-eval {metadata.version('lm_eval')}, or of include_path."
    return f"{text} Near it are {', '.join(near)}." if near else text


def _missing(manager: TaskManager, names: Sequence[str]) -> Iterator[str]:
    """The names, and the members of their groups, that the manager does not know."""
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        entry = manager.task_index.get(name)
        if entry is None:
            yield name
            continue
        members = (entry.cfg or {}).get("task")
        todo += _members(members) if isinstance(members, list) else []


def _members(members: Sequence[Any]) -> Iterator[str]:
    for member in members:
        if isinstance(member, str):
            yield member
        elif isinstance(member, dict) and isinstance(member.get("task"), list):
            yield from _members(member["task"])
        elif isinstance(member, dict):
            yield str(member.get("task") or member.get("group"))


def _refuse_broken(name: str, paths: Iterable[Path]) -> None:
    """Say why lm-eval has left out the file that defines a task."""
    for path in sorted(paths):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # any mistake of a YAML file
            text = " ".join(str(error).split())
            raise ConfigError(f"tasks: {name}: {path} can't be read ({text}).") from error
    raise ConfigError(f"tasks: {name} can't be read from {', '.join(map(str, sorted(paths)))}.")


def _read_all(manager: TaskManager, names: Sequence[str]) -> bool:
    return bool(list(_read(manager, names)))


def _read(manager: TaskManager, names: Sequence[str]) -> Iterator[Any]:
    for name in names:
        try:
            yield manager.load([name])
        except (OSError, datasets.exceptions.DatasetsError) as error:
            sets = list(dict.fromkeys(_data_sets(manager, name)))
            raise DataError(_without_data(name, sets, error)) from error
        except Exception as error:  # a task's own code, and its templates, raise anything
            raise DataError(f"tasks: {name} can't be prepared ({type(error).__name__}: {error}).") from error


def _data_sets(manager: TaskManager, name: str) -> Iterator[tuple[str, ...]]:
    """The arguments of `load_dataset` for a task, or for all tasks of a group or tag."""
    entry = manager.task_index.get(name)
    if entry is None and Path(name).is_file():
        config = load_yaml(name, resolve_func=False)
    else:
        config = (entry.cfg or {}) if entry is not None else {}
    if isinstance(config.get("task"), list):
        for member in _members(config["task"]):
            yield from _data_sets(manager, member)
    elif entry is not None and not config:
        for member in sorted(entry.tags):
            yield from _data_sets(manager, member)
    elif isinstance(config.get("dataset_path"), str):
        subset = config.get("dataset_name")
        yield (config["dataset_path"], *([str(subset)] if subset is not None else []))


def _without_data(name: str, sets: Sequence[tuple[str, ...]], error: Exception) -> str:
    reason = " ".join(reason_of(error).split())
    named = ", ".join(" ".join(each) for each in sets) or "its own"
    arguments = ", ".join(repr(part) for part in sets[0]) if sets else "..."
    return (
        f"tasks: {name}: its data set {named} can't be read ({reason}). Without a network, run "
        f'`python -c "import datasets; datasets.load_dataset({arguments})"` where there is one and copy what '
        f"it wrote to {datasets.config.HF_DATASETS_CACHE}, or name a YAML of your own files in include_path."
    )


def _refuse(name: str, task: Any, options: EvalConfig) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"tasks: {name} has pictures or sound, and an MPT reads text. Remove it.")
    if getattr(task, "UNSAFE_CODE", False) and not options.allow_code:
        raise ConfigError(f"tasks: {name} runs code that the model writes. Add allow_code=true to allow it.")


def _set_examples(name: str, task: Any, shots: int | None) -> None:
    own = task.get_config("num_fewshot")
    if shots is not None and own == 0:
        say(f"{name}: is defined without examples, and num_fewshot does not change that")
    elif shots is not None:
        task.set_config("num_fewshot", shots)
    elif own is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(_OTHER_SEED)


def _add_metrics(task: Any) -> None:
    """Both accuracies of a multiple-choice task, and the bits per byte of its right choice."""
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return
    for name in ("acc", "acc_norm"):
        if name not in task._metric_fn_list:
            task._metric_fn_list[name] = get_metric(name)
            task._metric_fn_kwargs[name] = {}
            task._aggregation_list[name] = get_metric_aggregation(name)
            task._higher_is_better[name] = True
    judge = task.process_results

    def with_bits(doc: Any, results: Any) -> dict[str, Any]:
        bits = _gold_bits(task, doc, results)
        return {**judge(doc, results), **({} if bits is None else {_GOLD_BITS: bits})}

    task.process_results = with_bits
    task._aggregation_list[_GOLD_BITS] = get_aggregation("mean")
    task._higher_is_better[_GOLD_BITS] = False


def _gold_bits(task: Any, doc: Any, results: Sequence[tuple[float, bool]]) -> float | None:
    gold = gold_index(task, doc)
    if gold is None:
        return None
    text = task.doc_to_target(doc) if task.multiple_input else task.doc_to_choice(doc)[gold]
    return -results[gold][0] / math.log(2) / max(1, len(str(text).encode()))


def _digest(task: Any) -> str:
    """A hash of a task's documents."""
    return str(hash_string(json.dumps(list(task.eval_docs), default=str)))


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Seed as `lm_eval` does on the command line; afterwards, all random states are as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    random.seed(_PYTHON_SEED)
    np.random.seed(_OTHER_SEED)
    torch.default_generator.manual_seed(_OTHER_SEED)  # without the GPUs', unlike torch.manual_seed
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)


@contextmanager
def _quietly() -> Iterator[None]:
    """Show lm-eval's progress of writing prompts only where it is read, and bootstrap in this process."""
    before = lm_eval.api.task.tqdm, lm_eval.api.metrics.bootstrap_stderr
    lm_eval.api.task.tqdm = partial(tqdm, desc="prompts", disable=rank() != 0 or not sys.stderr.isatty())
    lm_eval.api.metrics.bootstrap_stderr = _bootstrap_error
    try:
        yield
    finally:
        lm_eval.api.task.tqdm, lm_eval.api.metrics.bootstrap_stderr = before


def _bootstrap_error(metric: Callable[[Sequence[Any]], float], values: Sequence[Any], iters: int) -> float:
    """The standard error of a metric that is not a mean, by bootstrap."""
    draw = random.Random(0)
    return float(np.std([metric(draw.choices(values, k=len(values))) for _ in range(iters)], ddof=1))


def _results(answered: Mapping[str, Any], tasks: HarnessTasks, seconds: Mapping[str, float]) -> Results:
    results: Results = {}
    for name, metrics in answered["results"].items():
        values = {}
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if filtered:
                column = metric if filtered == "none" else f"{metric}/{filtered}"
                values[column] = float(value) if value != "N/A" else math.nan
        if name in tasks.tasks:
            documents = answered["n-samples"][name]["effective"]
            values |= {"documents": float(documents), "seconds": seconds.get(name, 0.0)}
            results[label_of(name, tasks.tasks[name])] = values
        elif values:
            results[name] = {**values, "documents": float(metrics["sample_len"])}
    return results


def defaults_folder() -> Path:
    """The folder of the tasks that come with lm-eval."""
    return Path(str(lm_eval.tasks.__file__)).parent


def files_of_names(folder: Path) -> Mapping[str, frozenset[Path]]:
    """Task, group or tag -> the YAML files below a folder that define it."""
    files: dict[str, set[Path]] = {}
    for path in folder.rglob("*.yaml"):
        for name in _names_in(path):
            files.setdefault(name, set()).add(path)
    return {name: frozenset(paths) for name, paths in files.items()}


@cache
def files_of_public_names() -> Mapping[str, frozenset[Path]]:
    """The same for all tasks that come with lm-eval."""
    return files_of_names(defaults_folder())


def folders_of(names: Collection[str]) -> list[Path]:
    """The folders of lm-eval's own tasks, groups and tags of these names; none is inside another."""
    known = files_of_public_names()
    folders = {path.parent for name in names for path in known.get(name, ())}
    return sorted(folder for folder in folders if not folders & set(folder.parents))


def code_in(path: Path, seen: frozenset[Path] = frozenset()) -> str | None:
    """`FILE:LINE` where a YAML file of tasks, or one that it includes, runs Python code; or None."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # lm-eval does not read it, either
    todo = [root] if root is not None else []
    while todo:
        node = todo.pop(0)
        if node.tag.startswith("!"):
            return f"{path}:{node.start_mark.line + 1}"
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            todo += [part for pair in node.value for part in pair]
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "include":
            for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                other = path.parent / str(each.value)
                if other not in seen and (place := code_in(other, seen | {path})):
                    return place
    return None


def _names_in(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    yield from _NAME.findall(text)
    yield from _tags_in(text)
    for name in _INCLUDE.findall(text):
        yield from _tags_of_template(path.parent / name)


@cache
def _tags_of_template(path: Path) -> tuple[str, ...]:
    """The tags of a file that others include, and of those that it includes itself."""
    if not path.is_file():
        return ()
    text = path.read_text(encoding="utf-8", errors="replace")
    inherited = (path.parent / name for name in _INCLUDE.findall(text) if name != path.name)
    return (*_tags_in(text), *(tag for each in inherited for tag in _tags_of_template(each)))


def _tags_in(text: str) -> Iterator[str]:
    for value in _TAGS.findall(text):
        yield from _WORD.findall(value)
