"""Trackers continue with the run: one id over all starts, each point once, a config that may change."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mptfoundry.checkpoints.checkpoint import newest_first
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.run.report import TRACKERS, read_trackers
from tests.runs import run  # noqa: F401

WORDS = ("max_duration=4ba", "save_interval=2ba", "eval_interval=2ba", "save_num_checkpoints_to_keep=-1")

NO_COMET = "comet_ml is not installed: pip install 'mptfoundry[cometml]'"
QUIET = {
    "log_env_details": False,
    "log_git_metadata": False,
    "parse_args": False,
    "auto_output_logging": False,
}


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


def test_comet_has_one_experiment_with_each_point_once(
    run: Callable[..., Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("comet_ml", reason=NO_COMET)
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    words = f"loggers={{cometml: {{project_name: test, exp_kwargs: {json.dumps(QUIET)}}}}}"
    folder = run("tracked_by_comet", words)
    kill_after_batch_2(folder)
    run("tracked_by_comet", words, "max_duration=6ba")
    assert capfd.readouterr().out.count("Comet: batches up to 4 are there already") == 1
    run("tracked_by_comet", words, "max_duration=8ba")
    kept = read_trackers(folder)["cometml"]
    starts = [offline_start(file) for file in (folder / "comet").iterdir()]
    assert [facts["offline_id"] for facts, _ in starts] == [kept["id"]] * 3 and kept["url"] is None
    assert {facts["resume_strategy"] for facts, _ in starts} == {"get_or_create"}
    points = Counter(point for _, messages in starts for point in points_of(messages))
    assert set(points.values()) == {1}, [point for point, times in points.items() if times > 1]
    assert sorted(step for name, step in points if name == "loss/train/total") == list(range(8))
    assets = [each for _, messages in starts for each in messages if "config.yaml" in str(each)]
    assert len(assets) == 3 and all(each["payload"]["additional_params"]["overwrite"] for each in assets)


def test_three_kills_leave_one_experiment_in_comet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("comet_ml", reason=NO_COMET)
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    for first, last, ends in ((0, 5, False), (3, 8, False), (6, 11, False), (9, 12, True)):
        start = multiprocessing.get_context("fork").Process(
            target=log_to_comet, args=(tmp_path, range(first, last), ends)
        )
        start.start()
        start.join(60)
        assert start.exitcode == (0 if ends else -signal.SIGKILL)
    starts = [offline_start(file) for file in (tmp_path / "comet").iterdir()]
    key = read_trackers(tmp_path)["cometml"]["id"]
    assert [facts["offline_id"] for facts, _ in starts] == [key] * 4
    assert all(facts["start_time"] <= facts["stop_time"] for facts, _ in starts)
    points = [point for _, messages in starts for point in points_of(messages)]
    assert sorted(points) == [("loss/train/total", step) for step in range(12)]


def log_to_comet(run_folder: Path, steps: range, ends: bool) -> None:
    """A start of a run that logs these steps, and is killed unless it `ends`."""
    from mptfoundry.callbacks.trackers import CometRun

    random.seed(17)  # as each start of a run does
    comet = CometRun(run_folder, read_trackers(run_folder).get("cometml", {}), exp_kwargs=QUIET)
    comet.init(SimpleNamespace(run_name="killed"), None)  # type: ignore[arg-type]
    for step in steps:
        comet.log_metrics({"loss/train/total": 1 / (step + 1)}, step)
    messages = Path(comet.experiment.tmpdir, "messages.json")
    written = f'"step":{steps[-1]}}}'.encode()
    until = time.monotonic() + 30
    while not ends and written not in messages.read_bytes().replace(b" ", b"") and time.monotonic() < until:
        time.sleep(0.02)  # Comet writes in a thread
    if not ends:
        os.kill(os.getpid(), signal.SIGKILL)
    comet.post_close()
    os._exit(0)


def offline_start(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a zip file of an offline Comet experiment says of its start, and its messages."""
    with zipfile.ZipFile(file) as archive:
        lines = archive.read("messages.json").splitlines()
        return json.loads(archive.read("experiment.json")), [json.loads(line) for line in lines]


