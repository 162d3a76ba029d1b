"""The `icl_tasks` and `eval_gauntlet` sections: in-context tasks and how their scores are averaged.

Keys and defaults are llm-foundry's. Both sections also stand in files of their own, as in its repository.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mptfoundry.config.engine.section_rules import Limits, Problem, Rules, Section, not_empty, only_one

TaskType = Literal["multiple_choice", "schema", "language_modeling", "generation_task_with_answers"]
# What is measured of a task of each type; the first is the task's score.
METRICS: dict[str, tuple[str, ...]] = {
    "multiple_choice": (
        "InContextLearningMultipleChoiceAccuracy",
        "InContextLearningMCExpectedCalibrationError",
    ),
    "schema": ("InContextLearningMultipleChoiceAccuracy", "InContextLearningMCExpectedCalibrationError"),
    "language_modeling": ("InContextLearningLMAccuracy", "InContextLearningLMExpectedCalibrationError"),
    "generation_task_with_answers": ("InContextLearningGenerationExactMatchAccuracy",),
}
GENERATION_KEYS = ("max_new_tokens", "temperature", "top_k", "top_p", "do_sample")


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Section):
    """A task that a model answers from its context, with the documents of a JSONL file.

    Attributes:
        label: Name of the task in all results.
        dataset_uri: A JSONL file, or the URL of one in an object store; or `hf://NAME` for a data set on the
            Hugging Face hub or a folder of one. Its lines have `query, choices, gold`
            (multiple_choice), `context_options, continuation, gold` (schema), `context, continuation`
            (language_modeling) or `context, answer` and perhaps `aliases, chain_of_thought`
            (generation_task_with_answers).
        icl_task_type: How the model answers. multiple_choice: the choice with the highest mean
            log-likelihood of its tokens. schema: the same for a continuation after several contexts.
            language_modeling: each token of the continuation is the most likely one.
            generation_task_with_answers: the generated text starts with an answer.
        num_fewshot: Solved examples before each question; a list evaluates the task once with each number.
        metric_names: The metrics to report. Default: all of the task's type.
        batch_size: Texts in a batch, instead of the evaluation's.
        max_seq_len: The most tokens of a question with its examples; what exceeds it is cut on the left.
            Default: the evaluation's.
        prompt_string: Text before all examples.
        example_delimiter: Text between examples.
        continuation_delimiter: Text between a question and its answer.
        prelimiter: Text before each question.
        question_prelimiter: An older name of `prelimiter`.
        has_categories: Also report each category apart, by the `category` of the lines.
        fewshot_random_seed: Seed of the choice of examples.
        strip_dataset: Remove white space at both ends of all texts of a line.
        generation_kwargs: `max_new_tokens`, `do_sample`, `temperature`, `top_k` and `top_p` of generated
            answers. By default they are as long as the longest right answer, and greedy.
        cot_delimiter: Text between a chain of thought and the answer.
        early_stopping_criteria: Texts that end a generated answer.
        do_normalization: Compare generated answers without case, punctuation and articles.
        hf_loading_vars: Arguments of `datasets.load_dataset` for `hf://`, such as `{split: test}`.
        hf_parsing_map: Field of a line -> the columns of an `hf://` data set that it is made of, joined by
            blanks. Default: the data set has the fields itself.
    """

    label: str
    dataset_uri: str
    icl_task_type: TaskType
    num_fewshot: tuple[int, ...] | int
    metric_names: tuple[str, ...] | None = None
    batch_size: int | None = None
    max_seq_len: int | None = None
    prompt_string: str = ""
    example_delimiter: str = "\n"
    continuation_delimiter: str = " "
    prelimiter: str = ""
    question_prelimiter: str | None = None
    has_categories: bool = False
    fewshot_random_seed: int = 1234
    strip_dataset: bool = True
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    cot_delimiter: str = ""
    early_stopping_criteria: tuple[str, ...] = ()
    do_normalization: bool = True
    hf_loading_vars: dict[str, Any] = field(default_factory=dict)
    hf_parsing_map: dict[str, tuple[str, ...]] = field(default_factory=dict)

    limits: ClassVar = {"batch_size": Limits(1), "max_seq_len": Limits(2)}

    def rules(self) -> Rules:
        yield not_empty(self, "label")
        yield not_empty(self, "dataset_uri")
        yield only_one(self, "are the same. Use prelimiter.", "prelimiter", "question_prelimiter")
        yield self._shots()
        yield self._metrics()
        yield self._generation()
        yield from map(self._of_the_hub, ("hf_loading_vars", "hf_parsing_map"))

    def _of_the_hub(self, key: str) -> Iterator[Problem]:
        if getattr(self, key) and not self.is_on_the_hub:
            yield key, "has no effect unless dataset_uri begins with hf://. Remove it."

    def _shots(self) -> Iterator[Problem]:
        if not self.shots:
            yield "num_fewshot", "is empty. Use [0] for questions without examples."
        if any(number < 0 for number in self.shots):
            yield "num_fewshot", f"{min(self.shots)} is too small. Use 0 or more."

    def _metrics(self) -> Iterator[Problem]:
        allowed = METRICS[self.icl_task_type]
        for name in self.metric_names or ():
            if name not in allowed:
                yield (
                    "metric_names",
                    f"{name} is not a metric of {self.icl_task_type}. Use {' or '.join(allowed)}.",
                )

    def _generation(self) -> Iterator[Problem]:
        for key in self.generation_kwargs:
            if key not in GENERATION_KEYS:
                yield "generation_kwargs", f"{key} is not known. Use some of {', '.join(GENERATION_KEYS)}."

    @property
    def shots(self) -> tuple[int, ...]:
        """The numbers of examples to evaluate with."""
        return (self.num_fewshot,) if isinstance(self.num_fewshot, int) else tuple(self.num_fewshot)

    @property
    def is_on_the_hub(self) -> bool:
        """Whether the `datasets` library reads the task's data."""
        return self.dataset_uri.startswith("hf://")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics to report; the first is the task's score."""
        return self.metric_names or METRICS[self.icl_task_type]

    @property
    def before_questions(self) -> str:
        """Text before each question."""
        return self.question_prelimiter or self.prelimiter


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(Section):
    """A task in a category of the gauntlet.

    Attributes:
        name: The task's label.
        num_fewshot: The number of examples whose score counts.
        random_baseline: Accuracy of random answers.
    """

    name: str
    num_fewshot: int
    random_baseline: float = 0.0

    limits: ClassVar = {"num_fewshot": Limits(0), "random_baseline": Limits(0)}

    def rules(self) -> Rules:
        yield self._baseline()

    def _baseline(self) -> Iterator[Problem]:
        if self.random_baseline >= 1:
            yield "random_baseline", f"{self.random_baseline} is too large. Use less than 1."


