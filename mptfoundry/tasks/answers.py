"""The answers of an evaluation in a file, a line for each document as it is finished.

A killed evaluation continues from them. The file is in a folder whose name has a hash of all that changes
numbers, and only the first rank writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mptfoundry.checkpoints.checksums import identity_of as identity_of
from mptfoundry.errors import DataError
from mptfoundry.tasks.outcomes import Outcome
from mptfoundry.tasks.questions import Question, TaskData

SAMPLES = "eval.samples.jsonl"


class Samples:
    """The file, open for appending; use it as a context manager.

    The first line has the hash of the evaluation's settings. A file of other settings is replaced.

    Attributes:
        lines: What the file had when it was opened.
        finished: (label, doc_id) -> their outcomes.

    Raises:
        DataError: A line inside the file is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.lines: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("a+b")
        self._file.seek(0)
        head = json.dumps({"settings": settings_hash(settings)}).encode() + b"\n"
        if self._file.readline() != head:
            self._file.truncate(0)
            self._file.write(head)
            self._file.flush()
        end = len(head)
        self._file.seek(end)
        for number, content in enumerate(self._file, 2):
            # A kill may have torn the last line; it is cut off, and its document evaluated again.
            if not content.endswith(b"\n"):
                break
            end += len(content)
            self.lines.append(_read(content, f"{path}:{number}"))
        self._file.truncate(end)
        self.finished = {label_and_id(line): _outcome(line) for line in self.lines}

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def append(self, data: TaskData, outcomes: Mapping[int, Outcome]) -> None:
        """Write the outcomes of some documents; they survive a kill of the process after this call."""
        by_id = {question.doc_id: question for question in data.questions}
        self.append_lines(
            [
                _line(data, by_id[doc_id], outcome)
                for doc_id, outcome in outcomes.items()
                if (data.label, doc_id) not in self.finished
            ]
        )

    def append_lines(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines; they survive a kill of the process after this call."""
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self._file.flush()


def label_and_id(line: Mapping[str, Any]) -> tuple[str, int]:
    """What a line answers: `task/N-shot`, and the document."""
    return f"{line['task']}/{line['shots']}-shot", line["doc_id"]


def _read(content: bytes, where: str) -> dict[str, Any]:
    try:
        line = json.loads(content)
        _outcome(line), label_and_id(line)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: is damaged, so the evaluation can't be continued from this file. Remove the line to "
            "evaluate its document again, or remove the file to begin again."
        ) from error
    return line


def prompt_hash(ids: Sequence[int]) -> str:
    """A hash of a prompt's token ids."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def _line(data: TaskData, question: Question, outcome: Outcome) -> dict[str, Any]:
    return {
        "task": data.task.label,
        "shots": data.shots,
        "doc_id": question.doc_id,
        "prompt_hash": prompt_hash(question.rows[0].ids[: question.rows[0].start]),
        "choices": question.choices,
        "loglikelihoods": outcome.loglikelihoods,
        "tokens": outcome.tokens,
        "chosen": outcome.chosen,
        "gold": question.gold,
        "correct": outcome.is_correct,
        "confidence": None if outcome.confidence != outcome.confidence else outcome.confidence,
        "confidently_correct": outcome.is_confidently_correct,
    }


def _outcome(line: Mapping[str, Any]) -> Outcome:
    confidence = line["confidence"]
    return Outcome(
        line["chosen"],
        line["correct"],
        float("nan") if confidence is None else confidence,
        line["confidently_correct"],
        tuple(line["loglikelihoods"]),
        tuple(line["tokens"]),
    )


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Eight letters that are others whenever a setting is another."""
    content = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:8]
