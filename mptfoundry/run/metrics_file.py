"""The run's own record, `metrics.jsonl`: one JSON object per line, for each batch and each evaluation.

It is always on, needs no service, and is written line by line, so it can be followed while the run trains and
is complete up to the last batch if the run is killed. A resumed run continues in the same file: rows past its
checkpoint are cut, because those batches run again.

The trainer and its callbacks log one value at a time; a `RowLogger` assembles rows, which are dicts. The row
of a batch has

    batch, tokens, samples   trained on so far, over all devices, including this batch
    seconds                  spent on them, including restarts, excluding evaluations
    loss                     mean over the batch's loss-generating tokens, before the step
    lr                       the learning rate of the step: the first group's
    MEASURED                 None if not known, such as `mfu` on a CPU
    ...                      whatever else callbacks logged, by its name

and an evaluation's row has `batch`, `tokens`, `seconds` and `eval: {label: {metric: value}}`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from abc import abstractmethod
from pathlib import Path
from typing import Any, TextIO

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from torch import Tensor

from mptfoundry.files import writing_into
from mptfoundry.run.metrics import MEASURED, NAME, Row, cut_rows
from mptfoundry.run.metrics import read_rows as read_rows

SHORT = {"loss/train/total": "loss"}
# Composer logs these on its own; a row has them once, in its own fields.
REPEATED = ("time/", "trainer/")
OWN = ("throughput/",)


class RowLogger(LoggerDestination):
    """Collect what is logged and pass on complete rows, on rank 0 only."""

    def __init__(self) -> None:
        self._logged: Row = {}
        self._lr: float | None = None

    @abstractmethod
    def write(self, row: Row, state: State) -> None:
        """Receive a row, of a batch or, with `eval`, of an evaluation."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep what was logged until the row is complete; the last value of a name wins."""
        for name, value in metrics.items():
            if not name.startswith(REPEATED):
                self._logged[_short(name)] = plain(value)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Record the learning rate; at the batch's end it is already that of the next batch."""
        self._lr = float(state.optimizers[0].param_groups[0]["lr"])

    def batch_end(self, state: State, logger: Logger) -> None:
        """Pass on the batch's row."""
        loss = self._logged.pop("loss", None)
        measured = dict.fromkeys(MEASURED)
        row = {**_progress(state), "loss": loss, "lr": self._lr, **measured, **self._logged}
        self._logged = {}
        if dist.get_global_rank() == 0:
            self.write(row, state)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Pass on the evaluation's row."""
        prefix = f"metrics/{state.dataloader_label}/"
        names = [name for name in self._logged if name.startswith(prefix)]
        metrics = {name.removeprefix(prefix): self._logged.pop(name) for name in names}
        row = {**_progress(state), "eval": {str(state.dataloader_label): metrics}}
        del row["samples"]
        if dist.get_global_rank() == 0:
            self.write(row, state)


def plain(value: Any) -> Any:
    """Convert a value for JSON: numbers, text, lists and dicts; non-finite numbers become None."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    return str(value)


def _short(name: str) -> str:
    for prefix in OWN:
        name = name.removeprefix(prefix)
    return SHORT.get(name, name)


def _progress(state: State) -> Row:
    now = state.timestamp
    return {
        "batch": int(now.batch),
        "tokens": int(now.token),
        "samples": int(now.sample),
        "seconds": round(now.total_wct.total_seconds(), 3),
    }


class MetricsFile(RowLogger):
    """Writes `metrics.jsonl` into the run's folder, on rank 0.

    Args:
        folder: The run's folder; it is made if it doesn't exist.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / NAME
        self._file: TextIO | None = None
        self._last_batch: int | None = None

    def after_load(self, state: State, logger: Logger) -> None:
        """Record where the run starts; the file stays as it is until `begin` or the first row.

        Raises ConfigError if the folder can't be written to.
        """
        self._last_batch = int(state.timestamp.batch)
        if dist.get_global_rank() == 0:
            with writing_into(self.path.parent):
                self.path.parent.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Cut the rows past the point where the run starts, and open the file."""
        with writing_into(self.path.parent):
            if self._last_batch is not None:
                cut_rows(self.path, last_batch=self._last_batch)
            self._last_batch = None
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, row: Row, state: State) -> None:
        """Append the row."""
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
            with contextlib.suppress(OSError):  # already raised for the row that could not be written
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
