"""Whether a model answered a question rightly, and the metrics of a task over all of its questions.

The metrics and their names are llm-foundry's.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mptfoundry.config.tasks import TaskConfig
from mptfoundry.tasks.questions import Question

if TYPE_CHECKING:  # `compare` reads answers without torch
    from mptfoundry.tasks.scoring import Score

_BUCKETS = 10
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


@dataclass(frozen=True)
class Outcome:
    """A model's answer to one question.

    Attributes:
        chosen: Index of its choice, or the text that it generated.
        is_correct: Whether that is right.
        confidence: How sure it was, from 0 to 1; NaN for a generated answer.
        is_confidently_correct: Whether the answer that it was surest of is right.
        loglikelihoods: Of each choice, in nats.
        tokens: The number of tokens of each choice.
    """

    chosen: int | str
    is_correct: bool
    confidence: float = math.nan
    is_confidently_correct: bool = False
    loglikelihoods: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()


def judge_scores(task: TaskConfig, question: Question, scores: Sequence[Score]) -> Outcome:
    """Judge the scores of a question's rows."""
    totals = tuple(score.total for score in scores)
    tokens = tuple(len(score.logprobs) for score in scores)
    if task.icl_task_type == "language_modeling":
        right = scores[0].is_greedy
        return Outcome(0 if right else -1, right, scores[0].confidence, right, totals, tokens)
    means = [score.mean for score in scores]
    chosen = means.index(max(means))
    # Calibration goes by the mean probability of a choice's tokens, not by their mean log-likelihood.
    sureness = [sum(map(math.exp, score.logprobs)) / len(score.logprobs) for score in scores]
    surest = sureness.index(max(sureness))
    total = sum(sureness)
    confidence = sureness[surest] / total if total else 1 / len(sureness)
    return Outcome(chosen, chosen == question.gold, confidence, surest == question.gold, totals, tokens)


def judge_text(task: TaskConfig, question: Question, text: str) -> Outcome:
    """Judge a generated answer: after normalisation it has to start with a right one."""
    answer = text
    if task.early_stopping_criteria:
        answer = re.split("|".join(map(re.escape, task.early_stopping_criteria)), answer)[0]
    if task.cot_delimiter:
        answer = answer.split(task.cot_delimiter)[-1]
    plain = normalised if task.do_normalization else str.strip
    is_correct = any(plain(answer).startswith(plain(right)) for right in question.choices)
    return Outcome(text, is_correct)


def normalised(answer: str) -> str:
    """Lower case, without punctuation, articles and repeated white space."""
    text = answer.replace("_", " ").lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def task_metrics(task: TaskConfig, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The metrics over some questions of a task, the standard error of its score, and their number."""
    count = len(outcomes)
    accuracy = sum(outcome.is_correct for outcome in outcomes) / count
    results = {
        name: calibration_error(outcomes) if name.endswith("CalibrationError") else accuracy
        for name in task.metrics
    }
    error = math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else math.nan
    return {**results, "stderr": error, "documents": float(count)}


def mean_of_categories(task: TaskConfig, categories: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of a task with categories: the mean over them, each counting the same."""
    count = len(categories)
    results = {name: sum(each[name] for each in categories) / count for name in task.metrics}
    error = math.sqrt(sum(each["stderr"] ** 2 for each in categories)) / count
    return {**results, "stderr": error, "documents": sum(each["documents"] for each in categories)}


def calibration_error(outcomes: Sequence[Outcome]) -> float:
    """Expected calibration error: the mean gap of confidence and accuracy in ten buckets of confidence.

    A bucket's confidence is its middle (Guo et al. 2017, arXiv:1706.04599, as llm-foundry computes it).
    """
    buckets: list[list[bool]] = [[] for _ in range(_BUCKETS)]
    for outcome in outcomes:
        number = min(int(outcome.confidence * _BUCKETS), _BUCKETS - 1)
        buckets[number].append(outcome.is_confidently_correct)
    return sum(
        len(bucket) / len(outcomes) * abs(sum(bucket) / len(bucket) - (number + 0.5) / _BUCKETS)
        for number, bucket in enumerate(buckets)
        if bucket
    )
