"""Weights & Biases, MLflow and Comet, continued by the same command that continues the run.

Composer's loggers open a new run at every start. Here, the id that the first start gets is kept in
`trackers.json` in the run's folder, and in its store, and each further start gives it back. A resumed run
repeats the batches since its checkpoint; trackers that have them already keep what they have.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import CometMLLogger, Logger, LoggerDestination, MLFlowLogger, WandBLogger

from mptfoundry.errors import ConfigError
from mptfoundry.files import whole_or_absent, writing_into
from mptfoundry.ranks import decided_by_rank_0, rank, say
from mptfoundry.run.report import TRACKERS, read_trackers

REPEATED = "{tracker}: batches up to {last} are there already; those that run again are not logged twice"
LOSS = "loss/train/total"  # what Composer logs for every batch; the loss of batch N has step N - 1
# What `comet_ml.start` takes itself; the rest of `exp_kwargs` is for `comet_ml.ExperimentConfig`.
COMET_START = ("api_key", "workspace", "project_name", "experiment_key", "mode", "online", "source")
# The files of Comet in the folder and the zip file of an offline experiment.
COMET_MESSAGES, COMET_EXPERIMENT = "messages.json", "experiment.json"


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
            keep_tracker(self._run_folder, "mlflow", {"id": self._run_id, "url": self._page()})

    def _page(self) -> str | None:
        """The run's page on its server; None for a store of files or a database."""
        uri, path = str(self.tracking_uri), f"experiments/{self._experiment_id}/runs/{self._run_id}"
        if uri.startswith("databricks"):
            return f"{os.environ.get('DATABRICKS_HOST', '').rstrip('/')}/ml/{path}"
        return f"{uri.rstrip('/')}/#/{path}" if uri.startswith("http") else None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Say which batches MLflow has already."""
        _say_repeated("MLflow", self._last_steps, state)

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
        super().log_metrics(_new_ones(metrics, step, self._last_steps), step)


def _say_repeated(tracker: str, last_steps: dict[str, int], state: State) -> None:
    last = last_steps.get(LOSS, -1) + 1
    if last > state.timestamp.batch.value:
        say(REPEATED.format(tracker=tracker, last=last))


def _new_ones(metrics: dict[str, Any], step: int | None, last_steps: dict[str, int]) -> dict[str, Any]:
    """The metrics of which a tracker doesn't have this step yet."""
    if step is None:
        return metrics
    return {name: each for name, each in metrics.items() if step > last_steps.get(name, -1)}


