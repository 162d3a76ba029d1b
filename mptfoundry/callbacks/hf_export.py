"""Export the model as Hugging Face folders during training.

At an interval the weights are copied to rank 0's host memory, one by one. A thread there writes the folder,
loads it back and compares it, while training continues.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist, format_name_with_dist_and_time
from torch.distributed.tensor import DTensor

from mptfoundry.checkpoints.checkpoint import newest_first
from mptfoundry.errors import ConfigError
from mptfoundry.files import remove_unfinished
from mptfoundry.places import is_url
from mptfoundry.ranks import decided_by_rank_0, rank
from mptfoundry.run.metrics_file import NAME as METRICS
from mptfoundry.run.report import report_if_possible
from mptfoundry.stores import uploader

# Writes weights, by name, to a folder, as an export of the checkpoint of that name would.
Write = Callable[[dict[str, torch.Tensor], str, Path], Any]

_FOLDER = "huggingface"
_MARK = re.compile(r"\.(?P<name>.+)\.(?P<checkpoint>ep\d+-ba(?P<batch>\d+))\.export")
_WRAPPERS = re.compile(r"(_orig_mod|module)\.")

log = logging.getLogger(__name__)


class HFExport(Callback):
    """Exports the model at an interval and at the end, into `save_folder/huggingface/ba{batch}`.

    Training waits only for the copy to host memory. If an export is due while the previous one is still being
    written, it is skipped with a warning; training waits for the last one. An error in the background ends
    the run at the next batch.

    A pending export has a marker file in the run's folder until it is complete. If a run is killed, the next
    start makes the export if it continues from the same batch; otherwise it reports it as lost.

    Args:
        write: Called on rank 0 in its own thread.
        run_folder: The run's folder; its report is updated after each export.
        names: The names of the weights in an export.
        save_folder: Folder, or URL of an object store; `{run_name}` is filled in.
        save_interval: How often, such as `1000ba` or `1ep`.
        huggingface_folder_name: Name of an export's folder; `{epoch}` and `{batch}` are filled in.
        precision: The dtype of the weights.
        overwrite: Replace an existing folder, such as one from a run that was resumed earlier.
        num_checkpoints_to_keep: Number of exports to keep; -1: all.
    """

    # See run.step_guard: an export would take time that the last checkpoint needs.
    skipped_when_stopping = True

    def __init__(
        self,
        write: Write,
        run_folder: Path,
        names: frozenset[str],
        *,
        save_folder: str,
        save_interval: str | int,
        huggingface_folder_name: str = "ba{batch}",
        precision: str = "float32",
        overwrite: bool = True,
        num_checkpoints_to_keep: int = -1,
    ) -> None:
        if "{batch}" not in huggingface_folder_name or "/" in huggingface_folder_name:
            raise ConfigError(
                f"callbacks.hf_checkpointer.huggingface_folder_name: {huggingface_folder_name} has to be one "
                "name with {batch} in it, so that each export gets its own."
            )
        if num_checkpoints_to_keep < 1 and num_checkpoints_to_keep != -1:
            raise ConfigError(
                f"callbacks.hf_checkpointer.num_checkpoints_to_keep: {num_checkpoints_to_keep} keeps "
                "nothing. Use 1 or more, or -1 for all."
            )
        if is_url(save_folder) and num_checkpoints_to_keep != -1:
            raise ConfigError(
                "callbacks.hf_checkpointer.num_checkpoints_to_keep: nothing is deleted from an object store. "
                "Remove it, or name a local save_folder."
            )
        self.write = write
        self.run_folder = run_folder
        self.names = names
        self.save_folder = save_folder
        self.folder_name = huggingface_folder_name
        self.dtype = getattr(torch, precision)
        self.overwrite = overwrite
        self.keep = num_checkpoints_to_keep
        self._is_due = create_interval_scheduler(save_interval)
        self._exported_at = -1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hf_export")
        self._running: Future[None] | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Raise ConfigError before training if the model's weights are not an MPT's."""
        names = {_WRAPPERS.sub("", name) for name, _ in _network(state).named_parameters()}
        if unknown := sorted(names ^ self.names):
            raise ConfigError(
                f"callbacks.hf_checkpointer: the model's weights are not an MPT's, such as {unknown[0]}; "
                "adapters are one reason. Remove the callback, and export when the training is over."
            )

    def after_load(self, state: State, logger: Logger) -> None:
        """Finish the exports of a killed run, or report them as lost; remove their markers."""
        batch, folder = int(state.timestamp.batch), self._folder(state)
        for name, checkpoint, due in decided_by_rank_0(lambda: self._interrupted(folder)) or []:
            if due == batch:
                if rank() == 0:
                    _say(f"the export {name} was interrupted, and is made now")
                self._export(state, name, checkpoint, folder)
                self.wait()
            elif rank() == 0:
                if due < batch:
                    _say(self._lost(name, checkpoint, due, folder))
                self._mark(name, checkpoint).unlink(missing_ok=True)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Raise an error of the background thread."""
        if self._running is not None and self._running.done():
            self.wait()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Export if an interval in batches, samples or tokens is over."""
        self._export_if_due(Event.BATCH_CHECKPOINT, state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Export if an interval in epochs is over."""
        self._export_if_due(Event.EPOCH_CHECKPOINT, state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Wait for the last export."""
        self.wait()

    def close(self, state: State, logger: Logger) -> None:
        """Let a running export finish, also if the run failed."""
        self._thread.shutdown(wait=True)

    def _export_if_due(self, event: Event, state: State) -> None:
        batch = int(state.timestamp.batch)
        if not self._is_due(state, event) or batch == self._exported_at:
            return
        elapsed = state.get_elapsed_duration()
        if elapsed is not None and elapsed >= 1.0:
            self.wait()
        elif _any_rank(self._running is not None, state):
            if rank() == 0:
                log.warning(
                    "callbacks.hf_checkpointer: the last export is still being written, so that of batch %d "
                    "is left out. A longer save_interval would give it time.",
                    batch,
                )
            return
        self._exported_at = batch
        name = format_name_with_dist_and_time(self.folder_name, state.run_name, state.timestamp)
        self._export(state, name, f"ep{state.timestamp.epoch.value}-ba{batch}", self._folder(state))

    def _folder(self, state: State) -> str:
        """The current folder for exports."""
        folder = format_name_with_dist_and_time(self.save_folder, state.run_name, state.timestamp)
        return f"{folder.rstrip('/')}/{_FOLDER}"

    def _export(self, state: State, name: str, checkpoint: str, folder: str) -> None:
        """Copy the weights, a collective operation, and start to write them."""
        if rank() == 0:
            self._mark(name, checkpoint).touch()
        weights = dict(gather_weights(_network(state), self.dtype))
        if rank() == 0:
            self._running = self._thread.submit(self._in_background, weights, checkpoint, folder, name)

    def _mark(self, name: str, checkpoint: str) -> Path:
        return self.run_folder / f".{name}.{checkpoint}.export"

    def _interrupted(self, folder: str) -> list[tuple[str, str, int]]:
        """The exports that were due but are missing: their names, checkpoints and batches."""
        marks = (_MARK.fullmatch(entry.name) for entry in sorted(self.run_folder.iterdir()))
        due = [(mark["name"], mark["checkpoint"], int(mark["batch"])) for mark in marks if mark]
        if not is_url(folder) and Path(folder).is_dir():
            is_ours = self.run_folder.resolve() in Path(folder).resolve().parents
            for entry in remove_unfinished(Path(folder), is_ours=is_ours):
                _say(f"removed {entry}, which a run that was killed had not finished")
            for name, checkpoint, _ in list(due):
                if (Path(folder) / name / "config.json").is_file():
                    self._mark(name, checkpoint).unlink()
            due = [each for each in due if self._mark(*each[:2]).exists()]
        return due

    def _lost(self, name: str, checkpoint: str, batch: int, folder: str) -> str:
        """The message about an export whose batch has passed."""
        kept = [each.path for each in newest_first(self.run_folder) if each.batch == batch]
        if not kept:
            return f"the export {name} was interrupted, and {checkpoint} is not kept: it can't be made"
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        return (
            f"the export {name} was interrupted. It is made by: mptfoundry export {kept[0]} "
            f"{name if is_url(folder) else f'{folder}/{name}'} dtype={dtype}"
        )

    def _in_background(
        self, weights: dict[str, torch.Tensor], checkpoint: str, folder: str, name: str
    ) -> None:
        if (self.run_folder / METRICS).is_file():
            report_if_possible(self.run_folder)
        if is_url(folder):
            with tempfile.TemporaryDirectory() as temporary:
                self.write(weights, checkpoint, Path(temporary) / name)
                upload = uploader(folder)
                for file in sorted((Path(temporary) / name).iterdir()):
                    upload(file, f"{name}/{file.name}")
            self._mark(name, checkpoint).unlink(missing_ok=True)
            return
        self.write(weights, checkpoint, Path(folder) / name)
        self._mark(name, checkpoint).unlink(missing_ok=True)
        if self.keep != -1:
            for old in exports_in(Path(folder), self.folder_name)[self.keep :]:
                shutil.rmtree(old)

    def wait(self) -> None:
        """Wait for the export that is being written, and raise its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def gather_weights(network: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies of a network's full weights, one by one, in rank 0's host memory; none on other ranks.

    Every rank must call it, because sharded weights are gathered collectively.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if rank() == 0:
                yield _WRAPPERS.sub("", name), whole.detach().to(dtype).to("cpu", copy=True)


def exports_in(folder: Path, name: str) -> list[Path]:
    """The exports in a folder whose names match `huggingface_folder_name`, newest first."""
    pattern = re.sub(r"\\\{(\w+)\\\}", lambda m: r"(\d+)" if m[1] == "batch" else ".+", re.escape(name))
    exports = [(match, path) for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))]
    exports = [(match, path) for match, path in exports if (path / "config.json").is_file()]
    return [path for _, path in sorted(exports, key=lambda pair: int(pair[0][1]), reverse=True)]


def _say(text: str) -> None:
    print(f"callbacks.hf_checkpointer: {text}", flush=True)


def _network(state: State) -> torch.nn.Module:
    model: Any = state.model.module if state.is_model_ddp else state.model
    return model.model


def _any_rank(value: bool, state: State) -> bool:
    flag = state.device.tensor_to_device(torch.tensor(int(value)))
    dist.all_reduce(flag, reduce_operation="MAX")
    return bool(flag.item())
