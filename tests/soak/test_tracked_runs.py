"""A run that is killed three times is one run in W&B, MLflow and TensorBoard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.run.report import read_trackers
from tests.callbacks.test_trackers import run_id_of


def test_three_kills_leave_one_run_in_each_tracker(
    tiny_run: Path, launch: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "mlflow", "tensorboard"):
        pytest.importorskip(
            package, reason=f"{package} is not installed: pip install 'mptfoundry[{package}]'"
        )
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    monkeypatch.setenv("WANDB_MODE", "offline")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    words = [
        "run_name=killed",
        f"loggers.wandb={{project: test, init_kwargs: {{dir: {tmp_path}}}}}",
        f"loggers.mlflow={{experiment_name: test, tracking_uri: '{uri}', log_system_metrics: false}}",
        "loggers.tensorboard={}",
    ]
    for batch in (5, 8, 11):  # saved every third batch: two or more batches run again after each kill
        launch(tiny_run, *words).kill_after(batch, tmp_path / "killed")
    last = launch(tiny_run, *words)
    assert last.wait() == 0, last.printed

    trackers = read_trackers(tmp_path / "killed")
    files = list(tmp_path.rglob("*.wandb"))
    assert len(files) == 4 and {file.stem for file in files} == {f"run-{trackers['wandb']['id']}"}
    written = [each for each in map(run_id_of, files) if each is not None]
    assert written and set(written) == {trackers["wandb"]["id"]}  # a kill in the first seconds leaves none

    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'test'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == trackers["mlflow"]["id"]
    for name in found.data.metrics:
        steps = Counter(each.step for each in client.get_metric_history(found.info.run_id, name))
        assert set(steps.values()) == {1}, (name, steps)

    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "killed" / "tensorboard")).Reload()
    (board,) = events.Runs()
    steps = [event.step for event in events.Scalars(board, "loss/train/total")]
    assert steps == sorted(set(steps)) and steps[-1] == 11
