"""Atomic checkpoints: complete or absent, and written while training continues.

A save copies the state into host memory, while training waits; then a thread writes it to disk while training
continues. Files get a temporary name, are flushed to disk and then renamed, so a checkpoint that exists is
complete. Older ones are deleted after that, never before. `latest-...` is replaced in one step; it is for
people, and no code here reads it.

Words: the *content* is the state of a run as Composer provides it; a *whole* checkpoint is one file that rank
0 writes; a *sharded* one is a folder with a file from each rank.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger, LoggerDestination
from composer.utils import create_interval_scheduler, dist, format_name_with_dist_and_time, reproducibility
from composer.utils.checkpoint import glob_filter
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from mptfoundry.architecture.trainable import ADAPTER
from mptfoundry.checkpoints.checkpoint import Checkpoint, newest_first
from mptfoundry.checkpoints.checksums import CHECKSUMS, checksums_of, write_checksums
from mptfoundry.checkpoints.sharded import METADATA
from mptfoundry.checkpoints.training_state import set_epoch_by_time
from mptfoundry.config.rules import not_measured
from mptfoundry.errors import CheckpointError, ConfigError, first_line
from mptfoundry.files import Upload, point, remove, whole_or_absent
from mptfoundry.ranks import decided_by_rank_0, local_rank, rank, world_size
from mptfoundry.run.changes import RUN, RunNotes
from mptfoundry.run.metrics_file import NAME as METRICS

# Moments per parameter, by optimizer; before the first step they don't exist yet, and count as float32.
_MOMENTS = {"DecoupledLionW": 1, "DecoupledAdamW": 2}
_MARGIN_BYTES = 1 << 20
BEST = "best.json"
_SHARDED_NAME = "ep{epoch}-ba{batch}"


class KeepBest(LoggerDestination):
    """Judges checkpoints by a metric of the evaluation at their batch, and records the best one.

    The record is `best.json` in the run's folder, next to a link to the checkpoint. A checkpoint is deleted
    only after a better one exists and is recorded. Equal values leave the older one.

    Attributes:
        folder: The run's folder.
        metric: The metric's name in loggers.
        mode: `max` or `min`.
        link: The link's name.
        keep: How many of the newest checkpoints stay; -1: all.
        upload: Copies the record elsewhere.
        record: `checkpoint`, `batch`, `metric` and `value` of the best one; None before there is one.

    Raises:
        ConfigError: When the trainer is built: no evaluation of the run has the metric.
    """

    def __init__(
        self, folder: Path, metric: str, mode: str, *, link: str, keep: int, upload: Upload | None
    ) -> None:
        self.folder, self.metric, self.mode, self.link = folder, metric, mode, link
        self.keep, self.upload = keep, upload
        self.record: dict[str, Any] | None = None
        self._starts_at: int | None = None
        self._values: dict[int, float] = {}
        self._lock = threading.Lock()

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Note the metric's value after a batch."""
        if self.metric in metrics and step is not None:
            self._values[step] = float(metrics[self.metric])

    def after_load(self, state: State, logger: Logger) -> None:
        """Refuse a metric that is not measured."""
        known = [f"metrics/{label}/{name}" for label, each in state.eval_metrics.items() for name in each]
        known += [name for callback in state.callbacks for name in getattr(callback, "averages", ())]
        if self.metric not in known:
            raise ConfigError(f"keep_best.metric: {not_measured(self.metric, known)}")
        self._starts_at = int(state.timestamp.batch)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Judge a checkpoint that was saved before its evaluation, as at the end of the run."""
        if rank() != 0:
            return
        batch = int(state.timestamp.batch)
        saved = next((each for each in newest_first(self.folder) if each.batch == batch), None)
        if saved is not None:
            best = self.after_save(saved.path, batch)
            if self.keep >= 0:
                _remove_older(self.folder, batch, self.keep, best)

    eval_standalone_end = eval_after_all

    def consider(self, checkpoint: Path, batch: int) -> bool:
        """Record a complete checkpoint if it is the best one; returns whether it is."""
        with self._lock:
            self._read_once()
            value = self._values.get(batch, math.nan)
            before = None if self.record is None else self.record["value"]
            is_better = before is None or (value > before if self.mode == "max" else value < before)
            if math.isnan(value) or not is_better:
                return False
            self.record = {
                "checkpoint": checkpoint.name,
                "batch": batch,
                "metric": self.metric,
                "mode": self.mode,
                "value": value,
            }
            with whole_or_absent(self.folder / BEST, overwrite=True) as file:
                file.write_text(json.dumps(self.record, indent=2) + "\n")
            point(self.folder / self.link.replace("{rank}", str(rank())), checkpoint)
        try:
            if self.upload is not None and rank() == 0:
                self.upload(self.folder / BEST, BEST)
        except CheckpointError as error:  # it comes with the next record, and at the run's end
            print(f"{error} The run continues.", flush=True)
        return True

    def after_save(self, checkpoint: Path, batch: int) -> int | None:
        """Judge a complete checkpoint, and return the batch of the best one."""
        self.consider(checkpoint, batch)
        return None if self.record is None else int(self.record["batch"])

    def in_words(self) -> str:
        """The best checkpoint and its value, for the report."""
        self._read_once()
        if self.record is None:
            return "none: no checkpoint was saved at the batch of an evaluation"
        return f"{self.record['checkpoint']}: {self.metric} {self.record['value']:.6g}"

    def _read_once(self) -> None:
        """Take over the record of earlier starts, once: a start may fetch it from a store before it trains.

        It counts for nothing if it is damaged, of another metric, of a checkpoint that is gone, or of a later
        batch than the one where this start begins.
        """
        if self._starts_at is None:
            return
        batch, self._starts_at = self._starts_at, None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((self.folder / BEST).read_text(encoding="utf-8"))
            float(record["value"])
            is_same = (record["metric"], record["mode"]) == (self.metric, self.mode)
            is_there = self.upload is not None or (self.folder / record["checkpoint"]).exists()
            self.record = dict(record) if is_same and is_there and record["batch"] <= batch else None


def _remove_older(folder: Path, batch: int, keep: int, best: int | None) -> None:
    """Delete all but the newest checkpoints, among those up to a batch; the best one stays."""
    older = [each for each in newest_first(folder) if 0 <= each.batch <= batch]
    for checkpoint in (each for each in older[keep:] if each.batch != best):
        remove(checkpoint.path)


@dataclass(eq=False)
class AtomicCheckpoints(Callback):
    """Saves a checkpoint at an interval and at the end of training.

    Attributes:
        folder: A local folder.
        save_interval: How often, such as `1000ba` or `1ep`.
        filename: The name of a whole checkpoint; `{epoch}`, `{batch}` and the like are filled in.
        latest_filename: The name of the link to the newest checkpoint; None: no link.
        overwrite: Replace checkpoints that are further than this start; otherwise the run is refused.
        num_checkpoints_to_keep: How many of the newest stay; -1: all.
        weights_only: Save the model without the rest of the training state.
        ignore_keys: Parts of the state to leave out, with wildcards.
        upload: Also copies the files of a checkpoint elsewhere; `.metadata`, which completes a sharded
            checkpoint, comes last.
        upload_small: The same for small files next to checkpoints; one that fails is retried with the next
            checkpoint.
        describe: Called on rank 0 before each checkpoint is written, so that the files next to it match it;
            returns the files that are new.
        in_background: Write while training continues; otherwise training waits.
        notes: What each checkpoint records about its run.
        best: Judges which checkpoint is the best one, which stays, too.
        save_seconds: Seconds from the start of the last save until its checkpoint existed.

    Raises:
        CheckpointError: When the trainer is built or at a save: the checkpoint would not fit on the disk. At
            the batch after a save: the write failed. Earlier checkpoints are unchanged.
    """

    folder: Path
    save_interval: str | int
    filename: str = "ep{epoch}-ba{batch}-rank{rank}.pt"
    latest_filename: str | None = "latest-rank{rank}.pt"
    overwrite: bool = False
    num_checkpoints_to_keep: int = -1
    weights_only: bool = False
    ignore_keys: Sequence[str] = ()
    upload: Upload | None = None
    upload_small: Upload | None = None
    describe: Callable[[], Sequence[Path]] = lambda: ()
    in_background: bool = True
    notes: RunNotes | None = None
    best: KeepBest | None = None
    save_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._is_due = create_interval_scheduler(self.save_interval)
        self._saved_batch = -1
        self._owed: set[Path] = set()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        # Ranks that write together use their own group, separate from training's collectives.
        self.group: Any = None

    def after_load(self, state: State, logger: Logger) -> None:
        """Check that the folder is free and has room for the first checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if state.max_duration is not None and state.timestamp >= state.max_duration:
            return
        decided_by_rank_0(lambda: self._refuse_what_is_there(state))
        moments = 0 if self.weights_only else sum(_MOMENTS.get(type(o).__name__, 0) for o in state.optimizers)
        parameters = dict(state.model.named_parameters())
        trainable = [each for each in parameters.values() if each.requires_grad]
        # Adapters are saved without their base.
        kept = trainable if any(ADAPTER in name for name in parameters) else list(parameters.values())
        self._refuse_what_does_not_fit(kept + moments * trainable, state)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Record where the run starts."""
        self._saved_batch = int(state.timestamp.batch) or -1
        if world_size() > 1 and state.fsdp_sharded_state_dict_enabled:
            self.group = torch.distributed.new_group(backend="gloo")

    def batch_end(self, state: State, logger: Logger) -> None:
        """End the run if the last checkpoint could not be written."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if an interval in batches, samples or tokens is over."""
        self._save_if_due(Event.BATCH_CHECKPOINT, state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if an interval in epochs is over."""
        self._save_if_due(Event.EPOCH_CHECKPOINT, state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Wait until the last checkpoint is complete."""
        self.wait()

    def close(self, state: State, logger: Logger) -> None:
        """Wait for the last checkpoint, also if the run ends with an error."""
        self._pool.shutdown()
        self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written. Raises CheckpointError if that failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _save_if_due(self, event: Event, state: State, logger: Logger) -> None:
        called_at = time.monotonic()
        if not self._is_due(state, event) or self._saved_batch == int(state.timestamp.batch):
            return
        self.wait()
        started_at = time.monotonic()
        self._saved_batch = int(state.timestamp.batch)
        decided_by_rank_0(lambda: self._owed.update(self.describe()))
        content = _content(state, self.ignore_keys, weights_only=self.weights_only)
        if self.notes is not None:
            content[RUN] = self.notes.to_text()
        self._refuse_what_does_not_fit(content, state)
        is_sharded = bool(state.fsdp_sharded_state_dict_enabled)
        if is_sharded or rank() == 0:
            if self.in_background:
                content = copied_to_host(content, _live(state))
            target = self.folder / _named(_SHARDED_NAME if is_sharded else self.filename, state)
            save = _Save(self, content, target, self._link(state), self._saved_batch)
            self._writing = self._pool.submit(
                self._write, save.shards if is_sharded else save.file, started_at
            )
            if not self.in_background:
                self.wait()
        logger.log_metrics({"checkpoint/held_seconds": time.monotonic() - called_at})

    def _write(self, save: Callable[[], None], started_at: float) -> None:
        uploads = self.upload_small is not None and rank() == 0
        if uploads:  # a run continued elsewhere from this checkpoint then has all rows up to it
            self._owed.add(self.folder / METRICS)
            self._upload_what_is_owed()
        save()
        self.save_seconds = time.monotonic() - started_at
        if uploads:
            self._upload_what_is_owed()

    def _upload_what_is_owed(self) -> None:
        """Upload small files. A failure is printed, and does not end the run."""
        assert self.upload_small is not None
        for file in sorted(self._owed):
            try:
                if file.is_file():
                    self.upload_small(file, str(file.relative_to(self.folder)))
                self._owed.discard(file)
            except CheckpointError as error:
                print(f"{error} The run continues; the file comes with the next checkpoint.", flush=True)

    def _link(self, state: State) -> Path | None:
        return self.folder / _named(self.latest_filename, state) if self.latest_filename else None

    def _refuse_what_is_there(self, state: State) -> None:
        link = self._link(state)
        if link is not None and link.is_dir() and not link.is_symlink():
            raise CheckpointError(
                f"save_folder: {link} is a folder, and the run makes a link there. Move it away."
            )
        checkpoints = newest_first(self.folder)
        if checkpoints and not self.overwrite:
            _refuse_to_replace(checkpoints, int(state.timestamp.batch))

    def _refuse_what_does_not_fit(self, content: Any, state: State) -> None:
        """Raise CheckpointError on all ranks if the content needs more disk space than is free."""
        needed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(content))
        if self.upload is not None and state.fsdp_sharded_state_dict_enabled:
            needed = needed * dist.get_local_world_size() // world_size()

        decided_by_rank_0(lambda: _refuse_full_disk(self.folder, needed))


