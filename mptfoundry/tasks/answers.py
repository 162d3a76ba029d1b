"""The answers of an evaluation in a file, a line for each document as it is finished.

A killed evaluation continues from them. The file is in a folder whose name has a hash of all that changes
numbers, and only the first rank writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from mptfoundry.checkpoints.checksums import identity_of as identity_of
from mptfoundry.tasks.outcomes import Outcome
from mptfoundry.tasks.questions import Question, TaskData

SAMPLES = "eval.samples.jsonl"


class Samples:
    """The file, open for appending; use it as a context manager.

    The first line has the hash of the evaluation's settings. A file of other settings is replaced.

    Attributes:
        finished: (label, doc_id) -> the outcomes that the file had when it was opened.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.finished: dict[tuple[str, int], Outcome] = {}
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
        for content in self._file:
            # A kill may have torn the last line; it is cut off, and its document evaluated again.
            if not content.endswith(b"\n"):
                break
            end += len(content)
            line = json.loads(content)
            self.finished[line["task"] + f"/{line['shots']}-shot", line["doc_id"]] = _outcome(line)
        self._file.truncate(end)

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def append(self, data: TaskData, outcomes: Mapping[int, Outcome]) -> None:
        """Write the outcomes of some documents; they survive a kill of the process after this call."""
        by_id = {question.doc_id: question for question in data.questions}
        lines = [
            json.dumps(_line(data, by_id[doc_id], outcome), ensure_ascii=False) + "\n"
            for doc_id, outcome in outcomes.items()
            if (data.label, doc_id) not in self.finished
        ]
        self._file.write("".join(lines).encode())
        self._file.flush()


def _line(data: TaskData, question: Question, outcome: Outcome) -> dict[str, Any]:
    prompt = question.rows[0].ids[: question.rows[0].start]
    digest = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16]
    return {
        "task": data.task.label,
        "shots": data.shots,
        "doc_id": question.doc_id,
        "prompt_hash": digest,
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
