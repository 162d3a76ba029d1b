"""Evaluations side by side: losses, and the answers to tasks, paired document by document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mptfoundry.config.engine.nested import leaves
from mptfoundry.errors import DataError
from mptfoundry.tasks.answers import SAMPLES, settings_hash

# An evaluation with another value of one of these asks the same questions, so the answers can be compared.
MAY_DIFFER = (
    "model",
    "base",
    "device",
    "precision",
    "attn_impl",
    "device_eval_batch_size",
    "versions",
    "mptfoundry",
)
# Settings of a task that change no question, or that are compared by their content.
_OF_NO_QUESTION = ("dataset_uri", "batch_size", "num_fewshot", "metric_names")
_WHAT_TO_DO = "Evaluate both again with the same settings."

Line = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's results and answers.

    Attributes:
        name: Short name.
        path: Its JSON file.
        model: The model's place, as the results name it.
        results: label -> metric -> value.
        options: What the command named.
        settings: All that changes the tasks' numbers; empty if no task was evaluated.
        answers: label -> doc_id -> line of the file of answers.
    """

    name: str
    path: Path
    model: str
    results: dict[str, dict[str, float]]
    options: dict[str, Any]
    settings: dict[str, Any]
    answers: dict[str, dict[int, Line]]

    @property
    def losses(self) -> dict[str, dict[str, float]]:
        """The results of labelled loaders."""
        return {label: metrics for label, metrics in self.results.items() if "tokens" in metrics}


def read_evaluation(path: Path, name: str) -> Evaluation:
    """Read an evaluation's `eval.json` and the answers next to it.

    Raises:
        DataError: A file is missing, damaged or of something else, or the answers are of another evaluation.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results, options = content["results"], content.get("options", {})
        settings, model = content.get("settings") or {}, str(content["model"])
        if not all(isinstance(metrics, dict) for metrics in results.values()):
            raise TypeError("results")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is not the results of an evaluation, or is damaged.") from error
    answers = _read_answers(path.with_suffix(".samples.jsonl"), path, settings) if settings else {}
    return Evaluation(name, path, model, results, options, settings, answers)


def _read_answers(path: Path, results: Path, settings: dict[str, Any]) -> dict[str, dict[int, Line]]:
    answers: dict[str, dict[int, Line]] = {}
    try:
        head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        for line in lines:
            label = f"{line['task']}/{line['shots'] or 0}-shot"
            if line["correct"] is not None:  # the answer to a part of a document, or of a task without one
                answers.setdefault(label, {})[line["doc_id"]] = line
        digest = head["settings"]
    except FileNotFoundError as error:
        text = f"{path}: is missing. The answers of {results} are needed to compare it; evaluate again."
        raise DataError(text) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is damaged, or is of an evaluation that has not ended.") from error
    if digest != settings_hash(settings):
        raise DataError(
            f"{path}: has the answers of another evaluation than {results}, which perhaps has not ended. "
            "Start that evaluation again: it continues where it stopped."
        )
    return answers


def refuse_incomparable(first: Evaluation, second: Evaluation) -> None:
    """Raise DataError, with all reasons, where two evaluations did not ask the same questions."""
    problems = [*_other_settings(first, second), *_other_losses(first, second)]
    for label in shared_labels(first, second):
        problems += _other_questions(label, first, second)
    if not problems and not shared_labels(first, second) and not (first.losses.keys() & second.losses.keys()):
        problems.append(
            f"they have no label in common: {first.name} has {', '.join(first.results)}, and {second.name} "
            f"has {', '.join(second.results)}."
        )
    if problems:
        lines = "\n".join(problems)
        raise DataError(f"{first.name} and {second.name} can't be compared:\n{lines}\n{_WHAT_TO_DO}")


def shared_labels(first: Evaluation, second: Evaluation) -> list[str]:
    """The tasks, with their numbers of examples, that both have answered."""
    return [label for label in first.answers if label in second.answers]


def _other_settings(first: Evaluation, second: Evaluation) -> Iterator[str]:
    if not first.settings or not second.settings:
        return
    yield from _other_public_tasks(first.settings.get("public") or {}, second.settings.get("public") or {})
    compared_apart = (*MAY_DIFFER, "tasks", "data", "tokenizer", "num_fewshot", "public")
    for key in sorted({*first.settings, *second.settings} - {*compared_apart}):
        values = first.settings.get(key), second.settings.get(key)
        if values[0] != values[1]:
            yield f"{key}: {_short(values[0])} and {_short(values[1])}."
    tasks = [{task["label"]: task for task in each.settings["tasks"]} for each in (first, second)]
    for name in (name for name in tasks[0] if name in tasks[1]):
        shots = [
            {label for label in each.answers if label.startswith(f"{name}/")} for each in (first, second)
        ]
        if not shots[0] & shots[1]:
            listed = " and ".join(", ".join(sorted(labels)) for labels in shots)
            yield f"{name}: {listed} have other numbers of examples."
        if first.settings["data"].get(name) != second.settings["data"].get(name):
            places = (task[name].get("dataset_uri") for task in tasks)
            yield f"{name}: other documents: {' and '.join(map(str, places))} differ."
        for key in sorted({*tasks[0][name], *tasks[1][name]} - {*_OF_NO_QUESTION}):
            values = tasks[0][name].get(key), tasks[1][name].get(key)
            if values[0] != values[1]:
                yield f"{name}: {key}: {_short(values[0])} and {_short(values[1])}."


def _other_public_tasks(first: dict[str, Any], second: dict[str, Any]) -> Iterator[str]:
    """Differences of the tasks by name that both have evaluated."""
    tasks = first.get("tasks", {}), second.get("tasks", {})
    if not tasks[0].keys() & tasks[1].keys():
        return
    for key in sorted({*first, *second} - {"tasks", "groups"}):
        if first.get(key) != second.get(key):
            yield f"{key}: {_short(first.get(key))} and {_short(second.get(key))}."
    for name in (name for name in tasks[0] if name in tasks[1]):
        for key in sorted({*tasks[0][name], *tasks[1][name]} - {"num_fewshot"}):
            values = tasks[0][name].get(key), tasks[1][name].get(key)
            if values[0] != values[1]:
                yield f"{name}: {key}: {_short(values[0])} and {_short(values[1])}."


def _other_questions(label: str, first: Evaluation, second: Evaluation) -> Iterator[str]:
    ours, theirs = first.answers[label], second.answers[label]
    if ours.keys() != theirs.keys():
        common = len(ours.keys() & theirs.keys())
        yield f"{label}: {len(ours)} documents and {len(theirs)}, with {common} in common."
        return
    for doc_id, line in ours.items():
        other = theirs[doc_id]
        if line["prompt_hash"] != other["prompt_hash"] and _tokenizers_differ(first, second):
            yield f"{label}: the tokenizers differ, so that the models did not read the same token ids."
            return
        for key in ("prompt_hash", "choices", "gold"):
            if line[key] != other[key]:
                yield f"{label}: document {doc_id} has another {key.replace('_hash', '')} in {second.name}."
                return


def _tokenizers_differ(first: Evaluation, second: Evaluation) -> bool:
    return first.settings.get("tokenizer") != second.settings.get("tokenizer")


def _other_losses(first: Evaluation, second: Evaluation) -> Iterator[str]:
    for label in (label for label in first.losses if label in second.losses):
        tokens = first.losses[label]["tokens"], second.losses[label]["tokens"]
        if tokens[0] != tokens[1]:
            yield f"{label}: losses over {tokens[0]:,.0f} and {tokens[1]:,.0f} tokens."
    for key in ("max_seq_len", "eval_subset_num_batches") if first.losses and second.losses else ():
        values = first.options.get(key), second.options.get(key)
        if values[0] != values[1]:
            yield f"{key}: {values[0]} and {values[1]}."


def differing_settings(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The settings of each by key, among them only those that may differ, and where the model is."""
    described = []
    for each in evaluations:
        of_tasks = {key: each.settings[key] for key in MAY_DIFFER if key in each.settings and key != "model"}
        chosen = of_tasks or {key: each.options.get(key) for key in ("base", "precision", "attn_impl")}
        values = {".".join(map(str, path)): value for path, value in leaves(chosen, lists=False)}
        described.append({"model": each.model, **{key: v for key, v in values.items() if v is not None}})
    return described


