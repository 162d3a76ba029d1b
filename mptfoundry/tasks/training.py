"""In-context tasks at the evaluations of a training run, on the live model.

Each task is one of Composer's evaluators, after those of the loss, so that it has the interval, the loggers
and the signals of every evaluation. Its batches are rounds of `tasks/evaluation.py`. The metrics have
llm-foundry's names, such as `metrics/copa/0-shot/InContextLearningMultipleChoiceAccuracy` and
`icl/metrics/eval_gauntlet/default_average`.

No random number is drawn, so a run trains the same weights with and without tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Callback, DataSpec, Evaluator, State
from composer.loggers import Logger
from torch.distributed.fsdp import FSDPModule
from torchmetrics import Metric

from mptfoundry.config.load import tasks_of_run
from mptfoundry.config.run import TrainConfig
from mptfoundry.config.tasks import TaskConfig
from mptfoundry.plan.plan import Plan
from mptfoundry.ranks import say
from mptfoundry.tasks.evaluation import answer_round, build_tasks, results_of
from mptfoundry.tasks.gauntlet import gauntlet_scores
from mptfoundry.tasks.outcomes import Outcome
from mptfoundry.tasks.questions import TaskData
from mptfoundry.tasks.scoring import Batch, Model, plan_batches, plan_rounds

GAUNTLET = "icl/metrics/eval_gauntlet"


class InContextTasks(Callback):
    """Adds the tasks of a config to the evaluators of its trainer, and logs the gauntlet's averages.

    Args:
        config: The run; its tasks' files are read here.
        plan: Its plan.
        tokenizer: The model's.

    Attributes:
        averages: The names of the gauntlet's averages in loggers.

    Raises:
        ConfigError, DataError: A file of tasks or data is missing or wrong, or the gauntlet lacks a task.
    """

    def __init__(self, config: TrainConfig, plan: Plan, tokenizer: Any) -> None:
        self._batch_size, self._limit = plan.device_eval_batch_size, config.icl_subset_num_batches
        self._interval, self._is_compiled = config.eval_interval, config.compile_config is not None
        self._tokenizer = tokenizer
        self._max_seq_len = config.icl_seq_len or config.max_seq_len
        tasks, self._gauntlet = tasks_of_run(config)
        self._tasks, _ = build_tasks(
            tasks,
            self._gauntlet,
            tokenizer,
            max_seq_len=self._max_seq_len,
            num_fewshot=None,
            limit=self._limit_of,
        )
        averages = () if self._gauntlet is None else self._gauntlet.names
        self.averages = tuple(f"{GAUNTLET}/{name}" for name in averages)
        self._answers = {data.label: Answers(data) for data in self._tasks}

    def after_load(self, state: State, logger: Logger) -> None:
        """Add the evaluators, once the model is sharded."""
        model: Any = state.model.module if state.is_model_ddp else state.model
        answers = Model(model.model, self._tokenizer, is_sharded=isinstance(model.model, FSDPModule))
        _let_answer(model, answers, is_compiled=self._is_compiled)
        for data in self._tasks:
            cut = sum(question.is_cut for question in data.questions)
            if cut:
                say(f"{data.label}: {cut} of {len(data.questions)} documents are too long: cut on the left")
            tokens = self._size_of(data.task) * self._max_seq_len
            batches = plan_rounds(plan_batches(data.questions, tokens), is_sharded=answers.is_sharded)
            rounds = [Round(data, batch) for batch in batches]
            state.evaluators.append(_evaluator(data.label, rounds, self._interval))
            state.eval_metrics[data.label] = self._answers[data.label].metrics()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Log the gauntlet's averages with the last task."""
        if self._gauntlet is None or state.dataloader_label != self._tasks[-1].label:
            return
        results = {label: answers.results[label] for label, answers in self._answers.items()}
        accuracies = {data.label: results[data.label][data.task.metrics[0]] for data in self._tasks}
        documents = {label: int(each["documents"]) for label, each in results.items()}
        scores = gauntlet_scores(self._gauntlet, accuracies, documents)
        logger.log_metrics({f"{GAUNTLET}/{name}": score for name, score in scores.items()})

    def _size_of(self, task: TaskConfig) -> int:
        return task.batch_size or self._batch_size

    def _limit_of(self, task: TaskConfig) -> int:
        return -1 if self._limit < 0 else self._limit * self._size_of(task)


@dataclass(frozen=True)
class Round:
    """A round of a task, as a batch of its evaluator; `batch` is this rank's, None without one."""

    data: TaskData
    batch: Batch | None


class Answers:
    """The outcomes of a task in one evaluation, which its metrics share.

    Attributes:
        data: The task's questions.
        outcomes: doc_id -> outcome, of all ranks.
    """

    def __init__(self, data: TaskData) -> None:
        self.data = data
        self.outcomes: dict[int, Outcome] = {}
        self._results: dict[str, dict[str, float]] | None = None

    def add(self, outcomes: dict[int, Outcome]) -> None:
        """Add the outcomes of a round."""
        self.outcomes |= outcomes
        self._results = None

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """`label` and `label/category` -> metric -> value."""
        if self._results is None:
            self._results = results_of(self.data, self.outcomes)
        return self._results

    def metrics(self) -> dict[str, Metric]:
        """The metrics of the task and of its categories, by their names below its label."""
        label, names = self.data.label, (*self.data.task.metrics, "stderr")
        categories = dict.fromkeys(question.category for question in self.data.questions)
        labels = [label, *(f"{label}/{each}" for each in sorted(c for c in categories if c is not None))]
        return {
            f"{each}/{name}".removeprefix(f"{label}/"): AnswerMetric(self, each, name)
            for each in labels
            for name in names
        }


class AnswerMetric(Metric):
    """One metric of a task or of one of its categories."""

    full_state_update = False

    def __init__(self, answers: Answers, label: str, name: str) -> None:
        super().__init__(sync_on_compute=False)  # a round's outcomes are those of all ranks already
        self._answers, self._label, self._name = answers, label, name

    def update(self, batch: Round, outcomes: dict[int, Outcome]) -> None:
        """Add the outcomes of a round."""
        self._answers.add(outcomes)

    def compute(self) -> torch.Tensor:
        """The metric's value, float64."""
        return torch.tensor(self._answers.results[self._label][self._name], dtype=torch.float64)

    def reset(self) -> None:
        """Forget the outcomes of the previous evaluation."""
        super().reset()
        self._answers.outcomes = {}


def _let_answer(model: Any, answers: Model, *, is_compiled: bool) -> None:
    """Let the model of a trainer also evaluate rounds."""
    evaluate: Callable[..., Any] = model.eval_forward

    def eval_forward(batch: Any, outputs: Any = None) -> Any:
        if not isinstance(batch, Round):
            return evaluate(batch, outputs)
        # Rounds differ in their shapes, and compiling for each would take longer than computing.
        with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
            return answer_round(answers, batch.data, batch.batch)

    model.eval_forward = eval_forward


def _evaluator(label: str, rounds: Sequence[Round], interval: int | str) -> Evaluator:
    spec = DataSpec(
        list(rounds),
        split_batch=lambda batch, size: [batch],
        get_num_samples_in_batch=lambda batch: 0 if batch.batch is None else len(batch.batch.questions),
        get_num_tokens_in_batch=lambda batch: 0,
    )
    return Evaluator(
        label=label,
        dataloader=spec,
        eval_interval=interval,
        subset_num_batches=-1,
        device_eval_microbatch_size=1,
    )
