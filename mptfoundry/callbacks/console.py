"""Progress lines for terminals and log files.

[batch 120/3000]  loss 4.213  lr 0.00019  grad norm 0.841  31.2k tok/s  MFU 41.3%  ETA 0:12:40
[batch 120/3000]  eval held_out: LanguageCrossEntropy 4.301  LanguagePerplexity 73.77
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from composer.core import Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler

from mptfoundry.run.metrics_file import Row, RowLogger


class ConsoleLine(RowLogger):
    """Prints a line at an interval, for the first and the last batch, and for each evaluation.

    Args:
        interval: How often, such as `10ba`, `1ep` or `1000000tok`.
    """

    def __init__(self, interval: str | int) -> None:
        super().__init__()
        self._is_due = create_interval_scheduler(
            interval, checkpoint_events=False, final_events={Event.BATCH_END, Event.EPOCH_END}
        )
        self._end: Time | None = None
        self._printed_batch = -1
        self._row: Row = {}
        # Saved at each batch, because during evaluation the state has the length of the evaluation's loader.
        self._progress = "batch 0"

    def batch_start(self, state: State, logger: Logger) -> None:
        """Save the run's length, which a request to stop changes."""
        super().batch_start(state, logger)
        self._end = state.max_duration  # type: ignore[assignment]

    def write(self, row: Row, state: State) -> None:
        """Print an evaluation's line, and a batch's line if one is due."""
        for label, metrics in row.get("eval", {}).items():
            values = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items())
            self._print(f"eval {label}: {values}")
        if "eval" not in row:
            self._row, self._progress = row, progress(state, self._end)
            if self._is_due(state, Event.BATCH_END) or self._printed_batch < 0:
                self._print_batch()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Print the last batch's line if the interval counts epochs, and at the end of training."""
        if self._row and self._is_due(state, Event.EPOCH_END) and self._printed_batch != self._row["batch"]:
            self._print_batch()

    def _print_batch(self) -> None:
        self._printed_batch = self._row["batch"]
        self._print(batch_line(self._row))

    def _print(self, text: str) -> None:
        print(f"[{self._progress}]  {text}", flush=True)


def progress(state: State, end: Time | None) -> str:
    """The run's progress in the unit of its length: `batch 120/3000`."""
    now = state.timestamp
    if end is None or end.unit == TimeUnit.BATCH:
        return f"batch {now.batch.value}" + ("" if end is None else f"/{end.value}")
    if end.unit == TimeUnit.EPOCH and state.dataloader_len is not None:
        return f"batch {now.batch.value}/{end.value * int(state.dataloader_len)}"
    return f"batch {now.batch.value}, {now.get(end.unit).value / end.value:.1%}"


def batch_line(row: Row) -> str:
    """A batch's line of text, without missing values."""
    parts = [f"loss {_fixed(row['loss'])}", f"lr {row['lr']:.2g}" if row.get("lr") is not None else ""]
    if row.get("grad_norm") is not None:
        parts.append(f"grad norm {_fixed(row['grad_norm'])}")
    if row.get("tokens_per_second") is not None:
        parts.append(f"{thousands(row['tokens_per_second'])} tok/s")
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    if row.get("padding_share") is not None:
        parts.append(f"padding {row['padding_share']:.1%}")
    if row.get("eta_seconds") is not None:
        parts.append(f"ETA {timedelta(seconds=round(row['eta_seconds']))}")
    return "  ".join(part for part in parts if part)


def thousands(value: float) -> str:
    """A number with three or four digits: 812, 31.2k, 5.21M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _fixed(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _short(value: Any) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e5 else f"{value:.0f}"
