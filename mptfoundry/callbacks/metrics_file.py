"""The run's own record, `metrics.jsonl`: one JSON object a line for each batch and each evaluation.

It is always on, needs no service, and is written line by line, so it can be followed while the run goes on
and is whole up to the last batch when the run is killed. A resumed run goes on in the same file: what lies
past its checkpoint is cut, since those batches come again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from mptfoundry.callbacks.rows import MEASURED, Row, RowLogger, plain
from mptfoundry.checkpoints.writing import whole_or_absent, writing_into

NAME = "metrics.jsonl"
# A number as large as this one was not measured, and nothing can be drawn with it.
_TOO_LARGE = 1e30


class MetricsFile(RowLogger):
    """Writes `metrics.jsonl` into the run's folder, on rank 0.

    Args:
        folder: The run's folder; it is made if it isn't there.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / NAME
        self._file: TextIO | None = None
        self._last_batch: int | None = None

    def after_load(self, state: State, logger: Logger) -> None:
        """Note where the run starts; until `begin` or the first row the file stays as it is.

        Raises ConfigError if the folder can't be written to.
        """
        self._last_batch = int(state.timestamp.batch)
        if dist.get_global_rank() == 0:
            with writing_into(self.path.parent):
                self.path.parent.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Cut what lies past the point where the run starts, and open the file."""
        with writing_into(self.path.parent):
            if self._last_batch is not None:
                cut_rows(self.path, last_batch=self._last_batch)
            self._last_batch = None
            self._file = self.path.open("a", encoding="utf-8")

    def write_batch(self, row: Row, state: State) -> None:
        """Append a batch's row."""
        self._append(row)

    def write_evaluation(self, row: Row, state: State) -> None:
        """Append an evaluation's row."""
        self._append(row)

    def log_table(
        self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None
    ) -> None:
        """Append a table, such as generated texts, as `{batch, name: [{column: value}]}`."""
        if dist.get_global_rank() == 0:
            self._append({"batch": step, name: [dict(zip(columns, row, strict=True)) for row in rows]})

    def close(self, state: State, logger: Logger) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # raised by the row that could not be written
                self._file.close()
            self._file = None

    def _append(self, row: Row) -> None:
        if self._file is None:
            self.begin()
        with writing_into(self.path.parent):
            assert self._file is not None
            if os.fstat(self._file.fileno()).st_nlink == 0:
                print(f"{self.path} was removed while the run trains; it is made again", flush=True)
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(plain(row), allow_nan=False) + "\n")
            self._file.flush()


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a metrics file in their order; lines that a kill or a bad disk has damaged are left out.

    Every row has a `batch`; one with a `loss` is a batch's and has the numbers that `rows` promises, one with
    an `eval` is an evaluation's.

    Args:
        path: A `metrics.jsonl`, also one that is being written.
    """
    with Path(path).open("rb") as file:
        for line in file:
            row = _parse(line)
            if row is not None:
                yield row


def cut_rows(path: str | Path, *, last_batch: int) -> None:
    """Drop the rows past `last_batch`, and damaged lines; from the start (0) all rows are dropped.

    The file is replaced as a whole, so a kill leaves either the old one or the new one.
    """
    path = Path(path)
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _belongs(line, last_batch)]
    if len(kept) == len(lines):
        return
    with whole_or_absent(path, overwrite=True) as temporary:
        temporary.write_bytes(b"".join(kept))


def _belongs(line: bytes, last_batch: int) -> bool:
    row = _parse(line)
    return row is not None and last_batch > 0 and row["batch"] <= last_batch


def _parse(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return plain(row) if _is_row(row) else None


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("batch")) is not int or row["batch"] < 0:
        return False
    measured = [name for name in ("loss", "lr", *MEASURED) if name in row]
    if not all(_is_number(row[name]) or row[name] is None for name in measured):
        return False
    if "loss" in row:
        return row["batch"] > 0 and all(_is_number(row.get(name)) for name in ("tokens", "seconds"))
    if "eval" not in row:
        return True
    results = row["eval"].values() if isinstance(row["eval"], dict) else [None]
    return _is_number(row.get("tokens")) and all(_is_result(result) for result in results)


def _is_result(result: Any) -> bool:
    """Whether it is what an evaluation of one label gives: numbers by name."""
    return isinstance(result, dict) and all(_is_number(each) or each is None for each in result.values())


def _is_number(value: Any) -> bool:
    """Whether it is one that a picture can show."""
    return type(value) in (int, float) and abs(value) < _TOO_LARGE
