"""A training run: `train(config)` builds what the config describes, and Composer's Trainer runs it.

A run has one local folder: the resolved config, the tokenizer, `metrics.jsonl`, the report and, where they
are saved, the checkpoints. Started again with the same command, it continues from its newest checkpoint.
"""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from composer import Trainer
from composer.core import Event, Time
from composer.loggers import LoggerDestination
from composer.utils import dist, format_name_with_dist
from composer.utils.file_helpers import list_remote_objects

from mptfoundry import build, loaders
from mptfoundry.callbacks.console import ConsoleLine
from mptfoundry.callbacks.gloo_average import AverageGradients
from mptfoundry.callbacks.metrics_file import MetricsFile
from mptfoundry.callbacks.report import write_report
from mptfoundry.callbacks.rng_resume import restore_random_state
from mptfoundry.callbacks.step_guard import EvaluationLeft, StepGuard
from mptfoundry.callbacks.throughput import Throughput
from mptfoundry.checkpoints.names import checkpoints_in
from mptfoundry.checkpoints.reading import ModelSource, expected_shapes, open_model
from mptfoundry.config.load import refuse_redacted, to_yaml
from mptfoundry.config.run import TrainConfig
from mptfoundry.devices import Device, detect_device
from mptfoundry.errors import CheckpointError, ConfigError, RunStopped
from mptfoundry.leftovers import clean_start
from mptfoundry.mpt.flops import count_parameters
from mptfoundry.plan import summary_table
from mptfoundry.ranks import RankWatch
from mptfoundry.resolve import Resolved, resolve_auto
from mptfoundry.signals import StopSignals

# Said by Composer of what is meant so: the last batch of an evaluation is smaller than the others, and
# `eval_subset_num_batches` is a limit that a short evaluation does not reach.
EXPECTED_WARNINGS = ("Cannot split (tensor|list) of length", "DataloaderNumBatchesWarning")


def train(config: TrainConfig) -> Trainer:
    """Trains the model of `config` to its `max_duration`, from its newest checkpoint if there is one.

    Returns:
        The trainer, finished: its `state` holds the model and the last measurements.

    Raises:
        ConfigError, DataError, CheckpointError: Something that the config names is missing or doesn't fit.
        TrainingError: The numbers are not finite, or a rank is silent.
        RunStopped: SIGTERM or SIGINT came; what was trained is saved.
    """
    refuse_redacted(config)
    device = detect_device()
    resolved = resolve_auto(config, device)
    watch = RankWatch(config.dist_timeout)
    with StopSignals(speaks=dist.get_global_rank() == 0, failure=watch.failure) as signals:
        starting = clean_start() if dist.get_local_rank() == 0 else ExitStack()
        with starting:
            set_up_process(config, device)
            with watch, watch.explained():
                return _train(config, resolved, device, StepGuard(signals, watch), starting)


def _train(
    config: TrainConfig, resolved: Resolved, device: Device, guard: StepGuard, starting: ExitStack
) -> Trainer:
    folder = run_folder(config)
    refuse_another_model(config, folder)
    say(summary_table(config, device))
    source = starting_model(config)
    if source is not None:
        say(f"weights: from {source.path}; the optimizer starts new")
    build.run_code_paths(config)
    tokenizer = build.build_tokenizer(config)
    train_loader = loaders.build_train_loader(config, resolved, device, tokenizer)
    evaluators = loaders.build_eval_loaders(config, resolved, tokenizer)
    model = build.build_model(config, resolved, tokenizer, source)
    write_run_files(config, folder, tokenizer)
    throughput = Throughput(config.model.network(), peak_flops=device.peak_flops)
    trainer = Trainer(
        model=model,
        train_dataloader=train_loader,
        eval_dataloader=evaluators,
        optimizers=build.build_optimizer(config, model),
        schedulers=build.build_scheduler(config),
        algorithms=build.build_algorithms(config),
        callbacks=[guard, throughput, AverageGradients(), *build.build_callbacks(config, tokenizer, folder)],
        loggers=[*build.build_loggers(config), *_own_loggers(config, folder)],
        parallelism_config=build.build_parallelism(config, resolved, device),
        **_plain_arguments(config, resolved, device, has_weights=source is not None),
    )
    starting.close()
    restore_random_state(trainer)
    if config.model.takes_weights and source is None and trainer.state.timestamp.batch == 0:
        raise CheckpointError(f"save_folder: the checkpoint in {config.save_folder} was not loaded.")
    if config.log_config:
        trainer.logger.log_hyperparameters({"config": to_yaml(config)})
    if _is_finished(trainer):
        say(f"{config.run_name} is finished: {trainer.state.timestamp.batch.value} batches are done.")
    else:
        fit(trainer, config, guard)
    trainer.close()
    if dist.get_global_rank() == 0:
        facts = {"model": config.model.name, "parameters": f"{count_parameters(config.model):,}"}
        say(f"report: {write_report(folder, facts=facts)}")
    return trainer