class CometRun(CometMLLogger):
    """Composer's Comet logger with one experiment for all starts of a run, online or offline.

    The resolved config is an asset, `config.yaml`; parameters may change. Offline, each start writes a zip
    file, and the next start zips what a killed one left.

    Args:
        run_folder: The run's folder, where the experiment's key is kept; offline, its subfolder `comet` gets
            the zip files, unless `offline_directory` or COMET_OFFLINE_DIRECTORY names another folder.
        kept: What the run's earlier starts kept; empty if it does not resume.
        kwargs: The arguments of Composer's logger. `exp_kwargs` are those of `comet_ml.start` and of
            `comet_ml.ExperimentConfig`. An `experiment_key` there, or COMET_EXPERIMENT_KEY, is used as is.

    Raises:
        ConfigError: `exp_kwargs` has an unknown key, or Comet has no API key and is not offline.
    """

    def __init__(self, run_folder: Path, kept: dict[str, Any], **kwargs: Any) -> None:
        LoggerDestination.__init__(self)  # Composer's own begins a new experiment
        self._rank_zero_only = kwargs.pop("rank_zero_only", True)
        self._enabled = not self._rank_zero_only or rank() == 0
        options = dict(kwargs.pop("exp_kwargs", None) or {}) | {"log_code": False, "log_graph": False}
        self._options = options | {name: value for name, value in kwargs.items() if value is not None}
        self.name = self._options.pop("name", None)
        _check_comet_options(self._options)
        self._own_key: str | None = None
        if not _comet_setting(self._options, "experiment_key"):
            key = str(decided_by_rank_0(lambda: kept.get("id") or uuid.uuid4().hex))
            self._own_key = key
            self._options["experiment_key"] = key if self._rank_zero_only else f"{key}r{rank()}"
        self._run_folder = run_folder
        self.experiment: Any = None
        self._last_steps: dict[str, int] = {}
        self._unfinished: Path | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Open the experiment and keep its key."""
        if self._enabled:
            self._open()
        super().init(state, logger)
        if rank() == 0:
            entry = {"id": self._own_key or self.experiment.get_key(), "url": self.experiment.url}
            keep_tracker(self._run_folder, "cometml", entry)

    def _open(self) -> None:
        import comet_ml

        settings = comet_ml.ExperimentConfig(
            **{name: value for name, value in self._options.items() if name not in COMET_START}
        )
        if not settings.offline_directory or settings.has_default_offline_directory():
            settings.offline_directory = str(self._run_folder / "comet")
        folder, key = Path(settings.offline_directory), str(_comet_setting(self._options, "experiment_key"))
        if not _is_online(self._options):
            with writing_into(folder):
                folder.mkdir(parents=True, exist_ok=True)
                zip_unfinished(folder, key)
            self._last_steps = offline_steps(folder, key)
        start = {name: self._options[name] for name in COMET_START if name in self._options}
        start = {"mode": "get_or_create"} | start | {"experiment_key": key}
        with _other_random_numbers():
            self.experiment = comet_ml.start(**start, experiment_config=settings)
        self.experiment.log_other("Created from", "mosaicml-composer")
        if isinstance(self.experiment, comet_ml.ExistingExperiment):
            self._last_steps = _online_steps(self.experiment)
        elif isinstance(self.experiment, comet_ml.OfflineExperiment) and self.experiment.alive:
            self._unfinished = folder / f"{key}.unfinished"
            with writing_into(folder):
                _point_to_messages(self._unfinished, self.experiment)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Say which batches Comet has already."""
        _say_repeated("Comet", self._last_steps, state)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Log the config as an asset and the rest as parameters; a later start overwrites both."""
        rest = dict(hyperparameters)
        config = rest.pop("config", None)
        if self._enabled and config is not None:
            self.experiment.log_asset_data(str(config), name="config.yaml", overwrite=True)
        super().log_hyperparameters(rest)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log what Comet does not have: a resumed run measures the same again."""
        super().log_metrics(_new_ones(metrics, step, self._last_steps), step)

    def post_close(self) -> None:
        """End the experiment, if there is one."""
        if self.experiment is None:
            return
        super().post_close()
        if self._unfinished is not None and not self._unfinished.exists():
            self._unfinished.unlink(missing_ok=True)  # Comet has zipped and removed the folder


@contextmanager
def _other_random_numbers() -> Iterator[None]:
    """Draw from another sequence than the run's, and leave the run's as it is.

    Comet draws the end of a zip file's name from Python's random numbers. Every start of a run has the same
    seed, so a start would overwrite the zip file of the one before.
    """
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)


def zip_unfinished(folder: Path, key: str) -> None:
    """Zip what a killed start of an offline Comet experiment left, and remove the zip file it did not finish.

    Args:
        folder: The folder of the zip files.
        key: The experiment's key.
    """
    link = folder / f"{key}.unfinished"
    left = link.resolve() if link.is_dir() else None
    facts = {file: _facts_in(file) for file in folder.glob(f"{key}-*.zip")}
    for file in facts:
        if facts[file] is None:
            file.unlink()
    if left is not None and (left / COMET_EXPERIMENT).is_file() and (left / COMET_MESSAGES).is_file():
        own = json.loads((left / COMET_EXPERIMENT).read_bytes())
        # A kill just after Comet wrote the zip file leaves both.
        if all(each["start_time"] != own["start_time"] for each in facts.values() if each is not None):
            own["stop_time"] = int((left / COMET_MESSAGES).stat().st_mtime * 1000)
            (left / COMET_EXPERIMENT).write_text(json.dumps(own), encoding="utf-8")
            messages = (left / COMET_MESSAGES).read_bytes()  # a kill may cut the last line
            (left / COMET_MESSAGES).write_bytes(messages[: messages.rfind(b"\n") + 1])
            with (
                whole_or_absent(folder / f"{key}-{uuid.uuid4().hex[:6]}.zip") as file,
                zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
            ):
                for each in left.iterdir():
                    archive.write(each, each.name)
        shutil.rmtree(left, ignore_errors=True)
    link.unlink(missing_ok=True)


