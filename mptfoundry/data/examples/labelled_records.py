"""Read, check and tokenize the records of labelled datasets.

A record's fields depend on the task:

    sequence   `text`, optionally `text_pair`, and `label`: a name, a number, or a list of names or numbers
    token      `words`, `labels`: one name or number per word, -100 if the word is not in the loss
    span       `question`, `context`, `answers`: {text: [...], answer_start: [...]}, as in SQuAD

The user can give other names for these fields. Errors start with the location: `train.jsonl:3: label: ...`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from mptfoundry.data.records.records import BadInput, Unit, names_of, read_rows, shown, text_of
from mptfoundry.data.shards.token_ids import NOT_IN_LOSS
from mptfoundry.errors import DataError
from mptfoundry.mpt.head_config import (
    HeadConfig,
    SequenceClassifierConfig,
    SpanFinderConfig,
    TokenClassifierConfig,
)

ROWS_AT_ONCE = 1000
# A position that no row has, for an answer that is not in the loss.
OUTSIDE = 2**31
LARGEST_NUMBER = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Record:
    """A record's values by the field names above, and its location.

    Attributes:
        where: Returns the record's location, which starts every error.
        values: The record as read.
        names: Field names above -> names in the data, if they differ.
    """

    where: Callable[[], str]
    values: Mapping[str, Any]
    names: Mapping[str, str]

    def get(self, name: str) -> Any:
        """Return a value; None if it is null or missing."""
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
        """Return a text field, which must not be blank."""
        return self.checked_text(self[name], name)

    def checked_text(self, value: Any, name: str) -> str:
        """Check that a field's value is a text that is not blank, and return it."""
        try:
            text = text_of(value) if isinstance(value, (str, bytes)) else ""
        except ValueError as error:
            raise self.error(name, str(error)) from error
        if not text.strip():
            raise self.error(name, f"{_short(value)} is not a text with characters")
        return text

    def error(self, name: str, text: str) -> DataError:
        """Return the error for a bad field."""
        return DataError(f"{self.where()}: {self.names.get(name, name)}: {text}.")


class Checked(NamedTuple):
    """A record's one or two texts, and its target.

    The target depends on the task: a number or a list of numbers; the words' start characters and labels; or
    the first answer's start character and all answers.
    """

    first: str
    second: str | None
    wanted: Any


@dataclass(frozen=True)
class LabelledPlan:
    """Settings for converting records to examples; sent to each worker.

    Attributes:
        tokenizer: A transformers fast tokenizer; it joins two texts as a pair.
        max_seq_len: Maximum tokens in an example. Longer ones are truncated on the tokenizer's
            `truncation_side`: of two texts the longer one first, of question and context only the context.
        head: The config of the model's head.
        fields: Field names -> names in the data, if they differ.
        datasets: Hugging Face datasets that parts refer to.
    """

    tokenizer: Any
    max_seq_len: int
    head: HeadConfig
    fields: Mapping[str, str]
    datasets: Sequence[Any] = ()


@dataclass
class UnitLabelled:
    """A unit's packed examples; `flags` are two bools per example: was it truncated, is any label left."""

    examples: list[bytes]
    flags: list[tuple[bool, bool]]
    tokens: int
    weight: int


class LabelledMaker:
    """Creates the examples of units."""

    def __init__(self, plan: LabelledPlan) -> None:
        self.plan = plan

    def __call__(self, unit: Unit) -> UnitLabelled:
        """Read, check and tokenize all records of a unit.

        Raises:
            DataError: A record is invalid.
        """
        made = UnitLabelled([], [], 0, unit.weight)
        for example, is_cut in encode(read_records(unit, self.plan), self.plan):
            made.examples.append(pack(example))
            made.flags.append((is_cut, _is_trained(example)))
            made.tokens += len(example["input_ids"])
        return made


