"""Detect losses far above those of earlier batches, with the rules of llm-foundry's `kill_loss_spike`.

An *outlier* is a loss of at least `outlier_multiplier` times the mean of the last `window_size`; a *spike* is
more than `patience` outliers in a row. Checkpoints save the window, so a resumed run decides like one that
was never stopped.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from composer.core import Callback

from mptfoundry.errors import ConfigError


@dataclass(frozen=True)
class Verdict:
    """What to print about a batch's loss, and what to do before the weights change."""

    text: str
    stops: bool = False
    skips: bool = False


class LossSpikes(Callback):
    """Judges the loss of each batch, once the window is full.

    Args:
        log_only: Report and continue; otherwise a spike, or a loss that stays high, ends the run.
        patience: Outliers in a row that are not yet a spike.
        outlier_multiplier: A loss of this many times the window's mean is an outlier.
        window_size: Batches in the window.
        loss_cap: A loss above it in half of the window's batches, after the first two windows, stays high.
        skip_batch: Skip the step of each outlier: weights and moments don't change.
    """

    def __init__(
        self,
        log_only: bool = True,
        patience: int = 4,
        outlier_multiplier: float = 2.0,
        window_size: int = 100,
        loss_cap: float = 10.0,
        skip_batch: bool = False,
    ) -> None:
        if patience < 0:
            raise _senseless(f"patience: {patience} is too small. Use 0 or more.")
        if window_size < 2:
            raise _senseless(f"window_size: {window_size} is too small. Use 2 or more.")
        if outlier_multiplier <= 1:
            raise _senseless(f"outlier_multiplier: {outlier_multiplier} is too small. Use more than 1.")
        self.log_only, self.patience, self.skip_batch = log_only, patience, skip_batch
        self.outlier_multiplier, self.loss_cap = outlier_multiplier, loss_cap
        self._window: deque[float] = deque(maxlen=window_size)
        self._in_a_row = 0
        self._batches = 0
        self._is_high = False

    def judge(self, loss: float) -> Verdict | None:
        """Judge the loss of the next batch; None if it is normal."""
        self._batches += 1
        is_full = len(self._window) == self._window.maxlen
        mean = fmean(self._window) if is_full else math.inf
        is_outlier = loss >= self.outlier_multiplier * mean
        self._in_a_row = self._in_a_row + 1 if is_outlier else 0
        if not (is_outlier and self.skip_batch):
            self._window.append(loss)
        return self._outlier(loss, mean) if is_outlier else self._high()

    def _outlier(self, loss: float, mean: float) -> Verdict:
        text = (
            f"loss spike: {loss:.4g} is at least {self.outlier_multiplier:g} times the mean of the last "
            f"{self._window.maxlen} batches, {mean:.4g}; {self._in_a_row} in a row"
        )
        is_spike = self._in_a_row > self.patience
        return Verdict(text, stops=is_spike and not self.log_only, skips=self.skip_batch)

    def _high(self) -> Verdict | None:
        """Judge whether the loss stays high; said once if it doesn't end the run."""
        size = self._window.maxlen or 0
        high = sum(loss > self.loss_cap for loss in self._window)
        was_high, self._is_high = self._is_high, self._batches > 2 * size and high >= size / 2
        if not self._is_high or (was_high and self.log_only):
            return None
        text = f"high loss: half of the last {size} batches or more were above {self.loss_cap:g}"
        return Verdict(text, stops=not self.log_only)

    def state_dict(self) -> dict[str, Any]:
        """The window, for a checkpoint."""
        return {"window": list(self._window), "in_a_row": self._in_a_row, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with a checkpoint's window."""
        self._window.extend(state["window"])
        self._in_a_row, self._batches = state["in_a_row"], state["batches"]


def _senseless(text: str) -> ConfigError:
    return ConfigError(f"callbacks.kill_loss_spike.{text}")