def _facts_in(file: Path) -> dict[str, Any] | None:
    """What Comet's zip file says of its start; None if the zip file is not finished."""
    try:
        with zipfile.ZipFile(file) as archive:
            return dict(json.loads(archive.read(COMET_EXPERIMENT)))
    except (zipfile.BadZipFile, KeyError):
        return None


def _point_to_messages(link: Path, experiment: Any) -> None:
    """Point `link` to the temporary folder into which Comet writes until the end of an offline experiment."""
    from comet_ml.offline_utils import write_experiment_meta_file

    write_experiment_meta_file(  # Comet itself writes it at the end
        tempdir=experiment.tmpdir,
        experiment_key=experiment.get_key(),
        workspace=experiment.workspace,
        project_name=experiment.project_name,
        start_time=experiment.start_time,
        stop_time=experiment.start_time,
        tags=experiment.get_tags(),
        resume_strategy=experiment.resume_strategy,
        user_provided_experiment_key=True,
        comet_start_sourced=True,
    )
    link.symlink_to(experiment.tmpdir)


def _online_steps(experiment: Any) -> dict[str, int]:
    """Return the last step of each metric that Comet's server has."""
    import comet_ml

    page = comet_ml.API(api_key=experiment.api_key).get_experiment_by_key(experiment.get_key())
    summary = page.get_metrics_summary() if page is not None else None
    last = {each["name"]: each.get("stepCurrent") for each in summary or []}
    return {name: int(step) for name, step in last.items() if step is not None}


def offline_steps(folder: Path, key: str) -> dict[str, int]:
    """Return the last step of each metric in the zip files of an offline Comet experiment."""
    last: dict[str, int] = {}
    for file in folder.glob(f"{key}-*.zip"):
        with zipfile.ZipFile(file) as archive, archive.open(COMET_MESSAGES) as lines:
            for line in lines:
                if b'"metric_msg"' in line:
                    metric = json.loads(line)["payload"]["metric"]
                    name, step = metric["metricName"], metric["step"]
                    if step is not None:
                        last[name] = max(step, last.get(name, -1))
    return last


def _check_comet_options(options: dict[str, Any]) -> None:
    import comet_ml

    known = sorted({*COMET_START, *inspect.signature(comet_ml.ExperimentConfig).parameters})
    if unknown := sorted(options.keys() - set(known)):
        raise ConfigError(
            f"loggers.cometml.exp_kwargs: {unknown[0]} is not an argument of comet_ml.start or "
            f"comet_ml.ExperimentConfig. Known are {', '.join(known)}."
        )
    if _is_online(options) and not _comet_setting(options, "api_key"):
        raise ConfigError(
            "loggers.cometml: Comet needs an API key. Set COMET_API_KEY, or write zip files for a later "
            "upload with exp_kwargs: {online: false}."
        )


def _is_online(options: dict[str, Any]) -> bool:
    import comet_ml

    return bool(comet_ml.get_config().get_bool(options.get("online"), "comet.start.online", default=True))


def _comet_setting(options: dict[str, Any], name: str) -> Any:
    """An argument, or what the environment and Comet's configuration file say."""
    import comet_ml

    return options.get(name) or comet_ml.get_config(f"comet.{name}")


def keep_tracker(run_folder: Path, tracker: str, entry: dict[str, Any]) -> None:
    """Write a tracker's id and page into the run's folder."""
    kept = read_trackers(run_folder) | {tracker: entry}
    with writing_into(run_folder):
        run_folder.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(run_folder / TRACKERS, overwrite=True) as file:
            file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
