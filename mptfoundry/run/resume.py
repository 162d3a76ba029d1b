"""Resume a run as if it had never stopped: its state, its position in the data, and its random state.

Composer would load with `torch.load(weights_only=False)` and evaluate text from the checkpoint; we use our
own reader, and take no algorithms from the checkpoint. Composer also restores the random state only at the
start of an epoch, or while it skips batches that were already seen. StreamingDataset resumes by itself, so
there is nothing to skip, and dropout would differ from the first batch on. We restore it where training
actually continues: right before the first batch's forward or, if the checkpoint is at the very end of an
epoch, at that end.

Composer also counts the batches of an epoch (`train_subset_num_batches`) from where the loader begins, and
StreamingDataset counts epochs from the one that it began; both are set to match Composer's timestamp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.utils import dist, reproducibility
from composer.utils.checkpoint import glob_filter
from torch import Tensor

from mptfoundry.architecture.trainable import ADAPTER
from mptfoundry.checkpoints.training_state import (
    compare_weights,
    fill_state,
    read_state,
    repeated_epoch,
    saved_random_states,
    set_epoch_by_time,
    stored_weights,
)
from mptfoundry.errors import CheckpointError, MPTFoundryError
from mptfoundry.ranks import decided_by_rank_0, local_rank, rank, say

_WRAPPERS = re.compile(r"(_orig_mod|module)\.")
_MISFIT = (KeyError, TypeError, AttributeError, ValueError, RuntimeError, IndexError, AssertionError)
# Entries of an optimizer's group that record the run's progress, not its config.
_PROGRESS = ("params", "lr")


class Resume(Callback):
    """Load a checkpoint into the trainer before its first batch.

    Args:
        checkpoint: A file, or a folder of shards if the run saves sharded checkpoints.
        weights_only: Load only the model's weights.
        strict: The names of the weights must match the model's.
        ignore_keys: Parts of the state to skip, with wildcards.
        keep_optimizer: Use this run's hyperparameters of the optimizer, not the checkpoint's.
        subset_num_batches: Batches of an epoch, if it ends before the data does; -1: all.

    Raises:
        CheckpointError: When the trainer is built: the checkpoint is damaged or not from this run.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        weights_only: bool = False,
        strict: bool = True,
        ignore_keys: Sequence[str] | None = None,
        keep_optimizer: bool = False,
        subset_num_batches: int = -1,
    ) -> None:
        self.checkpoint = checkpoint
        self.weights_only = weights_only
        self.strict = strict
        self.ignore_keys = list(ignore_keys or ())
        self.keep_optimizer = keep_optimizer
        self.subset_num_batches = subset_num_batches
        self._random: list[dict[str, Any]] | None = None
        self._epoch_batches: Time[int] | None = None
        self._is_in_step = False

    def before_load(self, state: State, logger: Logger) -> None:
        """Load the checkpoint, after the model is wrapped and before anything else is loaded."""
        run_name, configured = state.run_name, _hyperparameters(state)
        content = self._read(state)
        decided_by_rank_0(lambda: self._compare(state, content["state"].get("model")))
        try:
            names = [name for name, _ in content["state"].get("algorithms") or ()]
            if self.weights_only:
                state.load_model_state(content["state"], logger, strict=self.strict, exclude_algorithms=names)
                return
            set_epoch_by_time(content["state"])
            _say_if_repeated(content["state"])
            state.load_state_dict(content["state"], logger, strict=self.strict, exclude_algorithms=names)
        except MPTFoundryError:
            raise
        except _MISFIT as error:
            reason = (str(error).strip() or type(error).__name__).replace("\n", " ")
            said = f"{self.checkpoint}: does not fit this run ({reason[:500]})."
            if not (self.strict or self.weights_only):
                said += " An optimizer is loaded whole: set load_weights_only: true for the weights alone."
            raise CheckpointError(said) from error
        state.run_name = run_name
        dataset: Any = getattr(state.train_dataloader, "dataset", None)
        if hasattr(dataset, "resume"):  # a dataset that takes its position from Composer's timestamp
            dataset.resume(int(state.timestamp.epoch), int(state.timestamp.sample_in_epoch))
            state.dataset_resumption["train"] = True
        self._random = content.get("rng")
        if self.keep_optimizer:
            _set_hyperparameters(state, configured)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Include the batches already done in the epoch's count, if the loader starts after them."""
        if self.subset_num_batches >= 0 and "train" in state.dataset_resumption:
            self._epoch_batches = state.dataloader_len
            state.dataloader_len = max(0, self.subset_num_batches - int(state.timestamp.batch_in_epoch))

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Make the first epoch that is read from its start match Composer's timestamp."""
        dataset: Any = getattr(state.train_dataloader, "dataset", None)
        if self._is_in_step or not hasattr(dataset, "next_epoch"):
            return
        self._is_in_step = True
        if local_rank() == 0:
            dataset.next_epoch = int(state.timestamp.epoch)  # shared by all processes of this node
        dist.barrier()

    def _compare(self, state: State, weights: Mapping[str, Any] | None) -> None:
        """Say which weights are new and which are left over, or raise if that is not allowed."""
        if weights is None:
            return
        names = [(_WRAPPERS.sub("", name), value) for name, value in state.model.named_parameters()]
        # Adapters are saved without their base.
        names = [each for each in names if ADAPTER in each[0]] or names
        stored = {name: tuple(value.shape) for name, value in weights.items() if isinstance(value, Tensor)}
        if self.checkpoint.is_dir():
            ignored = set(stored_weights(self.checkpoint)) - set(weights) if self.ignore_keys else set()
            stored = {n: s for n, s in stored_weights(self.checkpoint).items() if n not in ignored}
        model = {name: tuple(value.shape) for name, value in names}
        buffers = {_WRAPPERS.sub("", name) for name, _ in state.model.named_buffers()}
        stored = {name: shape for name, shape in stored.items() if name not in buffers}
        if said := compare_weights(self.checkpoint, stored, model, strict=self.strict):
            print(f"load_path: {said}", flush=True)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Restore before the first batch, after any random numbers that the loader drew when it opened."""
        self._restore(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Restore at the end of an epoch that had no batches left."""
        self._restore(state)

    def _restore(self, state: State) -> None:
        if self._random is not None:
            reproducibility.load_rng_state(self._random)
            self._random = None
        if self._epoch_batches is not None:
            state.dataloader_len = self._epoch_batches
            self._epoch_batches = None

    def _read(self, state: State) -> dict[str, Any]:
        if self.checkpoint.is_dir():
            return self._read_shards(state)
        only = self.weights_only
        if not state.load_monolith_rank0_only:
            mapped = state.device.name != "cpu"
            return self._filtered(read_state(self.checkpoint, weights_only=only, mapped=mapped))
        # Weights and optimizer state stay on rank 0, which distributes them when the model is sharded.
        kept: dict[str, Any] = {"model": None, "optimizers": None}
        content: list[Any] = [None]
        if rank() == 0:
            content[0] = self._filtered(read_state(self.checkpoint, weights_only=only, mapped=True))
            kept = {part: content[0]["state"].pop(part, None) for part in kept}
        dist.broadcast_object_list(content)
        content[0]["state"].update(kept)
        return content[0]  # type: ignore[no-any-return]

    def _read_shards(self, state: State) -> dict[str, Any]:
        if not state.fsdp_sharded_state_dict_enabled:
            raise CheckpointError(
                f"load_path: {self.checkpoint} is a folder of shards, and this run has whole checkpoints. "
                "Set fsdp_config.state_dict_type: sharded; for its weights alone, name it in "
                "model.pretrained_model_name_or_path."
            )
        content: dict[str, Any] = {"state": {"model": state.get_model_state_dict()}}
        if not self.weights_only:
            random = reproducibility.get_rng_state()[: saved_random_states(self.checkpoint)]
            content = {"state": state.state_dict(), "rng": random}
        content = self._filtered(content)
        fill_state(content, self.checkpoint, strict=self.strict)
        return content

    def _filtered(self, content: dict[str, Any]) -> dict[str, Any]:
        if self.ignore_keys:
            glob_filter(self.ignore_keys)(content)
            content.setdefault("state", {})
        return content


def _say_if_repeated(state: dict[str, Any]) -> None:
    """Say that an older version continued this run after an epoch's end with an earlier epoch's samples."""
    repeated = repeated_epoch(state)
    if repeated is not None:
        epoch, past = (number + 1 for number in repeated)
        say(
            f"note: epoch {epoch} reads the samples of epoch {past} again, since an older version of "
            f"mptfoundry continued this run. From epoch {epoch + 1} on each epoch reads its own."
        )


def _hyperparameters(state: State) -> list[dict[str, Any]]:
    groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
    return [{key: value for key, value in group.items() if key not in _PROGRESS} for group in groups]


def _set_hyperparameters(state: State, configured: list[dict[str, Any]]) -> None:
    """Use other hyperparameters in the optimizer; moments and the schedule's position stay."""
    groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
    for group, options in zip(groups, configured, strict=True):
        before = group.get("initial_lr")
        group.update(options)
        if before:
            group["lr"] *= group["initial_lr"] / before
    for scheduler in state.schedulers:
        scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