def read_records(unit: Unit, plan: LabelledPlan) -> Iterator[Record]:
    """Read the records of a unit, in order.

    Raises:
        DataError: A record can't be read.
    """
    for row in (row for part in unit.parts for row in read_rows(part, plan.datasets)):
        if isinstance(row, BadInput):
            raise row
        if not isinstance(row.values, dict):
            raise DataError(f"{row.where()}: this is {_short(row.values)}, not an object with fields.")
        yield Record(row.where, row.values, plan.fields)


def pack(example: Mapping[str, Any]) -> bytes:
    """Serialize an example: a JSON header that includes all texts, then the content of the arrays."""
    head: list[list[Any]] = []
    arrays = []
    for name, value in example.items():
        if isinstance(value, (np.ndarray, np.generic)):
            head.append([name, value.dtype.str, list(value.shape)])
            arrays.append(value.tobytes())
        else:
            head.append([name, value])
    text = json.dumps(head).encode()
    return b"".join((len(text).to_bytes(4, "little"), text, *arrays))


def unpack(data: bytes) -> dict[str, Any]:
    """Deserialize an example."""
    start = 4 + int.from_bytes(data[:4], "little")
    example: dict[str, Any] = {}
    for name, *value in json.loads(data[4:start]):
        if len(value) == 1:
            example[name] = value[0]
            continue
        dtype, shape = np.dtype(value[0]), tuple(value[1])
        count = int(np.prod(shape, dtype=np.int64))
        example[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += count * dtype.itemsize
    return example


def encode(records: Iterator[Record], plan: LabelledPlan) -> Iterator[tuple[dict[str, Any], bool]]:
    """Check and tokenize records for a model's head.

    Yields:
        An example, and whether it was truncated.

    Raises:
        DataError: A record is invalid.
    """
    head = plan.head
    while chunk := list(islice(records, ROWS_AT_ONCE)):
        checked = [_checked(record, head) for record in chunk]
        encodings = _tokenize(chunk, checked, plan)
        for record, (_, context, answer), encoding in zip(chunk, checked, encodings, strict=True):
            if not encoding.ids:
                raise DataError(f"{record.where()}: the tokenizer makes no token of its text.")
            example: dict[str, Any] = {"input_ids": np.asarray(encoding.ids, np.int64)}
            if isinstance(head, SequenceClassifierConfig):
                kind = np.int64 if head.problem == "single_label_classification" else np.float32
                example["labels"] = np.asarray(answer, kind)
            elif isinstance(head, TokenClassifierConfig):
                is_left = plan.tokenizer.truncation_side == "left"
                example["labels"] = _labels_of_tokens(encoding, answer, record, is_cut_first=is_left)
            else:
                example |= _span_of_tokens(encoding, *answer) | {"context": context, "answers": answer[1]}
            yield example, bool(encoding.overflowing)


def _checked(record: Record, head: HeadConfig) -> Checked:
    if isinstance(head, SequenceClassifierConfig):
        return check_text(record, head.label2id, head.problem)
    if isinstance(head, TokenClassifierConfig):
        return check_words(record, head.label2id)
    return check_answer(record)


def _tokenize(records: Sequence[Record], checked: Sequence[Checked], plan: LabelledPlan) -> list[Any]:
    """Tokenize each record into an Encoding of the tokenizers library."""
    is_span = isinstance(plan.head, SpanFinderConfig)
    firsts, seconds = [entry.first for entry in checked], [entry.second for entry in checked]
    for record, second in zip(records, seconds, strict=True):
        if (second is None) != (seconds[0] is None):
            raise record.error("text_pair", "some records have it and others don't. Give it to all or none")
    if is_span:
        for record, ids in zip(records, plan.tokenizer(firsts)["input_ids"], strict=True):
            if len(ids) >= plan.max_seq_len:
                raise record.error(
                    "question",
                    f"has {len(ids)} tokens; max_seq_len: {plan.max_seq_len} leaves no room for the context",
                )
    return plan.tokenizer(
        firsts,
        None if seconds[0] is None else seconds,
        truncation="only_second" if is_span else True,
        max_length=plan.max_seq_len,
        return_offsets_mapping=True,
    ).encodings


def _labels_of_tokens(
    encoding: Any, words: tuple[Sequence[int], Sequence[int]], record: Record, *, is_cut_first: bool
) -> np.ndarray:
    """Put each word's label at its first token and -100 at all others. Returns (tokens,) int64.

    `is_cut_first` says whether truncation removes the first tokens, whose words get no label.
    """
    begins, numbers = words
    labels = np.full(len(encoding.ids), NOT_IN_LOSS, np.int64)
    cut = [end for part in encoding.overflowing for begin, end in part.offsets if begin < end]
    # The last word that has its label already, or lost its first token.
    last = bisect_right(begins, max(cut) - 1) - 1 if cut and is_cut_first else -1
    for token, (begin, end) in enumerate(encoding.offsets):
        # Use the token's last character, since a token may start with the space before its word.
        word = bisect_right(begins, end - 1) - 1
        if begin < end and word > last:
            if word > last + 1:
                raise record.error("words", f"word {last + 1} has no token of its own")
            labels[token], last = numbers[word], word
    return labels


def _span_of_tokens(encoding: Any, begin: int, answers: Sequence[str]) -> dict[str, Any]:
    """Find the first answer's first and last token, or OUTSIDE if it was truncated; also return offsets."""
    end = begin + len(answers[0].rstrip())
    offsets = np.asarray(encoding.offsets, np.int64)
    offsets[[part != 1 for part in encoding.sequence_ids]] = 0
    tokens = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end) & (offsets[:, 0] < offsets[:, 1]))
    is_whole = len(tokens) > 0 and offsets[tokens[-1], 1] >= end
    first, last = (tokens[0], tokens[-1]) if is_whole else (OUTSIDE, OUTSIDE)
    return {"start_positions": np.int64(first), "end_positions": np.int64(last), "offsets": offsets}


