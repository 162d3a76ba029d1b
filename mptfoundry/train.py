"""A training run: `train(config)` builds what the config describes, and Composer's Trainer runs it.

A run has one local folder: the resolved config, the tokenizer, `metrics.jsonl`, the report and, where they
are saved, the checkpoints. Started again with the same command, it continues from its newest checkpoint.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from composer import Trainer
from composer.core import Callback, Event, Time
from composer.loggers import LoggerDestination
from composer.utils import dist

from mptfoundry import build, loaders
from mptfoundry.architecture.of_run import RUN_CONFIG as CONFIG
from mptfoundry.callbacks.console import ConsoleLine
from mptfoundry.callbacks.throughput import Throughput
from mptfoundry.checkpoints.adapters import FINGERPRINT, check_base
from mptfoundry.checkpoints.source import ModelSource
from mptfoundry.config.load import refuse_redacted, to_yaml
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import CheckpointError, ConfigError, RunStopped
from mptfoundry.files import whole_or_absent, writing_into
from mptfoundry.models.gloo_average import AverageGradients
from mptfoundry.plan.devices import Device, detect_device
from mptfoundry.plan.plan import summary_table
from mptfoundry.plan.resolve import Resolved, refuse_lacking, resolve_auto
from mptfoundry.ranks import RankWatch, decided_by_rank_0
from mptfoundry.run.atomic_checkpoints import WholeCheckpoints
from mptfoundry.run.changes import RunNotes
from mptfoundry.run.leftovers import clean_start, mark_logs
from mptfoundry.run.metrics_file import NAME as METRICS
from mptfoundry.run.metrics_file import MetricsFile
from mptfoundry.run.report import PAGE, PICTURE, facts_of, report_if_possible
from mptfoundry.run.resume import Resume
from mptfoundry.run.resuming import (
    HeldFolder,
    Start,
    found_start,
    run_folder,
    say_changed_inputs,
    uploader_of,
)
from mptfoundry.run.signals import StopSignals
from mptfoundry.run.step_guard import EvaluationLeft, StepGuard
from mptfoundry.stores import AT_START, ONCE
from mptfoundry.tokenizer import fingerprint

# Said by Composer of what is meant so: the last batch of an evaluation is smaller than the others, and
# `eval_subset_num_batches` is a limit that a short evaluation does not reach. Then PyTorch's own use, and the
# callback that loads the state, which has none of its own.
EXPECTED_WARNINGS = (
    "Cannot split (tensor|list) of length",
    "DataloaderNumBatchesWarning",
    "TypedStorage is deprecated",
    "Resume is not in the state_dict",
)


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
    refuse_lacking(resolved)
    watch = RankWatch(config.dist_timeout)
    is_first_here = dist.get_local_rank() == 0
    if not is_first_here:
        mark_logs()
    with (
        StopSignals(speaks=dist.get_global_rank() == 0, failure=watch.failure) as signals,
        clean_start() if is_first_here else ExitStack() as starting,
    ):
        set_up_process(config, device)
        with watch, watch.explained(), HeldFolder(run_folder(config)) as held:
            guard = StepGuard(signals, watch)
            with found_start(config) as start:
                # Until all of it stands, nothing in the run's folder changes.
                trainer = build_trainer(config, resolved, device, start, guard, held)
                refuse_a_finished_one(trainer, config, start)
                decided_by_rank_0(lambda: upload_first_files(trainer, config, start))
                held.begin(start)
                decided_by_rank_0(lambda: write_first_files(trainer, config, start))
            starting.close()
            if _is_finished(trainer) and not guard.owes_evaluation:
                say(f"{config.run_name} is finished: {trainer.state.timestamp.batch.value} batches are done.")
            else:
                fit(trainer, config, guard)
            trainer.close()
            if dist.get_global_rank() == 0:
                report(trainer, config)
    return trainer


def fit(trainer: Trainer, config: TrainConfig, guard: StepGuard) -> None:
    """Trains to the run's end. Raises RunStopped where it was asked to stop before; all is saved then."""
    state = trainer.state
    with guard.signals.answered_by_training():
        try:
            if guard.owes_evaluation or (config.eval_first and state.timestamp.batch == 0):
                trainer.eval()
                guard.owes_evaluation = False
            if not _is_finished(trainer):
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


def refuse_a_finished_one(trainer: Trainer, config: TrainConfig, start: Start) -> None:
    """Raise ConfigError where nothing is left to train of the checkpoint that `load_path` names."""
    if start.is_own or start.checkpoint is None or not _is_finished(trainer):
        return
    raise ConfigError(
        f"load_path: {start.checkpoint} is from batch {trainer.state.timestamp.batch.value}, and "
        f"max_duration is {config.max_duration}: nothing is left to train. Use a longer max_duration to "
        "continue it, or load_weights_only=true to begin a run with its weights."
    )


def report(trainer: Trainer, config: TrainConfig) -> None:
    """Draw the run's report and upload it with the metrics; what goes wrong with that is only said."""
    folder = run_folder(config)
    facts = facts_of(config, getattr(trainer.state.train_dataloader, "dataset", None))
    print(report_if_possible(folder, facts=facts), flush=True)
    try:
        upload(config, [file for name in (METRICS, PICTURE, PAGE) if (file := folder / name).is_file()])
    except CheckpointError as error:  # the training is done, and saved
        print(error, flush=True)