def document_texts(evaluation: Evaluation, task: str, doc_ids: Iterable[int]) -> dict[int, str]:
    """The questions of some documents, if the task's file is still the one that was evaluated."""
    uris = [each["dataset_uri"] for each in evaluation.settings["tasks"] if each["label"] == task]
    try:
        path = Path(uris[0]).expanduser()
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != evaluation.settings["data"].get(task):
            return {}
        lines = [line for line in content.decode().splitlines() if line.strip()]
        documents = {doc_id: json.loads(lines[doc_id]) for doc_id in doc_ids}
    except (OSError, ValueError, IndexError):
        return {}
    return {
        doc_id: str(document.get("query") or document.get("context") or document.get("continuation") or "")
        for doc_id, document in documents.items()
    }


def find_evaluation(place: Path) -> Path | None:
    """The JSON file of the evaluation that a path names; None if it names something else.

    Raises:
        DataError: It has several evaluations.
    """
    if place.is_file():
        return place if place.suffix == ".json" else None
    if (place / "eval.json").is_file():
        return place / "eval.json"
    inner = sorted([*place.glob("*/eval.json"), *place.glob("evals/*/eval.json")])
    if len(inner) > 1:
        listed = "\n".join(f"  {path.parent}" for path in inner)
        raise DataError(f"{place}: has several evaluations. Name one of them:\n{listed}")
    if not inner and list(place.glob(SAMPLES)):
        raise DataError(
            f"{place}: its evaluation has not ended. Start it again: it continues where it stopped."
        )
    return inner[0] if inner else None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
