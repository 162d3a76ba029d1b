"""One start of a run, from its first check to its report, with everything that guards it.

    with guarded(config, device) as run:
        trainer = ...  # built from run.start, run.guard, run.checkpointing(...) and run.metrics
        run.fit(trainer)
        run.report(trainer)

Nothing in the run's folder changes before `fit`: a start that is refused leaves no traces.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from composer import Trainer
from composer.core import Callback, Event, Time
from composer.utils import collect_env, dist

from mptfoundry.architecture.of_run import RUN_CONFIG as CONFIG
from mptfoundry.config.engine.secrets import REDACTED
from mptfoundry.config.load import refuse_redacted, to_yaml
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import CheckpointError, ConfigError, RunStopped
from mptfoundry.files import Upload, whole_or_absent, writing_into
from mptfoundry.plan.devices import Device, cpu_name, keep_freed_memory
from mptfoundry.ranks import RankWatch, decided_by_rank_0, local_rank, rank, say, world_size
from mptfoundry.run.atomic_checkpoints import BEST, AtomicCheckpoints, KeepBest
from mptfoundry.run.changes import RunNotes
from mptfoundry.run.leftovers import clean_start
from mptfoundry.run.lock import RunLock, lock_run_folder
from mptfoundry.run.metrics_file import NAME as METRICS
from mptfoundry.run.metrics_file import MetricsFile
from mptfoundry.run.report import PAGE, PICTURE, TRACKERS, facts_of, report_if_possible
from mptfoundry.run.resume import Resume
from mptfoundry.run.signals import StopSignals
from mptfoundry.run.start import (
    Start,
    remove_unfinished_files,
    resolve_start,
    run_folder,
    say_changed_inputs,
    take_small_files,
    uploader_of,
)
from mptfoundry.run.step_guard import EvaluationLeft, StepGuard
from mptfoundry.stores import AT_START, ONCE
from mptfoundry.tokenizer import save_tokenizer

# Warnings Composer raises about things we do on purpose: the last batch of an evaluation is smaller,
# `eval_subset_num_batches` is a limit that a short evaluation does not reach, PyTorch uses its own deprecated
# class, and some callbacks have no state of their own.
EXPECTED_WARNINGS = (
    "Cannot split (tensor|list) of length",
    "DataloaderNumBatchesWarning",
    "TypedStorage is deprecated",
    "FSDP2 Config/APIs are experimental",
    "(Resume|InContextTasks|KeepBest) is not in the state_dict",
)


@contextmanager
def guarded(config: TrainConfig, device: Device) -> Iterator[Run]:
    """Guard a start of the run of `config`: handle signals, let all ranks meet and watch them, lock the run's
    folder, and find where the run starts.

    Raises:
        ConfigError: A key that makes the run has changed, or the folder can't be written to.
        CheckpointError: Another process trains this run, or the newest checkpoint is damaged.
        TrainingError: A rank is silent.
    """
    yaml = to_yaml(config)
    if REDACTED in yaml:
        refuse_redacted(config)
    watch = RankWatch(config.dist_timeout)
    signals = StopSignals(speaks=rank() == 0, failure=watch.failure)
    with signals, clean_start() as starting:
        set_up_process(config, device)
        with watch, watch.explained(), lock_run_folder(run_folder(config)) as lock, ExitStack() as until_fit:
            until_fit.callback(starting.close)
            start = until_fit.enter_context(resolve_start(config))
            yield Run(config, yaml, start, lock, StepGuard(signals, watch), until_fit)


class Run:
    """A guarded start.

    Attributes:
        folder: The run's folder.
        start: What the run starts from.
        yaml: Its resolved config, as `config.yaml` holds it.
        guard: Guards each step.
        metrics: Writes `metrics.jsonl`.
        best: Judges which checkpoint is the best one, if the config asks for that.
        loggers: These two.
    """

    def __init__(
        self,
        config: TrainConfig,
        yaml: str,
        start: Start,
        lock: RunLock,
        guard: StepGuard,
        until_fit: ExitStack,
    ) -> None:
        self.folder, self.start, self.guard = lock.folder, start, guard
        self.metrics = MetricsFile(lock.folder)
        self.best = None if config.keep_best is None else _keep_best(config, lock.folder)
        self.loggers = [self.metrics, *([self.best] if self.best else [])]
        self._config, self.yaml = config, yaml
        self._lock, self._until_fit = lock, until_fit
        self._inputs: dict[str, str] = {}
        self._tokenizer: Any = None

    def compare_inputs(self, fingerprints: Mapping[str, str]) -> None:
        """Compare the streams or the tokenizer of this start, by their keys in the config, with what the run
        read before, and record them for checkpoints. ConfigError if one has changed without permission.
        """
        self._inputs |= fingerprints
        if (notes := self.start.notes) is not None:
            decided_by_rank_0(lambda: say_changed_inputs(self._config, notes, fingerprints))

    def checkpointing(self, tokenizer: Any, *, has_weights: bool, fused: bool) -> Iterator[Callback]:
        """Yield the callbacks that load the starting checkpoint and save new ones, with the tokenizer.

        A model that has its weights already loads only the run's own checkpoint. Checkpoints record whether
        the optimizer's step is the fused one.
        """
        config, start, self._tokenizer = self._config, self.start, tokenizer
        if start.checkpoint is not None and (start.is_own or not has_weights):
            yield _resume(config, start.checkpoint, is_own=start.is_own)
        if config.save_folder is not None:
            yield AtomicCheckpoints(
                self.folder,
                upload=uploader_of(config),
                upload_small=uploader_of(config, ONCE),
                describe=self._describe,
                in_background=config.save_async,
                notes=RunNotes(self.yaml, self._inputs, fused),
                filename=config.save_filename,
                latest_filename=config.latest_filename,
                save_interval=config.save_interval,
                # If the run starts from its own checkpoint, later ones were damaged and skipped on request.
                overwrite=config.save_overwrite or start.is_own,
                num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
                weights_only=config.save_weights_only,
                ignore_keys=config.save_ignore_keys or (),
                best=self.best,
            )

    def fit(self, trainer: Trainer) -> None:
        """Train to the run's end, and close the trainer. RunStopped if it was asked to stop, and saved."""
        self._begin(trainer)
        if is_finished(trainer) and not self.guard.owes_evaluation:
            done = trainer.state.timestamp.batch.value
            say(f"{self._config.run_name} is finished: {done} batches are done.")
        else:
            self._train(trainer)
        trainer.close()

    def report(self, trainer: Trainer) -> None:
        """Draw the run's report and upload it with the metrics. An error here is only printed."""
        if rank() != 0:
            return
        facts = facts_of(self._config, getattr(trainer.state.train_dataloader, "dataset", None))
        facts |= {} if self.best is None else {"best checkpoint": self.best.in_words()}
        print(report_if_possible(self.folder, facts=facts), flush=True)
        if upload := uploader_of(self._config, AT_START):
            self._upload_report(upload)

    def _upload_report(self, upload: Upload) -> None:
        try:
            for name in (METRICS, PICTURE, PAGE, BEST):
                if (self.folder / name).is_file():
                    upload(self.folder / name, name)
        except CheckpointError as error:  # training is done and saved
            print(error, flush=True)

    def _begin(self, trainer: Trainer) -> None:
        """Write the run's first files, and let other runs start: this start can't be refused any more."""
        start = self.start
        if start.checkpoint is not None and not start.is_own and is_finished(trainer):
            raise self._nothing_left(trainer.state.timestamp.batch.value)
        if not start.is_own and (upload := uploader_of(self._config, AT_START)):
            decided_by_rank_0(lambda: self._begin_in_store(upload))
        self._lock.has_begun = True
        if local_rank() == 0:
            # Rank 0 removes its own part before it writes; it does not wait for the other nodes.
            remove_unfinished_files(self.folder, is_ours=rank() == 0, but=start.checkpoint)
        decided_by_rank_0(self._write_first_files)
        self._until_fit.close()

    def _nothing_left(self, batch: int) -> ConfigError:
        return ConfigError(
            f"load_path: {self.start.checkpoint} is from batch {batch}, and max_duration is "
            f"{self._config.max_duration}: nothing is left to train. Use a longer max_duration to continue "
            "it, or load_weights_only=true to begin a run with its weights."
        )

    def _begin_in_store(self, upload: Upload) -> None:
        """Upload a new run's first files, which tests that the store can be written to."""
        with TemporaryDirectory() as temporary:
            for file in self._write_run_files(Path(temporary)):
                upload(file, str(file.relative_to(temporary)))
        if (self.folder / TRACKERS).is_file():
            upload(self.folder / TRACKERS, TRACKERS)

    def _write_first_files(self) -> None:
        """Write the files that the run's folder holds from the first batch on."""
        # `config.yaml` describes the newest checkpoint: a resumed run updates it with its next one.
        if self.start.is_fetched:
            take_small_files(self.start, self.folder)
        self.metrics.begin()
        if self.start.is_own:
            self._restore_run_files(self.start.notes)
        else:
            self._write_run_files(self.folder)

    def _restore_run_files(self, notes: RunNotes | None) -> None:
        """Write what is missing of the files that make the folder's checkpoints usable."""
        file = self.folder / CONFIG
        with writing_into(self.folder):
            if not (self.folder / "tokenizer").is_dir():
                save_tokenizer(self._tokenizer, self.folder / "tokenizer")
            if notes is not None and not _holds(file, notes.config):
                print(
                    f"{file} is not the checkpoint's config, which replaces it",
                    flush=True,
                )
                _write_config(notes.config, file)
            elif not file.is_file():
                _write_config(self.yaml, file)

    def _train(self, trainer: Trainer) -> None:
        config, guard, state = self._config, self.guard, trainer.state
        with guard.signals.answered_by_training():
            try:
                if guard.owes_evaluation or (config.eval_first and state.timestamp.batch == 0):
                    trainer.eval()
                    guard.owes_evaluation = False
                if not is_finished(trainer):
                    trainer.fit()
            except EvaluationLeft:
                _save_after_evaluation(trainer)
            if not guard.is_stopping:
                return
            trainer.close()
        raise RunStopped(self._how_it_continues(state.timestamp.batch.value))

    def _how_it_continues(self, batch: int) -> str:
        config, who = self._config, self.guard.signals.requested or "a signal to another rank"
        stopped = f"{who}: {config.run_name} stopped after batch {batch}"
        if config.save_folder is None:
            none = "Nothing is kept of it, since save_folder is null: the next start begins at batch 0."
            return f"{stopped}. {none}"
        kept = f"{stopped}; its checkpoint is in {config.save_folder.format(run_name=config.run_name)}"
        if config.resumes:
            return f"{kept}. The same command continues."
        return f"{kept}. autoresume is off: name the checkpoint in load_path to continue."

    def _describe(self) -> list[Path]:
        """Make the run's folder describe the run as it trains now, and return the files that are new."""
        if self._lock.is_lost():
            self._lock.take()
            say(f"save_folder: {self.folder} was removed during training, and is created again")
        return [] if _holds(self.folder / CONFIG, self.yaml) else self._write_run_files(self.folder)

    def _write_run_files(self, folder: Path) -> list[Path]:
        """Write the resolved config and the tokenizer, which make the folder's checkpoints usable."""
        with writing_into(folder):
            _write_config(self.yaml, folder / CONFIG)
            save_tokenizer(self._tokenizer, folder / "tokenizer")
            return [folder / CONFIG, *(folder / "tokenizer").iterdir()]


