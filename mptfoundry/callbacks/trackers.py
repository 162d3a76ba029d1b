"""Weights & Biases and MLflow, continued by the same command that continues the run.

Composer's loggers open a new run at every start. Here, the id that the first start gets is kept in
`trackers.json` in the run's folder, and in its store, and each further start gives it back. A resumed run
repeats the batches since its checkpoint; trackers that have them already keep what they have.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, MLFlowLogger, WandBLogger

from mptfoundry.files import whole_or_absent, writing_into
from mptfoundry.ranks import decided_by_rank_0, rank, say
from mptfoundry.run.report import TRACKERS, read_trackers

REPEATED = "{tracker}: batches up to {last} are there already; those that run again are not logged twice"


class WandBRun(WandBLogger):
    """Composer's W&B logger with one W&B run for all starts of a run.

    Args:
        run_folder: The run's folder, where the id is kept.
        kept: What the run's earlier starts kept; empty if it does not resume.
        kwargs: The arguments of Composer's logger. An `id` in `init_kwargs`, or WANDB_RUN_ID, is used as is.
    """

    def __init__(self, run_folder: Path, kept: dict[str, Any], **kwargs: Any) -> None:
        options = dict(kwargs.pop("init_kwargs", None) or {})
        self._own_id: str | None = None
        if "id" not in options and "WANDB_RUN_ID" not in os.environ:
            self._own_id = decided_by_rank_0(lambda: kept.get("id") or uuid.uuid4().hex[:12])
            is_alone = kwargs.get("rank_zero_only", True)
            options["id"] = self._own_id if is_alone else f"{self._own_id}-{rank()}"
        options.setdefault("resume", "allow")
        super().__init__(init_kwargs=options, **kwargs)
        self._run_folder, self._first_new = run_folder, 0

    def init(self, state: State, logger: Logger) -> None:
        """Open the W&B run and keep its id."""
        super().init(state, logger)
        if rank() != 0:
            return
        import wandb

        assert wandb.run is not None
        self._first_new = wandb.run.step if wandb.run.resumed else 0
        entry = {"id": self._own_id or wandb.run.id, "url": wandb.run.get_url()}
        keep_tracker(self._run_folder, "wandb", entry)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Say which batches W&B has already."""
        if self._first_new > state.timestamp.batch.value + 1:
            say(REPEATED.format(tracker="W&B", last=self._first_new - 1))

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Set the W&B run's config; a resumed run may change it."""
        if self._enabled:
            import wandb

            wandb.config.update(hyperparameters, allow_val_change=True)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log metrics, unless W&B has this batch."""
        if step is None or step >= self._first_new:
            super().log_metrics(metrics, step)


class MLFlowRun(MLFlowLogger):
    """Composer's MLflow logger with one MLflow run for all starts of a run.

    The resolved config is an artifact, `config.yaml`: MLflow refuses to change a parameter.

    Args:
        run_folder: The run's folder, where the id is kept.
        kept: What the run's earlier starts kept; empty if it does not resume.
        kwargs: The arguments of Composer's logger. With `resume: true`, Composer searches by the run's name,
            as it always does; MLFLOW_RUN_ID is used as it is.
    """

    def __init__(self, run_folder: Path, kept: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._run_folder, self._kept_id = run_folder, kept.get("id")
        self._params: dict[str, str] = {}
        self._last_steps: dict[str, int] = {}

    def init(self, state: State, logger: Logger) -> None:
        """Open the MLflow run and keep its id."""
        gives_id = self._enabled and self._kept_id and not self.resume and "MLFLOW_RUN_ID" not in os.environ
        if gives_id:
            os.environ["MLFLOW_RUN_ID"] = str(self._kept_id)  # where Composer's logger looks
        try:
            super().init(state, logger)
        finally:
            if gives_id:
                del os.environ["MLFLOW_RUN_ID"]
        if not self._enabled:
            return
        run = self._mlflow_client.get_run(self._run_id)
        self._params = dict(run.data.params)
        self._last_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        if rank() == 0:
            keep_tracker(self._run_folder, "mlflow", {"id": self._run_id, "url": self.run_url})

    def fit_start(self, state: State, logger: Logger) -> None:
        """Say which batches MLflow has already."""
        last = self._last_steps.get("loss/train/total", -1) + 1
        if last > state.timestamp.batch.value:
            say(REPEATED.format(tracker="MLflow", last=last))

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Log parameters that are new, the config as an artifact, and what a later start changed as tags."""
        if not self._enabled:
            return
        rest = dict(hyperparameters)
        if (config := rest.pop("config", None)) is not None:
            self._mlflow_client.log_text(self._run_id, str(config), "config.yaml")
        new = {name: value for name, value in rest.items() if name not in self._params}
        for name, value in rest.items():
            if str(self._params.get(name, value)) != str(value):
                self._mlflow_client.set_tag(self._run_id, f"now.{name}", str(value))
        self._params |= {name: str(value) for name, value in new.items()}
        super().log_hyperparameters(new)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log what MLflow does not have: a resumed run measures the same again."""
        if step is not None:
            metrics = {name: each for name, each in metrics.items() if step > self._last_steps.get(name, -1)}
        super().log_metrics(metrics, step)


def keep_tracker(run_folder: Path, tracker: str, entry: dict[str, Any]) -> None:
    """Write a tracker's id and page into the run's folder."""
    kept = read_trackers(run_folder) | {tracker: entry}
    with writing_into(run_folder):
        run_folder.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(run_folder / TRACKERS, overwrite=True) as file:
            file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
