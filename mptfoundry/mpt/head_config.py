"""Options of task heads, which replace a network's output projection.

The names of the options (`num_labels`, `problem_type`, `id2label`) and of the weights are transformers'. Like
config.py, this module imports only the standard library and raises ValueError for invalid values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from .config import PROBABILITY, MPTConfig, Problem, Rules, whole

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


@dataclass(frozen=True)
class HeadConfig(MPTConfig):
    """The architecture of an MPT that ends in a head; one of the three classes below.

    `architecture` is transformers' class and `task` the Hub's name of its task; `head` is the head's module:
    a matrix, and a bias if `has_bias`.
    """

    architecture: ClassVar[str]
    task: ClassVar[str]
    head: ClassVar[str]
    has_bias: ClassVar[bool] = True

    @property
    def outputs(self) -> int:
        """Outputs of the head per token."""
        return 2

    def head_keys(self) -> dict[str, Any]:
        """What the head adds to transformers' `config.json`."""
        return {"architectures": [self.architecture]}


@dataclass(frozen=True)
class _LabelsConfig(HeadConfig):
    """A head with an output for each label.

    Attributes:
        num_labels: Number of labels.
        id2label: Name of each label by number: `{0: negative, 1: positive}`. Default: LABEL_0, LABEL_1, ...
    """

    num_labels: int = 2
    id2label: dict[str, str] | None = None

    limits: ClassVar = {**MPTConfig.limits, "num_labels": whole()}

    def rules(self) -> Rules:
        yield from super().rules()
        yield self._names_of_labels()

    def _names_of_labels(self) -> Iterator[Problem]:
        given = self.id2label
        if given is not None and set(given) != {str(number) for number in range(self.num_labels)}:
            yield (
                "id2label",
                f"has the numbers {', '.join(given)}. Name each from 0 to {self.num_labels - 1}, "
                f"since num_labels is {self.num_labels}.",
            )
        elif given is not None and len(set(given.values())) < len(given):
            yield "id2label", "two labels have the same name. Give each a name of its own."

    def _several_labels(self) -> Iterator[Problem]:
        if self.num_labels < 2:
            yield "num_labels", "one label leaves nothing to choose. Use 2 or more."

    @property
    def outputs(self) -> int:
        """Outputs of the head per token: one for each label."""
        return self.num_labels

    @property
    def label2id(self) -> dict[str, int]:
        """The labels' indices by name, in order."""
        names = self.id2label or {str(n): f"LABEL_{n}" for n in range(self.num_labels)}
        return {names[str(number)]: number for number in range(self.num_labels)}

    def head_keys(self) -> dict[str, Any]:
        """The head's keys in transformers' `config.json`; the names imply the number of labels."""
        numbers = self.label2id
        return {
            **super().head_keys(),
            "id2label": {str(number): name for name, number in numbers.items()},
            "label2id": numbers,
        }


@dataclass(frozen=True)
class SequenceClassifierConfig(_LabelsConfig):
    """An MPT that classifies or rates texts, from the output for their last token.

    Attributes:
        name: The kind of model.
        problem_type: What a text is labelled with: numbers (`regression`), one label, or any number of
            labels. Default: `regression` if `num_labels` is 1, else `single_label_classification`.
    """

    architecture: ClassVar[str] = "MptForSequenceClassification"
    task: ClassVar[str] = "text-classification"
    head: ClassVar[str] = "score"
    has_bias: ClassVar[bool] = False

    name: Literal["mpt_sequence_classification"] = "mpt_sequence_classification"
    problem_type: ProblemType | None = None

    def rules(self) -> Rules:
        yield from super().rules()
        yield self._several_labels()

    def _several_labels(self) -> Iterator[Problem]:
        if self.problem == "single_label_classification":
            yield from super()._several_labels()

    @property
    def problem(self) -> ProblemType:
        """`problem_type`, or its default."""
        default: ProblemType = "regression" if self.num_labels == 1 else "single_label_classification"
        return self.problem_type or default

    def head_keys(self) -> dict[str, Any]:
        """What the head adds to transformers' `config.json`."""
        given = {} if self.problem_type is None else {"problem_type": self.problem_type}
        return super().head_keys() | given


@dataclass(frozen=True)
class TokenClassifierConfig(_LabelsConfig):
    """An MPT that classifies each token.

    Attributes:
        name: The kind of model.
        classifier_dropout: Dropout probability before the head.
    """

    architecture: ClassVar[str] = "MptForTokenClassification"
    task: ClassVar[str] = "token-classification"
    head: ClassVar[str] = "classifier"

    name: Literal["mpt_token_classification"] = "mpt_token_classification"
    classifier_dropout: float = 0.1

    limits: ClassVar = {**_LabelsConfig.limits, "classifier_dropout": PROBABILITY}

    def rules(self) -> Rules:
        yield from super().rules()
        yield self._several_labels()

    def head_keys(self) -> dict[str, Any]:
        """What the head adds to transformers' `config.json`."""
        return {**super().head_keys(), "classifier_dropout": float(self.classifier_dropout)}


@dataclass(frozen=True)
class SpanFinderConfig(HeadConfig):
    """An MPT that answers a question with a span of a text: it rates each token as the first and as the last.

    Attributes:
        name: The kind of model.
    """

    architecture: ClassVar[str] = "MptForQuestionAnswering"
    task: ClassVar[str] = "question-answering"
    head: ClassVar[str] = "qa_outputs"

    name: Literal["mpt_question_answering"] = "mpt_question_answering"


def trunk_of(config: MPTConfig) -> MPTConfig:
    """The architecture without its head, if any."""
    return MPTConfig(**{field.name: getattr(config, field.name) for field in fields(MPTConfig)})


HEADS: tuple[type[HeadConfig], ...] = (SequenceClassifierConfig, TokenClassifierConfig, SpanFinderConfig)


def head_named(word: str | None) -> type[HeadConfig] | None:
    """The head for a model's `name`, or for the name of transformers' class; None for other names."""
    return next((kind for kind in HEADS if word in (vars(kind)["name"], kind.architecture)), None)