def _how_it_goes_on(trainer: Trainer, config: TrainConfig, guard: StepGuard) -> str:
    who, batch = guard.signals.requested or "a signal to another rank", trainer.state.timestamp.batch.value
    stopped = f"{who}: {config.run_name} stopped after batch {batch}"
    if config.save_folder is None:
        return f"{stopped}. Nothing is kept of it, since save_folder is null: the next start begins anew."
    kept = f"{stopped}; its checkpoint is in {config.save_folder.format(run_name=config.run_name)}"
    if config.resumes:
        return f"{kept}. The same command goes on."
    return f"{kept}. autoresume is off: name the checkpoint in load_path to go on."


def build_trainer(
    config: TrainConfig,
    resolved: Resolved,
    device: Device,
    start: Start,
    guard: StepGuard,
    held: HeldFolder,
) -> Trainer:
    """Composer's Trainer, with all that the config describes, standing where the run starts."""
    folder = held.path
    if start.is_own:
        say(f"resuming from {start.checkpoint}")
    say(summary_table(config, device))
    source = starting_model(config, start)
    if source is not None:
        what = "; the optimizer starts new" if config.model.peft_config is None else ", beside the adapters"
        say(f"weights: from {source.path}{what}")
    build.run_code_paths(config)
    tokenizer = build.build_tokenizer(config)
    train_loader, evaluators, notes = build_data(config, resolved, device, start, tokenizer)
    model = build.build_model(config, resolved, tokenizer, source)
    describe = partial(describe_run, config, held, tokenizer)
    throughput = Throughput(
        config.model.network(),
        peak_flops=device.peak_flops,
        extra_flops_per_token=config.learned.extra_flops_per_token,
    )
    given = build.build_callbacks(config, tokenizer, folder)
    own = [guard, throughput, AverageGradients()]
    trainer = Trainer(
        model=model,
        train_dataloader=train_loader,
        eval_dataloader=evaluators,
        optimizers=build.build_optimizer(config, model),
        schedulers=build.build_scheduler(config),
        algorithms=build.build_algorithms(config),
        callbacks=[*own, *given, *_checkpointing(config, folder, start, source, describe, notes)],
        loggers=[*build.build_loggers(config, folder), *_own_loggers(config, folder)],
        parallelism_config=build.build_parallelism(config, device),
        **_plain_arguments(config, resolved, device),
    )
    if source is not None and config.model.peft_config is not None:
        buffers = trainer.state.model.named_buffers()
        check_base(source, next(value for name, value in buffers if name.endswith(FINGERPRINT)))
    build.prefetch_weights(config, model)
    if config.log_config:
        trainer.logger.log_hyperparameters({"config": to_yaml(config)})
    return trainer


def build_data(
    config: TrainConfig, resolved: Resolved, device: Device, start: Start, tokenizer: Any
) -> tuple[Any, Any, RunNotes]:
    """What the run trains and is evaluated on, and what its checkpoints note of it.

    Raises:
        ConfigError: The tokenizer or a stream is not what the run has read before.
    """
    inputs = {"tokenizer": fingerprint(tokenizer, with_special_tokens=True)}
    decided_by_rank_0(lambda: say_changed_inputs(config, start, inputs))
    train_loader = loaders.build_train_loader(config, resolved, device, tokenizer)
    evaluators = loaders.build_evaluators(
        config.eval_loaders,
        config,
        model=config.model,
        tokenizer=tokenizer,
        max_seq_len=config.max_seq_len,
        device_batch_size=resolved.device_eval_batch_size,
        num_workers=resolved.num_workers,
    )
    data = loaders.fingerprints_of(train_loader, evaluators)
    decided_by_rank_0(lambda: say_changed_inputs(config, start, data))
    return train_loader, evaluators, RunNotes(to_yaml(config), inputs | data)


def starting_model(config: TrainConfig, start: Start) -> ModelSource | None:
    """The model whose weights the run takes; None where they are new, or come with a checkpoint."""
    has_adapters = config.model.peft_config is not None
    if start.is_own and not has_adapters:
        return None
    if config.model.takes_weights:
        return build.open_pretrained(config.model)
    if start.is_own and config.load_path:
        return build.open_base(config, Path(config.load_path.format(rank=0, run_name=config.run_name)))
    return build.open_base(config, start.checkpoint) if start.checkpoint else None


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


def write_first_files(trainer: Trainer, config: TrainConfig, start: Start) -> None:
    """What the run's folder holds from the first batch on.

    `config.yaml` tells of the newest checkpoint: where a run continues, the new one comes with the next.
    """
    for logger in trainer.logger.destinations:
        if isinstance(logger, MetricsFile):
            logger.begin()
    folder = run_folder(config)
    if not start.is_own:
        write_run_files(config, folder, _tokenizer(trainer))
        return
    with writing_into(folder):
        if not (folder / "tokenizer").is_dir():
            _tokenizer(trainer).save_pretrained(folder / "tokenizer")
        file = folder / CONFIG
        if start.notes is not None and not _holds(file, start.notes.config):
            print(f"{file} is not the checkpoint's; it is written again as the checkpoint has it", flush=True)
            write_config(start.notes.config, folder)
        elif not file.is_file():
            write_config(to_yaml(config), folder)


