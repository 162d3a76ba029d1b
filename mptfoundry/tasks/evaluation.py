"""Evaluate in-context tasks: the ranks take turns at the batches, and the first one keeps the answers."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.utils import dist, get_file
from tqdm import tqdm

from mptfoundry import __version__
from mptfoundry.architecture.hub import locate
from mptfoundry.checkpoints.source import ModelSource
from mptfoundry.config.load import tasks_of
from mptfoundry.config.tasks import GauntletConfig, TaskConfig
from mptfoundry.config.verbs import EvalConfig, Sampling
from mptfoundry.data.records.inputs import load_from_hub
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.files import whole_or_absent
from mptfoundry.generation import continue_prompts
from mptfoundry.places import path_of
from mptfoundry.ranks import once_per_node, rank, say
from mptfoundry.stores import AT_START, patiently, reason_of
from mptfoundry.tasks.answers import SAMPLES, Samples, identity_of, settings_hash
from mptfoundry.tasks.gauntlet import gauntlet_scores, refuse_missing
from mptfoundry.tasks.outcomes import (
    Outcome,
    judge_scores,
    judge_text,
    mean_of_categories,
    task_metrics,
)
from mptfoundry.tasks.questions import Question, TaskData, build_task, line_of, read_lines
from mptfoundry.tasks.scoring import Batch, Model, gathered, plan_batches, rounds, score_batch

if TYPE_CHECKING:
    from mptfoundry.tasks.harness import HarnessTasks


@dataclass(frozen=True)
class TaskPlan:
    """The tasks of an evaluation with their questions, and where its answers and results go.

    Attributes:
        tasks: Each task with each number of examples.
        gauntlet: How their scores are averaged.
        results: The JSON file of results.
        samples: The file of answers.
        max_seq_len: The most tokens of a text.
        settings: All that changes numbers; a file of answers is continued only if they are the same.
        public: The tasks of lm-evaluation-harness, if there are any.
    """

    tasks: tuple[TaskData, ...]
    gauntlet: GauntletConfig | None
    results: Path
    samples: Path
    max_seq_len: int
    settings: dict[str, Any]
    public: HarnessTasks | None = None


def plan_tasks(
    options: EvalConfig, source: ModelSource, tokenizer: Any, *, max_seq_len: int, device: str, precision: str
) -> TaskPlan:
    """Read the tasks that the options name, and their data; `device` and `precision` are what `auto` became.

    Raises:
        ConfigError, DataError: A file of tasks or data is missing or wrong, or the gauntlet lacks a task.
    """
    tasks, gauntlet = tasks_of(options)
    if not tasks and not options.public_tasks:
        raise ConfigError(f"icl_tasks: {options.icl_tasks} names no task.")
    public = None
    if options.public_tasks:
        from mptfoundry.tasks.harness import load_tasks

        public = load_tasks(options, tokenizer)
    fewshot, limit = options.num_fewshot, options.limit
    built, digests = build_tasks(
        tasks, gauntlet, tokenizer, max_seq_len=max_seq_len, num_fewshot=fewshot, limit=lambda task: limit
    )
    if public is not None:
        refuse_doubles([*(data.label for data in built), *public.labels])
    settings = {
        "model": identity_of(source.path),
        "base": None if options.base is None else identity_of(locate(options.base)),
        "tasks": [asdict(task) for task in tasks],
        "data": digests,
        "tokenizer": hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest(),
        "max_seq_len": max_seq_len,
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "device": device,
        "precision": precision,
        "attn_impl": options.attn_impl,
        "device_eval_batch_size": options.device_eval_batch_size,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        "mptfoundry": __version__,
    }
    if public is not None:
        settings |= {"public": public.settings, "seed": options.seed}
    out = Path(options.out) if options.out else None
    if out is None:
        home = source.path.parent if source.run_folder is not None else source.path
        out = (
            (home if home.is_dir() else home.parent)
            / "evals"
            / f"{source.path.stem}-{settings_hash(settings)}"
        )
    results = out if out.suffix == ".json" else out / "eval.json"
    samples = out.with_suffix(".samples.jsonl") if out.suffix == ".json" else out / SAMPLES
    return TaskPlan(built, gauntlet, results, samples, max_seq_len, settings, public)


def build_tasks(
    tasks: Sequence[TaskConfig],
    gauntlet: GauntletConfig | None,
    tokenizer: Any,
    *,
    max_seq_len: int,
    num_fewshot: int | None,
    limit: Callable[[TaskConfig], int],
) -> tuple[tuple[TaskData, ...], dict[str, str]]:
    """Read the tasks' files and turn their lines into questions; all ranks call it.

    Args:
        tasks: The tasks.
        gauntlet: What will be averaged; each of its benchmarks has to be among the tasks.
        tokenizer: The model's.
        max_seq_len: The most tokens of a text.
        num_fewshot: The number of examples for all tasks, instead of each task's own numbers.
        limit: Returns how many of a task's first documents to take; -1: all.

    Returns:
        Each task with each number of examples, and the SHA-256 of each task's data by its label.

    Raises:
        ConfigError, DataError: A file is missing or wrong, a task is there twice, or the gauntlet lacks one.
    """
    built, digests = [], {}
    for task in tasks:
        path = Path(once_per_node(partial(local_copy, task), what=f"fetching {task.dataset_uri}"))
        lines = read_lines(path, task)
        digests[task.label] = hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()
        longest = min(task.max_seq_len or max_seq_len, max_seq_len)
        for shots in task.shots if num_fewshot is None else (num_fewshot,):
            built.append(build_task(task, shots, lines, tokenizer, longest, limit(task)))
    labels = [data.label for data in built]
    refuse_doubles(labels)
    if gauntlet is not None:
        refuse_missing(gauntlet, labels)
    return tuple(built), digests


def refuse_doubles(labels: Sequence[str]) -> None:
    """Raise ConfigError if two tasks have one label."""
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(
            f"icl_tasks: {', '.join(twice)}: is there twice. Give each task a label of its own."
        )


def local_copy(task: TaskConfig) -> str:
    """The path of a task's data, fetched if it is in an object store or a data set."""
    path = path_of(task.dataset_uri)
    if path is not None:
        return str(path)
    whole = json.dumps([task.dataset_uri, task.hf_loading_vars, task.hf_parsing_map], sort_keys=True)
    name = hashlib.sha256(whole.encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"mptfoundry-tasks-{os.getuid()}" / f"{name}.jsonl"
    with whole_or_absent(target, overwrite=True) as file:
        if task.is_on_the_hub:
            file.write_text("".join(line + "\n" for line in _lines_of_the_hub(task)), encoding="utf-8")
        else:
            _fetch(task, file)
    return str(target)


def _fetch(task: TaskConfig, file: Path) -> None:
    what = f"{task.dataset_uri}: can't be fetched"
    try:
        patiently(lambda: get_file(task.dataset_uri, str(file), overwrite=True), what=what, patience=AT_START)
    except Exception as error:  # each store raises its own kind
        raise DataError(f"{what} ({reason_of(error)}). It is the data of {task.label}.") from error


def _lines_of_the_hub(task: TaskConfig) -> Iterator[str]:
    """The rows of a task's data set as lines of JSON."""
    import datasets

    try:
        rows = load_from_hub(task.dataset_uri.removeprefix("hf://"), **task.hf_loading_vars)
    except Exception as error:  # the library, the hub and its files raise their own kinds
        raise DataError(
            f"{task.dataset_uri}: can't be read ({reason_of(error)}). It is the data of {task.label}; "
            "hf_loading_vars are the arguments of datasets.load_dataset."
        ) from error
    if not isinstance(rows, datasets.Dataset):
        raise DataError(
            f"{task.dataset_uri}: has the splits {', '.join(rows)}. Say which one is the data of "
            f"{task.label}: hf_loading_vars: {{split: NAME}}."
        )
    for column in (column for columns in task.hf_parsing_map.values() for column in columns):
        if column not in rows.column_names:
            raise DataError(
                f"{task.dataset_uri}: has no column {column}, which hf_parsing_map of {task.label} names. It "
                f"has {', '.join(rows.column_names)}."
            )
    for row in rows:
        yield json.dumps(line_of(row, task), ensure_ascii=False, default=str)


def evaluate_tasks(model: Model, plan: TaskPlan, *, batch_size: int) -> dict[str, dict[str, float]]:
    """Evaluate all tasks of a plan; all ranks call it.

    Args:
        model: The model; the same on all ranks.
        plan: The tasks.
        batch_size: The most texts of `plan.max_seq_len` tokens that a batch has room for; shorter ones are
            more. A task may name another.

    Returns:
        label -> metric -> value, for each task, each of its categories, each group, and `eval_gauntlet`.
    """
    results: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        samples = None
        if rank() == 0:
            samples = stack.enter_context(Samples(plan.samples, plan.settings))
        for data in plan.tasks:
            tokens = (data.task.batch_size or batch_size) * plan.max_seq_len
            results |= run_task(model, data, samples, tokens=tokens)
        if plan.public is not None:
            from mptfoundry.tasks.harness import evaluate_harness_tasks

            tokens = batch_size * plan.max_seq_len
            results |= evaluate_harness_tasks(
                model, plan.public, samples, tokens=tokens, max_seq_len=plan.max_seq_len
            )
    if plan.gauntlet is not None:
        scores = {data.label: results[data.label][data.task.metrics[0]] for data in plan.tasks}
        documents = {data.label: int(results[data.label]["documents"]) for data in plan.tasks}
        results["eval_gauntlet"] = gauntlet_scores(plan.gauntlet, scores, documents)
    return results


def run_task(
    model: Model, data: TaskData, samples: Samples | None, *, tokens: int
) -> dict[str, dict[str, float]]:
    """Evaluate one task with one number of examples; all ranks call it.

    Args:
        model: The model; the same on all ranks.
        data: The task's questions.
        samples: Where the first rank keeps answers; None on other ranks.
        tokens: The most tokens, with padding, of a batch.

    Returns:
        The task's label, and `label/category` for each category -> metric -> value, with `stderr`,
        `documents` and, for the task, `seconds`.
    """
    began_at = time.monotonic()
    finished = {} if samples is None else _finished(samples, data)
    finished = dist.all_gather_object(finished)[0]
    if finished:
        say(f"{data.label}: {len(finished)} of {len(data.questions)} documents were evaluated before")
    cut = sum(question.is_cut for question in data.questions)
    if cut:
        say(f"{data.label}: {cut} of {len(data.questions)} documents are too long: cut on the left")
    outcomes = dict(finished)
    todo = [
        batch
        for batch in plan_batches(data.questions, tokens)
        if any(question.doc_id not in finished for question in batch.questions)
    ]
    with tqdm(
        total=sum(len(batch.questions) for batch in todo),
        desc=data.label,
        unit="doc",
        disable=rank() != 0 or not sys.stderr.isatty(),
    ) as progress:
        answer = partial(_answer, model, data)
        for answered in rounds(todo, answer, is_sharded=model.is_sharded):
            outcomes.update(answered)
            if samples is not None:
                samples.append(data, answered)
            progress.update(len(answered))
    results = results_of(data, outcomes)
    results[data.label]["seconds"] = time.monotonic() - began_at
    return results


def _finished(samples: Samples, data: TaskData) -> dict[int, Outcome]:
    return {
        question.doc_id: samples.finished[data.label, question.doc_id]
        for question in data.questions
        if (data.label, question.doc_id) in samples.finished
    }


def answer_round(model: Model, data: TaskData, batch: Batch | None) -> dict[int, Outcome]:
    """The outcomes of all ranks in a round, from each rank's own batch; all ranks call it."""
    return gathered({} if batch is None else _answer(model, data, batch))


def _answer(model: Model, data: TaskData, batch: Batch) -> dict[int, Outcome]:
    """This rank's outcomes of a batch."""
    if data.max_new_tokens:
        return _generate(model, data, batch.questions)
    scores = score_batch(model.network, batch)
    return {
        question.doc_id: judge_scores(data.task, question, scores[question.doc_id])
        for question in batch.questions
    }


def _generate(model: Model, data: TaskData, questions: Sequence[Question]) -> dict[int, Outcome]:
    options = dict(data.task.generation_kwargs)
    options.pop("max_new_tokens", None)
    samples = options.pop("do_sample", False)
    texts = continue_prompts(
        model.network,
        model.tokenizer,
        [list(question.rows[0].ids) for question in questions],
        data.max_new_tokens,
        Sampling(**options) if samples else Sampling(),
        data.task.early_stopping_criteria,
        None,
        to_the_end=model.is_sharded,
    )
    return {
        question.doc_id: judge_text(data.task, question, text)
        for question, text in zip(questions, texts, strict=True)
    }


def results_of(data: TaskData, outcomes: Mapping[int, Outcome]) -> dict[str, dict[str, float]]:
    """The results of a task, by doc_id -> outcome: `label` and `label/category` -> metric -> value."""
    categories = sorted({question.category for question in data.questions if question.category is not None})
    if not categories:
        return {data.label: task_metrics(data.task, [outcomes[each.doc_id] for each in data.questions])}
    apart = {
        f"{data.label}/{category}": task_metrics(
            data.task, [outcomes[each.doc_id] for each in data.questions if each.category == category]
        )
        for category in categories
    }
    return {data.label: mean_of_categories(data.task, list(apart.values())), **apart}