def _is_trained(example: Mapping[str, Any]) -> bool:
    if "start_positions" in example:
        return example["start_positions"] != OUTSIDE
    labels = example["labels"]
    return labels.dtype != np.int64 or bool((labels != NOT_IN_LOSS).any())


def check_text(record: Record, labels: Mapping[str, int], problem: str) -> Checked:
    """Check a text and its label; `problem` is transformers' `problem_type`."""
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
    """Check words and their labels, and join the words with spaces."""
    words, given = record["words"], record["labels"]
    for name, value in (("words", words), ("labels", given)):
        if not isinstance(value, list) or not value:
            raise record.error(name, f"{_short(value)} is not a list with entries")
    if len(words) != len(given):
        raise record.error("labels", f"there are {len(given)} for {len(words)} words")
    words = [record.checked_text(word, "words") for word in words]
    numbers = [n if n == NOT_IN_LOSS else label_number(n, labels, record, "labels") for n in given]
    begins, text = [], ""
    for word in words:
        text += " " * bool(text)
        begins.append(len(text))
        text += word.strip()
    return Checked(text, None, (begins, numbers))


def check_answer(record: Record) -> Checked:
    """Check a question and its context, and that the context contains the answers."""
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
            raise record.error("answers", f"answer_start: {_short(start)} is not a whole number")
        is_text = isinstance(text, str) and text.strip() and start >= 0
        if not is_text or context[start : start + len(text)] != text:
            raise record.error("answers", f"{_short(text)} does not stand at {start} in the context")
    return Checked(record.text("question"), context, (starts[0], texts))


def label_number(label: Any, labels: Mapping[str, int], record: Record, name: str) -> int:
    """Return a label's number, given its name or number."""
    if isinstance(label, str) and label in labels:
        return labels[label]
    if type(label) is int and 0 <= label < len(labels):
        return label
    known = ", ".join([*labels][:8]) + ", ..." * (len(labels) > 8)
    raise record.error(
        name, f"{_short(label)} is not a label. Use 0 to {len(labels) - 1}, or a name: {known}"
    )


def _is_number(value: Any) -> bool:
    """Whether a value is a number that fits in float32."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= LARGEST_NUMBER


def _short(value: Any) -> str:
    """Format a value as JSON, on one short line."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return shown(value)
    text = text if text.isprintable() else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