def fit(trainer: Trainer, config: TrainConfig, guard: StepGuard) -> None:
    """Trains to the run's end. Raises RunStopped where it was asked to stop before; all is saved then."""
    state = trainer.state
    with guard.signals.answered_by_training():
        try:
            if config.eval_first and state.timestamp.batch == 0:
                trainer.eval()
            trainer.fit()
        except EvaluationLeft:
            # The evaluation comes before the place where Composer saves.
            state.set_dataloader(state.train_dataloader, "train")
            state.stop_training()
            trainer.engine.run_event(Event.BATCH_CHECKPOINT)
        if not guard.is_stopping:
            return
        trainer.close()
    raise RunStopped(_how_it_goes_on(trainer, config, guard))


def _how_it_goes_on(trainer: Trainer, config: TrainConfig, guard: StepGuard) -> str:
    who, batch = guard.signals.requested or "a signal to another rank", trainer.state.timestamp.batch.value
    stopped = f"{who}: {config.run_name} stopped after batch {batch}"
    if config.save_folder is None:
        return f"{stopped}. Nothing is kept of it, since save_folder is null: the next start begins anew."
    kept = f"{stopped}; its checkpoint is in {config.save_folder.format(run_name=config.run_name)}"
    if config.resumes:
        return f"{kept}. The same command goes on."
    return f"{kept}. autoresume is off: name the checkpoint in load_path to go on."


def run_folder(config: TrainConfig) -> Path:
    """The run's local folder: `save_folder` if that is local, else `runs/{run_name}`."""
    if config.save_folder is not None and not urlparse(config.save_folder).scheme:
        return Path(config.save_folder.format(run_name=config.run_name))
    return Path("runs") / config.run_name


def starting_model(config: TrainConfig) -> ModelSource | None:
    """The model whose weights the run takes; None where they are new, or come with a checkpoint."""
    if not (config.model.takes_weights or config.load_path) or has_checkpoint(config):
        return None
    return build.open_pretrained(config.model) if config.model.takes_weights else build.open_base(config)


def has_checkpoint(config: TrainConfig) -> bool:
    """Whether the run goes on from a checkpoint of its own; Composer looks for it by the same name."""
    if not config.resumes or config.save_folder is None:
        return False
    found = [False]
    if dist.get_global_rank() == 0:
        folder = config.save_folder.format(run_name=config.run_name)
        latest = format_name_with_dist(config.latest_filename, config.run_name)
        if urlparse(folder).scheme:
            names = {Path(name).name for name in list_remote_objects(folder)}
            found[0] = latest in names or f"{latest}.symlink" in names
        else:
            found[0] = (Path(folder) / latest).exists()
    dist.broadcast_object_list(found)
    return found[0]


def refuse_another_model(config: TrainConfig, folder: Path) -> None:
    """Raises CheckpointError where the run's folder holds checkpoints that `config.model` can't continue.

    Before anything is written: the folder's `config.yaml` belongs to those checkpoints.
    """
    if not (folder / "config.yaml").is_file() or not checkpoints_in(folder):
        return
    there, here = expected_shapes(open_model(folder).config), expected_shapes(config.model.network())
    for name in [*here, *there]:
        if there.get(name) != here.get(name):
            sizes = [str(shapes[name]) if name in shapes else "missing" for shapes in (there, here)]
            raise CheckpointError(
                f"save_folder: {folder} holds checkpoints of another model: {name} is {sizes[0]} there and "
                f"{sizes[1]} in this config. Use another run_name or save_folder."
            )


