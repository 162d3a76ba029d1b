"""Records of labelled data sets: read as those of finetuning are, and checked.

By task a record has the fields

    sequence   `text`, perhaps `text_pair`, `label`: a name or number, or numbers, or a list of names
    token      `words`, `labels`: one name or number for each word, -100 where none is learned
    span       `question`, `context`, `answers`: {text: [...], answer_start: [...]}, as in SQuAD

or other names for these, which the user gives. Errors name the place, such as `train.jsonl:3: label: ...`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mptfoundry.data.collate import NOT_LEARNED
from mptfoundry.data.records.inputs import Inventory
from mptfoundry.data.records.records import BadInput, names_of, plan_units, read_rows, shown, text_of
from mptfoundry.errors import DataError

LARGEST_NUMBER = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Record:
    """A record's values by the names above, and where it lies.

    Attributes:
        where: Says where it lies; that begins every error.
        values: What was read.
        names: Names above -> names in the data, where they differ.
    """

    where: Callable[[], str]
    values: Mapping[str, Any]
    names: Mapping[str, str]

    def get(self, name: str) -> Any:
        """A value; None if it is null or not there."""
        return self.values.get(self.names.get(name, name))

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None and self.names.get(name, name) in self.values:
            raise self.error(name, "is null. Remove the record, or fill it in")
        if value is None:
            raise self.error(
                name, f"is missing; there are {names_of(self.values)}. Name it: dataset.fields.{name}"
            )
        return value

    def text(self, name: str) -> str:
        """A text that is not blank."""
        return self.checked_text(self[name], name)

    def checked_text(self, value: Any, name: str) -> str:
        """A value of a field, which has to be a text that is not blank."""
        try:
            text = text_of(value) if isinstance(value, (str, bytes)) else ""
        except ValueError as error:
            raise self.error(name, str(error)) from error
        if not text.strip():
            raise self.error(name, f"{_short(value)} is not a text with characters")
        return text

    def error(self, name: str, text: str) -> DataError:
        """What is wrong with a field."""
        return DataError(f"{self.where()}: {self.names.get(name, name)}: {text}.")


class Checked(NamedTuple):
    """A record's text, or its two texts, and what is to be found: a number or numbers; the words' first
    characters and their numbers; or the first answer's first character and all answers.
    """

    first: str
    second: str | None
    wanted: Any


def read_records(inventory: Inventory, names: Mapping[str, str]) -> Iterator[Record]:
    """Read all records, in order.

    Args:
        inventory: The files or data set that hold them.
        names: As in Record.

    Raises:
        DataError: Nothing is there, or it can't be read.
    """
    for unit in plan_units(inventory.inputs, inventory.datasets, cut_texts=False):
        for row in (row for part in unit.parts for row in read_rows(part, inventory.datasets)):
            if isinstance(row, BadInput):
                raise row
            if not isinstance(row.values, dict):
                raise DataError(f"{row.where()}: this is {_short(row.values)}, not an object with fields.")
            yield Record(row.where, row.values, names)


def check_text(record: Record, labels: Mapping[str, int], problem: str) -> Checked:
    """A text with its label; `problem` is transformers' `problem_type`."""
    text, pair, label = record.text("text"), record.get("text_pair"), record["label"]
    pair = None if pair is None else record.text("text_pair")
    if problem == "single_label_classification":
        return Checked(text, pair, label_number(label, labels, record, "label"))
    are_choices = problem == "multi_label_classification"
    if are_choices and isinstance(label, list) and all(isinstance(name, str) for name in label):
        chosen = {label_number(name, labels, record, "label") for name in label}
        label = [float(number in chosen) for number in range(len(labels))]
    numbers = label if isinstance(label, list) else [label]
    fits = isinstance(label, list) == (are_choices or len(labels) > 1) and len(numbers) == len(labels)
    if not fits or not all(_is_number(n) and (n in (0, 1) or not are_choices) for n in numbers):
        expected = f"a list of {len(labels)} numbers" if are_choices or len(labels) > 1 else "a number"
        more = ", each 0 or 1, or a list of names" * are_choices
        raise record.error("label", f"{_short(label)} is not {expected}{more} (problem_type: {problem})")
    return Checked(text, pair, label)


def check_words(record: Record, labels: Mapping[str, int]) -> Checked:
    """Words, joined by spaces, with a label for each."""
    words, given = record["words"], record["labels"]
    for name, value in (("words", words), ("labels", given)):
        if not isinstance(value, list) or not value:
            raise record.error(name, f"{_short(value)} is not a list with entries")
    if len(words) != len(given):
        raise record.error("labels", f"there are {len(given)} for {len(words)} words")
    words = [record.checked_text(word, "words") for word in words]
    numbers = [n if n == NOT_LEARNED else label_number(n, labels, record, "labels") for n in given]
    begins, text = [], ""
    for word in words:
        text += " " * bool(text)
        begins.append(len(text))
        text += word.strip()
    return Checked(text, None, (begins, numbers))


def check_answer(record: Record) -> Checked:
    """A question and its context, with answers that stand there."""
    context, answers = record.text("context"), record["answers"]
    if isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        answers = {name: [answer.get(name) for answer in answers] for name in ("text", "answer_start")}
    if not isinstance(answers, dict):
        raise record.error("answers", f"{_short(answers)} is not {{text: [...], answer_start: [...]}}")
    texts, starts = answers.get("text"), answers.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or not len(texts) == len(starts) > 0:
        raise record.error("answers", "has no text, or not one answer_start for each. Remove the question")
    for text, start in zip(texts, starts, strict=True):
        if type(start) is not int:
            raise record.error("answers", f"answer_start: {_short(start)} is no whole number")
        is_text = isinstance(text, str) and text.strip() and start >= 0
        if not is_text or context[start : start + len(text)] != text:
            raise record.error("answers", f"{_short(text)} does not stand at {start} in the context")
    return Checked(record.text("question"), context, (starts[0], texts))


def label_number(label: Any, labels: Mapping[str, int], record: Record, name: str) -> int:
    """The number of a label that is given by its name or number."""
    if isinstance(label, str) and label in labels:
        return labels[label]
    if type(label) is int and 0 <= label < len(labels):
        return label
    known = ", ".join([*labels][:8]) + ", ..." * (len(labels) > 8)
    raise record.error(name, f"{_short(label)} is no label. Use 0 to {len(labels) - 1}, or a name: {known}")


def _is_number(value: Any) -> bool:
    """Whether it is a number that float32 holds."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= LARGEST_NUMBER


def _short(value: Any) -> str:
    """A value as JSON has it, cut to one short line."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return shown(value)
    text = text if text.isprintable() else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
