"""TensorBoard event files in the run's folder, one for each start.

A resumed run repeats the batches since its checkpoint; TensorBoard is told to show each point once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, TensorboardLogger

from mptfoundry.ranks import rank
from mptfoundry.run.metrics import NAME as METRICS
from mptfoundry.run.metrics import read_rows


class TensorBoardFile(TensorboardLogger):
    """Composer's TensorBoard logger with one event file; Composer's own opens a new file at every flush.

    The file is created when training or an evaluation begins.

    Args:
        run_folder: The run's folder.
        log_dir: The parent of a folder with the run's name. Default: `tensorboard` in the run's folder.
        flush_interval: Batches between two flushes to the file.
        rank_zero_only: Log on rank 0 alone.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        log_dir: str | None = None,
        flush_interval: int = 100,
        rank_zero_only: bool = True,
    ) -> None:
        super().__init__(log_dir, flush_interval, rank_zero_only)
        self.run_folder = run_folder
        self._early: list[tuple[dict[str, Any], int | None]] = []
        self._repeated: int | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Save the run's name."""
        self.run_name = state.run_name

    def after_load(self, state: State, logger: Logger) -> None:
        """Record the batch that an earlier start has begun and this one repeats first, if there is one."""
        batch, metrics = int(state.timestamp.batch), self.run_folder / METRICS
        if batch > 0 and metrics.is_file() and any(row["batch"] > batch for row in read_rows(metrics)):
            self._repeated = batch

    def fit_start(self, state: State, logger: Logger) -> None:
        """Create the file."""
        self._begin(state)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Create the file if an evaluation comes first."""
        self._begin(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        """End the first batch that may be repeated."""
        self._repeated = None

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write metrics, or buffer them until there is a file."""
        if step is not None and step == self._repeated:
            # The loss of batch N has step N - 1, what is measured at its end has step N. The file has both up
            # to the checkpoint, and of what follows this one alone, which purge_step keeps.
            metrics = {name: each for name, each in metrics.items() if name.startswith("metrics/")}
        if self.writer is None:
            self._early.append((metrics, step))
        else:
            super().log_metrics(metrics, step)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Flush the file."""
        self._flush(logger)

    def close(self, state: State, logger: Logger) -> None:
        """Write the config with the last measurements, and close the file."""
        if self.writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        measured = {
            f"hparams/{k}": v for k, v in self.current_metrics.items() if "metric" in k or "loss" in k
        }
        measured = {name: float(value) for name, value in measured.items()}
        for summary in hparams(self.hyperparameters, measured):
            self.writer._get_file_writer().add_summary(summary)
        for name, value in measured.items():
            self.writer.add_scalar(name, value)
        self.writer.close()
        self.writer = None

    def _begin(self, state: State) -> None:
        if self.writer is not None or (self.rank_zero_only and rank() != 0):
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = self.run_folder / "tensorboard"
        if self.log_dir is not None:
            folder = Path(self.log_dir) / str(self.run_name)
        batch = int(state.timestamp.batch)
        self.writer = SummaryWriter(log_dir=str(folder), purge_step=batch + 1 if batch else None)
        for metrics, step in self._early:
            super().log_metrics(metrics, step)
        self._early = []

    def _flush(self, logger: Logger) -> None:
        if self.writer is not None:
            self.writer.flush()