def _refuse_to_replace(checkpoints: Sequence[Checkpoint], batch: int) -> None:
    for checkpoint in checkpoints:
        if checkpoint.batch > batch and checkpoint.problem() is None:
            raise CheckpointError(
                f"save_folder: {checkpoint.path} is further than this start, batch {batch}, and would be "
                "replaced. Set autoresume: true to continue from it, save_overwrite: true to replace it, or "
                "use another run_name."
            )


@dataclass
class _Save:
    """One checkpoint on its way to disk and to a store; then `link` points to it, and older ones go."""

    saver: AtomicCheckpoints
    content: dict[str, Any]
    target: Path
    link: Path | None
    batch: int

    def file(self) -> None:
        """Write a whole checkpoint, on rank 0 only."""
        with (
            self._errors(),
            whole_or_absent(self.target, overwrite=True) as temporary,
            temporary.open("wb") as file,
        ):
            torch.save(self.content, file)
        self.content = {}
        if self.saver.upload is not None:
            self.saver.upload(self.target, self.target.name)
        self.tidy()

    def shards(self) -> None:
        """Write a sharded checkpoint: each rank writes its own file, and the first one renames the folder."""
        with self._errors():
            if rank() == 0:
                with whole_or_absent(self.target, overwrite=True) as folder:
                    own = self._own_shards(self._gathered(folder)[0])
            else:
                folder = self._gathered(None)[0]
                own = self._own_shards(folder)
            self._gathered(None)
        self.content = {}
        # On a disk local to this node, the folder still has its temporary name.
        is_first = rank() == 0
        if local_rank() == 0 and not is_first and folder.exists():
            remove(self.target)
            folder.rename(self.target)
            is_first = True
        self._gathered(None)
        if self.saver.upload is not None:
            self._upload([*own], last=[CHECKSUMS, METADATA])
        if is_first:
            self.tidy()

    def _own_shards(self, folder: Path) -> list[str]:
        """Write this rank's shards into a folder, and on rank 0 all checksums; return the shards' names."""
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        writer = dcp.FileSystemWriter(folder)
        alone = self.saver.group is None
        dcp.save(
            self.content,
            storage_writer=writer,
            planner=planner,
            process_group=self.saver.group,
            no_dist=alone,
        )
        own = checksums_of(sorted(folder.glob(f"__{rank()}_*.distcp")))
        gathered = self._gathered(own)
        if rank() == 0:
            every = {name: each for part in gathered for name, each in part.items()}
            write_checksums(folder, {**every, **checksums_of([folder / METADATA])})
        return list(own)

    def _upload(self, own: list[str], last: list[str]) -> None:
        """Upload every rank's shards first, and then the files that complete the checkpoint."""
        assert self.saver.upload is not None
        for name in own:
            self.saver.upload(self.target / name, f"{self.target.name}/{name}")
        self._gathered(None)
        for name in last if rank() == 0 else ():
            self.saver.upload(self.target / name, f"{self.target.name}/{name}")

    def _gathered(self, own: Any) -> list[Any]:
        """Gather a value from all ranks, which wait for each other here."""
        if self.saver.group is None:
            return [own]
        gathered: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(gathered, own, group=self.saver.group)
        return gathered

    def tidy(self) -> None:
        """Point the link to the checkpoint, and delete those up to it except the newest and the best."""
        keep, best = self.saver.num_checkpoints_to_keep, None
        if self.link is not None and keep != 0:
            point(self.link, self.target)
        if self.saver.best is not None:
            best = self.saver.best.after_save(self.target, self.batch)
        if keep >= 0:
            _remove_older(self.target.parent, self.batch, keep, best)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, dcp.api.CheckpointException) as error:  # torch's zip writer and its collectives
            raise CheckpointError(f"{self.target}: can't be written ({first_line(error)}).") from error


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + _MARGIN_BYTES > free:
        raise CheckpointError(
            f"save_folder: a checkpoint takes {needed:,} bytes, and {free:,} are free on the disk of "
            f"{folder}. Those before it are as they were. Free some space, or keep fewer: "
            "save_num_checkpoints_to_keep."
        )


