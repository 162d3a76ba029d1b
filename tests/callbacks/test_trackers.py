"""Trackers continue with the run: one id over all starts, each point once, a config that may change."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from mptfoundry.checkpoints.checkpoint import newest_first
from mptfoundry.errors import DataError
from mptfoundry.run.report import TRACKERS, read_trackers
from tests.runs import run  # noqa: F401

WORDS = ("max_duration=4ba", "save_interval=2ba", "eval_interval=2ba", "save_num_checkpoints_to_keep=-1")


def kill_after_batch_2(folder: Path) -> None:
    """Leave the run as if it had been killed after batch 4, when the checkpoint of batch 2 was its last."""
    newest_first(folder)[0].path.unlink()
    (folder / "latest-rank0.pt").unlink()


def test_wandb_has_one_id(
    run: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mptfoundry[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = f"loggers={{wandb: {{project: test, init_kwargs: {{dir: {tmp_path}}}}}}}"
    folder = run("tracked", words)
    kill_after_batch_2(folder)
    run("tracked", words, "max_duration=6ba")
    run("other", words)
    ids = [
        run_id_of(file) for file in sorted(tmp_path.rglob("*.wandb"), key=lambda each: each.stat().st_mtime)
    ]
    assert ids[0] == ids[1] == read_trackers(folder)["wandb"]["id"]
    assert ids[2] == read_trackers(folder.parent / "other")["wandb"]["id"] != ids[0]


def run_id_of(file: Path) -> str | None:
    """The id of the W&B run that an offline file records; None if W&B was killed before it wrote it."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            return str(record.run.run_id)
    return None


def test_an_id_of_the_users_own_stands(
    run: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mptfoundry[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run("own", f"loggers={{wandb: {{project: test, init_kwargs: {{id: mine, dir: {tmp_path}}}}}}}")
    (file,) = tmp_path.rglob("*.wandb")
    assert run_id_of(file) == "mine"


@pytest.mark.soak
def test_mlflow_has_one_run_with_each_point_once(
    run: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'mptfoundry[mlflow]'")
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = (
        f"{{experiment_name: test, tracking_uri: '{uri}', log_system_metrics: false, synchronous: true}}"
    )
    words = f"loggers={{mlflow: {tracker}}}"
    folder = run("tracked_by_mlflow", words)
    kill_after_batch_2(folder)
    run("tracked_by_mlflow", words, "max_duration=6ba", "console_log_interval=2ba")
    assert capfd.readouterr().out.count("MLflow: batches up to 4 are there already") == 1
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'test'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == read_trackers(folder)["mlflow"]["id"]
    losses = client.get_metric_history(found.info.run_id, "loss/train/total")
    assert sorted(each.step for each in losses) == [0, 1, 2, 3, 4, 5]
    for name in found.data.metrics:
        steps = Counter(each.step for each in client.get_metric_history(found.info.run_id, name))
        assert set(steps.values()) == {1}, (name, steps)
    assert (
        "max_duration: 6ba" in Path(client.download_artifacts(found.info.run_id, "config.yaml")).read_text()
    )


def test_tensorboard_shows_each_point_once(run: Callable[..., Path], shards: Path) -> None:  # noqa: F811
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    evaluation = f"eval_loader={{name: text, label: held_out, dataset: {{local: {shards}/a, split: train}}}}"
    words = ("loggers={tensorboard: {}}", evaluation, "eval_subset_num_batches=1")
    folder = run("boarded", *words)
    kill_after_batch_2(folder)
    run("boarded", *words, "max_duration=6ba")
    events = EventMultiplexer().AddRunsFromDirectory(str(folder / "tensorboard")).Reload()
    (name,) = events.Runs()
    steps = [event.step for event in events.Scalars(name, "loss/train/total")]
    assert steps == [0, 1, 2, 3, 4, 5]
    for tag in events.Runs()[name]["scalars"]:
        steps = [event.step for event in events.Scalars(name, tag)]
        # `hparams/` is what each start ended with, and has no step.
        assert len(steps) == len(set(steps)) or tag.startswith("hparams/"), (tag, steps)
    evaluated = next(tag for tag in events.Runs()[name]["scalars"] if "LanguageCrossEntropy" in tag)
    assert [event.step for event in events.Scalars(name, evaluated)] == [2, 4, 6]


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    assert read_trackers(tmp_path) == {}
    (tmp_path / TRACKERS).write_text(json.dumps({"wandb": {"id": "a"}})[:-4])
    with pytest.raises(DataError, match=r"trackers\.json: can't be read .* Remove it to begin new runs"):
        read_trackers(tmp_path)
