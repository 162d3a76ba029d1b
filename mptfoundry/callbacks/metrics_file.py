"""The run's own record, `metrics.jsonl`: one JSON object a line for each batch and each evaluation.

It is always on, needs no service, and is written line by line, so it can be followed while the run goes on
and is whole up to the last batch when the run is killed. A resumed run goes on in the same file: what lies
past its checkpoint is cut, since those batches come again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from mptfoundry.callbacks.rows import Row, RowLogger, plain
from mptfoundry.checkpoints.writing import whole_or_absent, writing_into

NAME = "metrics.jsonl"


class MetricsFile(RowLogger):
    """Writes `metrics.jsonl` into the run's folder, on rank 0.

    Args:
        folder: The run's folder; it is made if it isn't there.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / NAME
        self._file: TextIO | None = None

    def after_load(self, state: State, logger: Logger) -> None:
        """Cut what lies past the point from which the run goes on, and open the file.

        Raises ConfigError if the folder can't be written to.
        """
        if dist.get_global_rank() != 0:
            return
        with writing_into(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut_rows(self.path, last_batch=int(state.timestamp.batch))
            self._file = self.path.open("a")

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
        with writing_into(self.path.parent):
            if self._file is None:
                self._file = self.path.open("a")
            self._file.write(json.dumps(plain(row), allow_nan=False) + "\n")
            self._file.flush()


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a metrics file in their order; a line that a kill left torn is passed over.

    Args:
        path: A `metrics.jsonl`, also one that is being written.
    """
    with Path(path).open() as file:
        for line in file:
            row = _parse(line)
            if row is not None:
                yield row


def cut_rows(path: str | Path, *, last_batch: int) -> None:
    """Drop the rows past `last_batch`, and a torn line; from the start (0) all rows are dropped.

    The file is replaced as a whole, so a kill leaves either the old one or the new one.
    """
    path = Path(path)
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if _belongs(line, last_batch)]
    if len(kept) == len(lines):
        return
    with whole_or_absent(path, overwrite=True) as temporary:
        temporary.write_text("".join(kept))


def _belongs(line: str, last_batch: int) -> bool:
    row = _parse(line)
    return row is not None and last_batch > 0 and row["batch"] <= last_batch


def _parse(line: str) -> Row | None:
    if not line.endswith("\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("batch"), int) else None
