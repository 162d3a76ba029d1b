"""Records of labelled data sets: read from JSONL, Parquet or a folder that `datasets` saved, and checked.

By task a record has the fields

    sequence   `text`, perhaps `text_pair`, `label`: a name or number, or numbers, or a list of names
    token      `words`, `labels`: one name or number for each word, -100 where none is learned
    span       `question`, `context`, `answers`: {text: [...], answer_start: [...]}, as in SQuAD

or other names for these, which the user gives. Errors name the place, such as `train.jsonl:3: label: ...`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mptfoundry.data.collate import NOT_LEARNED
from mptfoundry.errors import DataError

Task = Literal["sequence", "token", "span"]
SUFFIXES = (".jsonl", ".json", ".parquet")
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Record:
    """A record's values by the names above, and where it lies.

    Attributes:
        place: Begins every error.
        values: What was read.
        names: Names above -> names in the data, where they differ.
    """

    place: str
    values: Mapping[str, Any]
    names: Mapping[str, str]

    def get(self, name: str) -> Any:
        """A value; None if it is null or not there."""
        return self.values.get(self.names.get(name, name))

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            there = ", ".join(sorted(map(str, self.values)))
            raise self.error(name, f"is missing or null; there are {there}. Name it: dataset.fields.{name}")
        return value

    def text(self, name: str) -> str:
        """A text that is not blank."""
        value = self[name]
        if not isinstance(value, str) or not value.strip():
            raise self.error(name, f"{_short(value)} is not a text with characters")
        return value

    def error(self, name: str, text: str) -> DataError:
        """What is wrong with a field."""
        return DataError(f"{self.place}: {self.names.get(name, name)}: {text}.")


class Checked(NamedTuple):
    """A record's text, or its two texts, and what is to be found: a number or numbers; the words' first
    characters and their numbers; or the first answer's first character and all answers.
    """

    first: str
    second: str | None
    wanted: Any


def read_records(
    local: str, split: str | None, names: Mapping[str, str], where: str = "train_loader"
) -> Iterator[Record]:
    """Read the records of a file or folder, in order.

    Args:
        local: A JSONL or Parquet file, a folder of such files, or a folder that `datasets` saved.
        split: A file of the folder without its suffix, a folder in it, or a split of a saved data set.
        names: As in Record.
        where: What the user calls this loader, for errors.

    Raises:
        DataError: Nothing is there, or it can't be read.
    """
    folder = Path(local).expanduser()
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        rows = _read_saved(folder, split, where)
    else:
        rows = (row for file in _files(folder, split, where) for row in _read_file(file))
    for place, values in rows:
        if not isinstance(values, dict):
            raise DataError(f"{place}: this is {_short(values)}, not an object with fields.")
        yield Record(place, values, names)


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
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise record.error("words", f"{_short(word)} is no word")
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
        is_text = isinstance(text, str) and text.strip() and type(start) is int and start >= 0
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


def _files(folder: Path, split: str | None, where: str) -> list[Path]:
    places = [folder / f"{split}{suffix}" for suffix in ("", *SUFFIXES)] if split else [folder]
    for path in places:
        if path.is_file():
            return [path]
        if files := sorted(file for file in path.glob("*") if file.suffix in SUFFIXES):
            return files
    looked_at = ", ".join(str(path) for path in places)
    raise DataError(f"{where}.dataset.local: no JSONL or Parquet file. Looked at {looked_at}.")


def _read_file(file: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        if file.suffix == ".parquet":
            batches = parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{file}: row {number}", row) for number, row in enumerate(rows))
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield f"{file}:{number}", _parse(line, f"{file}:{number}")
    except (OSError, UnicodeDecodeError, ArrowException) as error:
        raise DataError(f"{file}: it can't be read ({error}).") from error


def _parse(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: this is not a line of JSON ({error}).") from error


def _read_saved(folder: Path, split: str | None, where: str) -> Iterator[tuple[str, Any]]:
    import datasets

    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{where}.dataset.split: {folder} has no {split}. Use {', '.join(found)}.")
        found = found[split]
    yield from ((f"{folder}: row {row}", values) for row, values in enumerate(found))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
