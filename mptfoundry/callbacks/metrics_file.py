"""The run's own record, `metrics.jsonl`: one JSON object a line for each batch and each evaluation.

It is always on, needs no service, and is written line by line, so it can be followed while the run goes on
and is whole up to the last batch when the run is killed. A resumed run goes on in the same file: what lies
past its checkpoint is cut, since those batches come again.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from mptfoundry.callbacks.rows import Row, RowLogger, plain
from mptfoundry.checkpoints.metrics import NAME, cut_rows
from mptfoundry.checkpoints.metrics import read_rows as read_rows
from mptfoundry.checkpoints.writing import writing_into


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