def _content(state: State, ignore_keys: Sequence[str], *, weights_only: bool) -> dict[str, Any]:
    """Return what Composer saves; a collective call. Tensors may be the live ones."""
    if weights_only:
        content = _weights_alone(state)
    else:
        content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        set_epoch_by_time(content["state"])
        if state.fsdp_sharded_state_dict_enabled and rank() > 0:
            content.pop("rng")
    if ignore_keys:
        glob_filter(list(ignore_keys))(content)
        content.setdefault("state", {})
    return content


def _weights_alone(state: State) -> dict[str, Any]:
    integrations, metadata = state._get_integrations_state_dict(), state._get_state_metadata()
    parts = {"model": state.get_model_state_dict(), "integrations": integrations, "metadata": metadata}
    return {"state": parts}


def _tensors(content: Any) -> list[Tensor]:
    if isinstance(content, Tensor):
        return [content]
    values = content.values() if isinstance(content, dict) else content
    is_section = isinstance(content, (dict, list, tuple))
    return [tensor for value in values for tensor in _tensors(value)] if is_section else []


def _live(state: State) -> list[Tensor]:
    """Return the tensors that training keeps changing."""
    moments = [tensor for o in state.optimizers for tensor in _tensors(list(o.state.values()))]
    return [*state.model.parameters(), *state.model.buffers(), *moments]


def copied_to_host(content: Any, live: Sequence[Tensor]) -> Any:
    """Move the content to host memory; copy what is there only if it shares memory with `live` tensors."""
    addresses = {_address(tensor) for tensor in live}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=_address(value) in addresses)
        if isinstance(value, dict):
            return type(value)((key, copied(each)) for key, each in value.items())
        if type(value) in (list, tuple):
            return type(value)(map(copied, value))
        return value

    return copied(content)


def _address(tensor: Tensor) -> int:
    local = tensor.detach()
    return (local.to_local() if isinstance(local, DTensor) else local).untyped_storage().data_ptr()


def _named(name: str, state: State) -> str:
    return format_name_with_dist_and_time(name, state.run_name, state.timestamp)
