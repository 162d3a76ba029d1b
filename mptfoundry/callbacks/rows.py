"""One row of numbers for each batch and each evaluation, for whoever writes them down.

Everything that the trainer and its callbacks log comes to a logger piece by piece; a `RowLogger` puts it
together. Words: a row is a dict. A batch's row has

    batch, tokens, samples   how many have been learned from, over all devices, this batch included
    seconds                  spent on them, restarts included, evaluations not
    loss                     mean over the batch's loss-generating tokens, before the step
    lr                       the learning rate of the step: the first group's
    MEASURED                 None where it isn't known, such as `mfu` on a CPU
    ...                      whatever else callbacks logged, by its name

and an evaluation's row `batch`, `tokens`, `seconds` and `eval: {label: {metric: value}}`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from torch import Tensor

from mptfoundry.checkpoints.metrics import MEASURED, Row

SHORT = {"loss/train/total": "loss"}
# Composer logs these on its own; a row says them once, in its own fields.
REPEATED = ("time/", "trainer/")
OWN = ("throughput/",)


class RowLogger(LoggerDestination):
    """Collects what is logged and hands out whole rows, on rank 0 only."""

    def __init__(self) -> None:
        self._logged: Row = {}
        self._lr: float | None = None

    @abstractmethod
    def write_batch(self, row: Row, state: State) -> None:
        """Take the row of a batch."""

    @abstractmethod
    def write_evaluation(self, row: Row, state: State) -> None:
        """Take the row of an evaluation."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep what was logged until the row is whole; the last value of a name counts."""
        for name, value in metrics.items():
            if not name.startswith(REPEATED):
                self._logged[_short(name)] = plain(value)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note the learning rate; at the batch's end it is already the next one's."""
        self._lr = float(state.optimizers[0].param_groups[0]["lr"])

    def batch_end(self, state: State, logger: Logger) -> None:
        """Hand out the batch's row."""
        loss = self._logged.pop("loss", None)
        measured = dict.fromkeys(MEASURED)
        row = {**_progress(state), "loss": loss, "lr": self._lr, **measured, **self._logged}
        self._logged = {}
        if dist.get_global_rank() == 0:
            self.write_batch(row, state)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Hand out the evaluation's row."""
        prefix = f"metrics/{state.dataloader_label}/"
        found = {
            name.removeprefix(prefix): value
            for name, value in self._logged.items()
            if name.startswith(prefix)
        }
        self._logged = {name: value for name, value in self._logged.items() if not name.startswith(prefix)}
        row = {**_progress(state), "eval": {str(state.dataloader_label): found}}
        del row["samples"]
        if dist.get_global_rank() == 0:
            self.write_evaluation(row, state)


def plain(value: Any) -> Any:
    """A value fit for JSON: numbers, text, lists and dicts; what is not finite becomes None."""
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