@dataclass(frozen=True, kw_only=True)
class CategoryConfig(Section):
    """A category of the gauntlet; its score is the weighted mean of its tasks' scores.

    Attributes:
        name: Name of the category in the results.
        benchmarks: Its tasks.
    """

    name: str
    benchmarks: tuple[BenchmarkConfig, ...]

    def rules(self) -> Rules:
        yield self._some()

    def _some(self) -> Iterator[Problem]:
        if not self.benchmarks:
            yield "benchmarks", "is empty. Name the category's tasks, or remove the category."


@dataclass(frozen=True, kw_only=True)
class GauntletConfig(Section):
    """One score for each of several abilities, and averages of them.

    Attributes:
        categories: The abilities, each with its tasks.
        weighting: Weight of a task in its category: EQUAL, its number of documents (SAMPLE_SZ) or the
            logarithm of that (LOG_SAMPLE_SZ).
        subtract_random_baseline: Subtract the accuracy of random answers.
        rescale_accuracy: Divide by what is left, so that all tasks end at 1.
        averages: Means over categories by name. Default: `default_average`, over all.
    """

    categories: tuple[CategoryConfig, ...]
    weighting: Literal["EQUAL", "SAMPLE_SZ", "LOG_SAMPLE_SZ"] = "EQUAL"
    subtract_random_baseline: bool = True
    rescale_accuracy: bool = True
    averages: dict[str, tuple[str, ...]] | None = None

    def rules(self) -> Rules:
        yield self._some()
        yield self._scale()
        yield self._names()

    def _some(self) -> Iterator[Problem]:
        if not self.categories:
            yield "categories", "is empty. Name a category with its tasks."

    def _scale(self) -> Iterator[Problem]:
        if self.rescale_accuracy and not self.subtract_random_baseline:
            yield "rescale_accuracy", "needs subtract_random_baseline: true."

    def _names(self) -> Iterator[Problem]:
        names = [category.name for category in self.categories]
        for average, members in (self.averages or {}).items():
            if average in names:
                yield "averages", f"{average} is also the name of a category. Rename one of them."
            for name in set(members) - set(names):
                yield "averages", f"{name} in {average} is not a category. Use some of {', '.join(names)}."

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all scores: categories and averages."""
        return (*(category.name for category in self.categories), *self.named_averages)

    @property
    def named_averages(self) -> dict[str, tuple[str, ...]]:
        """Average -> its categories."""
        return self.averages or {"default_average": tuple(category.name for category in self.categories)}


@dataclass(frozen=True, kw_only=True)
class TaskFileConfig(Section):
    """A file of tasks, of a gauntlet, or of both.

    Attributes:
        icl_tasks: The tasks.
        eval_gauntlet: How their scores are averaged.
    """

    icl_tasks: tuple[TaskConfig, ...] = ()
    eval_gauntlet: GauntletConfig | None = None


def missing_benchmarks(tasks: Sequence[TaskConfig], gauntlet: GauntletConfig) -> Iterator[Problem]:
    """The benchmarks of a gauntlet that are not evaluated, by their keys below the gauntlet's."""
    known = [f"{task.label}/{shots}-shot" for task in tasks for shots in task.shots]
    for number, category in enumerate(gauntlet.categories):
        for place, benchmark in enumerate(category.benchmarks):
            label = f"{benchmark.name}/{benchmark.num_fewshot}-shot"
            if label not in known:
                near = difflib.get_close_matches(label, known, 3, 0.4)
                text = f"{label} is not among the tasks of icl_tasks. Add it there with this num_fewshot, or "
                text += "remove it here." + (f" Similar ones: {', '.join(near)}." if near else "")
                yield f"categories[{number}].benchmarks[{place}].name", text
