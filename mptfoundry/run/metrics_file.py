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

and an evaluation's row has `batch`, `tokens`, `seconds` and `eval: {label: {metric: value}}`; a task with
categories has a label for each of them, too.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from torch import Tensor

from mptfoundry.files import writing_into
from mptfoundry.ranks import rank
from mptfoundry.run.metrics import MEASURED, NAME, Row, cut_rows
from mptfoundry.run.metrics import read_rows as read_rows

# Composer logs these on its own; a row has them once, in its own fields.
REPEATED = ("time/", "trainer/")


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
                short = "loss" if name == "loss/train/total" else name.removeprefix("throughput/")
                self._logged[short] = plain(value)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Record the learning rate; at the batch's end it is already that of the next batch."""
        self._lr = float(state.optimizers[0].param_groups[0]["lr"])

    def batch_end(self, state: State, logger: Logger) -> None:
        """Pass on the batch's row."""
        loss, others = self._logged.pop("loss", None), self._logged
        self._logged = {}
        row = {**_progress(state), "loss": loss, "lr": self._lr, **dict.fromkeys(MEASURED), **others}
        if rank() == 0:
            self.write(row, state)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Pass on the evaluation's row, with a gauntlet's averages if it was the last of its tasks."""
        results: Row = {str(state.dataloader_label): {}}
        for name in [name for name in self._logged if name.startswith(("metrics/", "icl/metrics/"))]:
            label, _, metric = name.removeprefix("icl/").removeprefix("metrics/").rpartition("/")
            results.setdefault(label, {})[metric] = self._logged.pop(name)
        row = {**_progress(state), "eval": results}
        del row["samples"]
        if rank() == 0:
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
    return plain(value.item()) if hasattr(value, "item") else str(value)


def _progress(state: State) -> Row:
    now = state.timestamp
    counts = {"batch": int(now.batch), "tokens": int(now.token), "samples": int(now.sample)}
    return {**counts, "seconds": round(now.total_wct.total_seconds(), 3)}


class MetricsFile(RowLogger):
    """Writes `metrics.jsonl` into the run's folder, on rank 0.

    Args:
        folder: The run's folder; it is made if it doesn't exist.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / NAME
        self._last_batch: int | None = None

    def after_load(self, state: State, logger: Logger) -> None:
        """Record where the run starts; the file stays as it is until `begin` or the first row."""
        self._last_batch = int(state.timestamp.batch)
        if rank() == 0:
            with writing_into(self.path.parent):
                self.path.parent.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Make the file, or cut the rows past the point where the run starts."""
        with writing_into(self.path.parent):
            if self._last_batch is not None and self.path.exists():
                cut_rows(self.path, last_batch=self._last_batch)
            self._last_batch = None
            self.path.touch()

    def write(self, row: Row, state: State | None = None) -> None:
        """Append the row; if the file has been removed while the run trains, it is made again."""
        if self._last_batch is not None:
            self.begin()
        with writing_into(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(row), allow_nan=False) + "\n")

    def log_table(
        self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None
    ) -> None:
        """Append a table, such as generated texts, as `{batch, name: [{column: value}]}`."""
        if rank() == 0:
            self.write({"batch": step, name: [dict(zip(columns, row, strict=True)) for row in rows]})
