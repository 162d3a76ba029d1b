"""Progress lines for terminals and log files.

[batch 120/3000]  loss 4.213  lr 0.00019  grad norm 0.841  31.2k tok/s  MFU 41.3%  ETA 0:12:40
[batch 120/3000]  eval held_out: LanguageCrossEntropy 4.301  LanguagePerplexity 73.77
[batch 120/3000]  eval copa/0-shot: InContextLearningMultipleChoiceAccuracy 0.58  stderr 0.049
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from composer.core import Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler

from mptfoundry.run.metrics_file import Row, RowLogger

# How a batch's line shows the values of its row.
FORMS = {
    "loss": "loss {:.3f}",
    "lr": "lr {:.2g}",
    "grad_norm": "grad norm {:.3f}",
    "tokens_per_second": "{} tok/s",
    "mfu": "MFU {:.1%}",
    "padding_share": "padding {:.1%}",
    "eta_seconds": "ETA {}",
}


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
        self._end: Time | None = None  # a request to stop changes the state's own
        self._printed_batch = -1
        self._row: Row = {}
        # Saved at each batch, because during evaluation the state has the length of the evaluation's loader.
        self._progress = "batch 0"

    def fit_start(self, state: State, logger: Logger) -> None:
        """Save the run's length."""
        self._end = state.max_duration  # type: ignore[assignment]

    def write(self, row: Row, state: State) -> None:
        """Print an evaluation's line, and a batch's line if one is due."""
        for label, metrics in row.get("eval", {}).items():
            if label.rpartition("/")[0] in row["eval"]:
                continue  # a category of a task
            values = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items())
            print(f"[{self._progress}]  eval {label}: {values}", flush=True)
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
        print(f"[{self._progress}]  {batch_line(self._row)}", flush=True)


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
    shown = dict(row)
    if rate := row.get("tokens_per_second"):
        shown["tokens_per_second"] = thousands(rate)
    if (seconds := row.get("eta_seconds")) is not None:
        shown["eta_seconds"] = timedelta(seconds=round(seconds))
    parts = [form.format(shown[name]) for name, form in FORMS.items() if shown.get(name) is not None]
    return "  ".join(parts if row["loss"] is not None else ["loss not finite", *parts])


def thousands(value: float) -> str:
    """A number with three or four digits: 812, 31.2k, 5.21M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _short(value: Any) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e5 else f"{value:.0f}"