def say(text: str) -> None:
    """Prints on rank 0 alone."""
    if dist.get_global_rank() == 0:
        print(text, flush=True)


def set_up_process(config: TrainConfig, device: Device) -> None:
    """Settings that must stand before the first tensor, and the meeting of all ranks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for expected in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=expected)
    if device.kind == "gpu":
        allocator = [f"expandable_segments:{config.expandable_segments}"]
        if config.max_split_size_mb is not None:
            allocator.append(f"max_split_size_mb:{config.max_split_size_mb}")
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", ",".join(allocator))
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY" if config.cuda_load_lazy else "EAGER")
    if dist.get_world_size() > 1:
        dist.initialize_dist(device.kind, timeout=config.dist_timeout)


def write_run_files(config: TrainConfig, folder: Path, tokenizer: Any) -> None:
    """The resolved config and the tokenizer, which make the folder's checkpoints usable by themselves."""
    if dist.get_global_rank() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
        tokenizer.save_pretrained(folder / "tokenizer")
    except OSError as error:
        raise ConfigError(
            f"save_folder: {folder} can't be written to: {error.strerror}. Use a folder of yours on a disk "
            "with space."
        ) from error


def _own_loggers(config: TrainConfig, folder: Path) -> list[LoggerDestination]:
    """Always on: the run's own record, and a line for people."""
    own: list[LoggerDestination] = [MetricsFile(folder)]
    if config.log_to_console:
        own.append(ConsoleLine(config.console_log_interval))
    return own


def _plain_arguments(
    config: TrainConfig, resolved: Resolved, device: Device, *, has_weights: bool
) -> dict[str, Any]:
    """The Trainer's arguments that the config gives as they are; `has_weights`: there is nothing to load."""
    return {
        "device": device.kind,
        "run_name": config.run_name,
        "seed": config.seed,
        "max_duration": config.max_duration,
        "train_subset_num_batches": config.train_subset_num_batches,
        "spin_dataloaders": config.spin_dataloaders,
        "eval_interval": config.eval_interval,
        "eval_subset_num_batches": config.eval_subset_num_batches,
        "progress_bar": config.progress_bar,
        "log_to_console": False,
        "precision": resolved.precision,
        "device_train_microbatch_size": resolved.device_train_microbatch_size,
        "accumulate_train_batch_on_tokens": config.accumulate_train_batch_on_tokens,
        "dist_timeout": config.dist_timeout,
        "python_log_level": config.python_log_level,
        "save_folder": config.save_folder and config.save_folder.format(run_name=config.run_name),
        "save_filename": config.save_filename,
        "save_latest_filename": config.latest_filename,
        "save_interval": config.save_interval,
        "save_num_checkpoints_to_keep": config.save_num_checkpoints_to_keep,
        "save_overwrite": config.save_overwrite,
        "save_weights_only": config.save_weights_only,
        "save_ignore_keys": config.save_ignore_keys and list(config.save_ignore_keys),
        "autoresume": config.resumes,
        "load_path": None if has_weights else _load_path(config),
        "load_weights_only": config.load_weights_only,
        "load_strict_model_weights": config.load_strict_model_weights,
        "load_ignore_keys": config.load_ignore_keys and list(config.load_ignore_keys),
    }


def _load_path(config: TrainConfig) -> str | None:
    """The checkpoint to start from, which is there and of a kind that Composer loads."""
    if config.load_path is None:
        return None
    path = config.load_path.format(rank=dist.get_global_rank(), run_name=config.run_name)
    if not urlparse(path).scheme and not Path(path).exists():
        raise CheckpointError(f"load_path: {path} is missing. Name a checkpoint, or remove the key.")
    if Path(path).is_file() and config.fsdp_config and config.fsdp_config.state_dict_type == "sharded":
        raise CheckpointError(
            f"load_path: {path} is one file, and fsdp_config.state_dict_type: sharded loads folders. For its "
            "weights alone, name it in model.pretrained_model_name_or_path instead."
        )
    return path


def _is_finished(trainer: Trainer) -> bool:
    end = trainer.state.max_duration
    assert isinstance(end, Time)
    return trainer.state.timestamp.get(end.unit) >= end