def _keep_best(config: TrainConfig, folder: Path) -> KeepBest:
    assert config.keep_best is not None
    return KeepBest(
        folder,
        config.keep_best.metric,
        config.keep_best.mode,
        link=config.best_filename,
        keep=config.save_num_checkpoints_to_keep,
        upload=uploader_of(config, ONCE),
    )


def _resume(config: TrainConfig, checkpoint: Path, *, is_own: bool) -> Resume:
    # The config's load_* keys apply only to the checkpoint that `load_path` names.
    return Resume(
        checkpoint,
        weights_only=config.load_weights_only and not is_own,
        strict=config.load_strict_model_weights,
        ignore_keys=None if is_own else config.load_ignore_keys,
        keep_optimizer=is_own,
        subset_num_batches=config.train_subset_num_batches,
    )


def _save_after_evaluation(trainer: Trainer) -> None:
    """Stop training and save; the evaluation runs before Composer's own point for saving."""
    trainer.state.set_dataloader(trainer.state.train_dataloader, "train")
    trainer.state.stop_training()
    trainer.engine.run_event(Event.BATCH_CHECKPOINT)


def is_finished(trainer: Trainer) -> bool:
    """Whether the run has reached its `max_duration`."""
    end = trainer.state.max_duration
    assert isinstance(end, Time)
    return trainer.state.timestamp.get(end.unit) >= end


def set_up_process(config: TrainConfig, device: Device) -> None:
    """Apply the settings that must come before the first tensor, and let all ranks meet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message="|".join(EXPECTED_WARNINGS))
    collect_env.get_cpu_model = cpu_name  # Composer's own sleeps for a second to measure the clock
    if device.kind == "gpu":
        _set_up_gpu(config)
    else:
        keep_freed_memory()
    if world_size() > 1:
        dist.initialize_dist(device.kind, timeout=config.dist_timeout)


def _set_up_gpu(config: TrainConfig) -> None:
    allocator = [f"expandable_segments:{config.expandable_segments}"]
    if config.max_split_size_mb is not None:
        allocator.append(f"max_split_size_mb:{config.max_split_size_mb}")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", ",".join(allocator))
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY" if config.cuda_load_lazy else "EAGER")


def _write_config(text: str, file: Path) -> None:
    """Write a run's `config.yaml` atomically."""
    with whole_or_absent(file, overwrite=True) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()