def points_of(messages: list[dict[str, Any]]) -> list[tuple[str, int]]:
    metrics = [each["payload"]["metric"] for each in messages if each["type"] == "metric_msg"]
    return [(each["metricName"], each["step"]) for each in metrics]


def test_a_comet_key_of_the_users_own_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("comet_ml", reason=NO_COMET)
    from mptfoundry.callbacks.trackers import CometRun

    def key_of(**options: Any) -> str:
        exp_kwargs = {**QUIET, "online": False, **options}
        comet = CometRun(tmp_path / "run", {"id": "a" * 32}, exp_kwargs=exp_kwargs)
        comet.init(SimpleNamespace(run_name="own"), None)  # type: ignore[arg-type]
        comet.post_close()
        return str(comet.experiment.get_key())

    assert key_of() == "a" * 32
    monkeypatch.setenv("COMET_EXPERIMENT_KEY", "b" * 32)
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "elsewhere"))
    assert key_of() == "b" * 32 == read_trackers(tmp_path / "run")["cometml"]["id"]
    assert key_of(experiment_key="c" * 32) == "c" * 32
    assert sorted(file.name[:1] for file in (tmp_path / "elsewhere").iterdir()) == ["b", "c"]


def test_comet_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("comet_ml", reason=NO_COMET)
    from mptfoundry.callbacks.trackers import CometRun

    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Comet's configuration file is
    with pytest.raises(ConfigError, match=r"needs an API key\. Set COMET_API_KEY, or .*online: false"):
        CometRun(tmp_path, {})
    with pytest.raises(ConfigError, match=r"exp_kwargs: lodge_code is not an argument of comet_ml\.start"):
        CometRun(tmp_path, {}, exp_kwargs={"lodge_code": True, "online": False})


def test_what_comets_server_has_is_not_logged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With stand-ins for the server's answers; nothing goes to the network."""
    comet_ml = pytest.importorskip("comet_ml", reason=NO_COMET)
    from mptfoundry.callbacks.trackers import CometRun

    logged: list[tuple[dict[str, Any], int]] = []

    class Existing(comet_ml.ExistingExperiment):
        api_key, url = "none", "https://www.comet.com/page"

        def __init__(self, key: str) -> None:
            self.get_key = lambda: key
            self.log_other = self.set_name = self.end = lambda *_: None
            self.log_metrics = lambda dic, step: logged.append((dic, step))

    summary = [{"name": "loss/train/total", "stepCurrent": 3}, {"name": "other", "stepCurrent": None}]
    page = SimpleNamespace(get_metrics_summary=lambda: summary)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        comet_ml, "API", lambda api_key: SimpleNamespace(get_experiment_by_key=lambda key: page)
    )
    monkeypatch.setattr(
        comet_ml, "start", lambda **options: (asked.append(options), Existing(options["experiment_key"]))[1]
    )
    comet = CometRun(tmp_path, {"id": "a" * 32}, project_name="test", exp_kwargs={"api_key": "none"})
    state: Any = SimpleNamespace(run_name="online", timestamp=SimpleNamespace(batch=SimpleNamespace(value=2)))
    comet.init(state, None)  # type: ignore[arg-type]
    comet.fit_start(state, None)  # type: ignore[arg-type]
    for step in (2, 3, 4):
        comet.log_metrics({"loss/train/total": 1.0, "new": 2.0}, step)
    comet.post_close()
    assert logged == [({"new": 2.0}, 2), ({"new": 2.0}, 3), ({"loss/train/total": 1.0, "new": 2.0}, 4)]
    assert capfd.readouterr().out.count("Comet: batches up to 4 are there already") == 1
    assert (asked[0]["experiment_key"], asked[0]["mode"]) == ("a" * 32, "get_or_create")
    assert asked[0]["project_name"] == "test"
    assert read_trackers(tmp_path)["cometml"] == {"id": "a" * 32, "url": "https://www.comet.com/page"}


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