def upload_first_files(trainer: Trainer, config: TrainConfig, start: Start) -> None:
    """What a new run keeps in its store, which shows that it can be written to.

    Raises:
        CheckpointError: It can't.
    """
    if not start.is_own and (uploads := uploader_of(config, AT_START)) is not None:
        with TemporaryDirectory() as temporary:
            for file in write_run_files(config, Path(temporary), _tokenizer(trainer)):
                uploads(file, str(file.relative_to(temporary)))


def describe_run(config: TrainConfig, held: HeldFolder, tokenizer: Any) -> list[Path]:
    """Have the run's folder tell of the run as it trains now, before a checkpoint is written.

    Returns:
        The files that are new.
    """
    if held.is_there_again():
        print(f"save_folder: {held.path} was removed while the run trains; it is made again", flush=True)
    if _holds(held.path / CONFIG, to_yaml(config)):
        return []
    return write_run_files(config, held.path, tokenizer)


def write_run_files(config: TrainConfig, folder: Path, tokenizer: Any) -> list[Path]:
    """The resolved config and the tokenizer, which make the folder's checkpoints usable by themselves."""
    with writing_into(folder):
        write_config(to_yaml(config), folder)
        tokenizer.save_pretrained(folder / "tokenizer")
        return [folder / CONFIG, *(folder / "tokenizer").iterdir()]


def write_config(text: str, folder: Path) -> None:
    """A run's `config.yaml`, whole or absent."""
    with whole_or_absent(folder / CONFIG, overwrite=True) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()


def _tokenizer(trainer: Trainer) -> Any:
    model: Any = trainer.state.model
    return (model.module if trainer.state.is_model_ddp else model).tokenizer


def upload(config: TrainConfig, files: Iterable[Path]) -> None:
    """Keeps files of the run's folder in the store, too, where `save_folder` is one."""
    if (uploads := uploader_of(config, AT_START)) is not None:
        for file in files:
            uploads(file, str(file.relative_to(run_folder(config))))


def _own_loggers(config: TrainConfig, folder: Path) -> list[LoggerDestination]:
    """Always on: the run's own record, and a line for people."""
    own: list[LoggerDestination] = [MetricsFile(folder)]
    if config.log_to_console:
        own.append(ConsoleLine(config.console_log_interval))
    return own


def _checkpointing(
    config: TrainConfig,
    folder: Path,
    start: Start,
    source: ModelSource | None,
    describe: Callable[[], list[Path]],
    notes: RunNotes,
) -> Iterator[Callback]:
    """What loads the checkpoint that the run starts from, and what saves those to come."""
    if start.checkpoint is not None and (start.is_own or source is None):
        # What the config says of loading is meant for the checkpoint that it names.
        yield Resume(
            start.checkpoint,
            weights_only=config.load_weights_only and not start.is_own,
            strict=config.load_strict_model_weights,
            ignore_keys=None if start.is_own else config.load_ignore_keys,
            keep_optimizer=start.is_own,
            subset_num_batches=config.train_subset_num_batches,
        )
    if config.save_folder is not None:
        yield WholeCheckpoints(
            folder,
            upload=uploader_of(config),
            upload_small=uploader_of(config, ONCE),
            describe=describe,
            in_background=config.save_async,
            notes=notes,
            filename=config.save_filename,
            latest_filename=config.latest_filename,
            save_interval=config.save_interval,
            # What lies further on than a start of the run's own was damaged, and passed over on request.
            overwrite=config.save_overwrite or start.is_own,
            num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
            weights_only=config.save_weights_only,
            ignore_keys=config.save_ignore_keys and list(config.save_ignore_keys),
        )


def _plain_arguments(config: TrainConfig, resolved: Resolved, device: Device) -> dict[str, Any]:
    """The Trainer's arguments that the config gives as they are."""
    return {
        "device": device.kind,
        "run_name": config.run_name,
        "seed": config.seed,
        "max_duration": config.max_duration,
        "train_subset_num_batches": config.train_subset_num_batches,
        "spin_dataloaders": config.spin_dataloaders,
        # Composer warns of any other one without loaders, and so does `check` in words of its own.
        "eval_interval": config.eval_interval if config.eval_loaders else 1,
        "eval_subset_num_batches": config.eval_subset_num_batches,
        "progress_bar": config.progress_bar,
        "log_to_console": False,
        "precision": resolved.precision,
        "device_train_microbatch_size": resolved.device_train_microbatch_size,
        "accumulate_train_batch_on_tokens": config.accumulate_train_batch_on_tokens,
        "dist_timeout": config.dist_timeout,
        "python_log_level": config.python_log_level,
    }


def _is_finished(trainer: Trainer) -> bool:
    end = trainer.state.max_duration
    assert isinstance(end, Time)
    return trainer.state.timestamp.get(end.unit) >= end
