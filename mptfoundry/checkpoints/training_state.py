"""The whole state of a training run from a checkpoint, read without running any code in it.

A *state* is what Composer saves: `{"state": {"model": ..., "optimizers": ..., ...}, "rng": [...]}`. A file
holds it as it is; a folder of shards fills a state of the same form, each rank its own pieces.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from mptfoundry.checkpoints.sharded import (
    DAMAGE,
    Reader,
    own_cause,
    read_metadata,
    why_folder_is_not_whole,
)
from mptfoundry.checkpoints.torch_files import load_plain, load_plain_bytes
from mptfoundry.checkpoints.weights import EMBEDDING, POSITIONS, todays_name
from mptfoundry.errors import CheckpointError, first_line

Shapes = Mapping[str, tuple[int, ...]]

_WEIGHTS, _BLOCKS = "state.model.", "transformer.blocks."
# The parts that a run needs to continue.
_PARTS = ("model", "optimizers", "timestamp")
# If a state lacks one of these, it is a mistake; it may lack others, such as those of a new callback.
_NEEDED = ("state.model.", "state.optimizers.")


def read_state(file: Path, *, weights_only: bool, mapped: bool) -> dict[str, Any]:
    """Read the state in a whole checkpoint.

    Args:
        file: The checkpoint.
        weights_only: It only needs to hold the model.
        mapped: Map the tensors from the file instead of reading them; the caller has to copy them.

    Raises:
        CheckpointError: It is damaged, or not a checkpoint, or loading it would run code.
    """
    content = load_plain(file, mapped=mapped)
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        raise CheckpointError(f"{file}: not a checkpoint of a training run; it holds no state.")
    missing = [part for part in _PARTS[: 1 if weights_only else None] if part not in content["state"]]
    if missing:
        hint = (
            "" if "model" in missing else " For its weights alone set load_path and load_weights_only: true."
        )
        raise CheckpointError(f"{file}: can't be continued; it holds no {' and no '.join(missing)}.{hint}")
    return content


def set_epoch_by_time(state: dict[str, Any]) -> None:
    """Set the training data's epoch to that of the timestamp, if nothing of that epoch has been read.

    StreamingDataset counts an epoch when reading begins, Composer when the one before it ends: between the
    two, StreamingDataset's own state names the epoch that is over. The `state` of a checkpoint is changed in
    place; it may lack parts.
    """
    train, time = _place_in_data(state)
    if train and time and time["sample_in_epoch"] == 0:
        train["epoch"] = time["epoch"]


def repeated_epoch(state: dict[str, Any]) -> tuple[int, int] | None:
    """Return the epoch of the timestamp and the past epoch whose samples it reads, from 0; None if the same.

    Versions before `set_epoch_by_time` continued a run like this from the end of an epoch.
    """
    train, time = _place_in_data(state)
    if train and time and time["sample_in_epoch"] > 0 and train["epoch"] < time["epoch"]:
        return time["epoch"], train["epoch"]
    return None


def _place_in_data(state: dict[str, Any]) -> tuple[Any, Any]:
    """Return the state of the training data and Composer's timestamp; None for what is missing."""
    data, time = state.get("dataset_state") or {}, state.get("timestamp") or {}
    return data.get("train"), time.get("Timestamp")


def saved_random_states(folder: Path) -> int:
    """Count the ranks whose random states a folder of shards holds."""
    paths = (getattr(read_metadata(folder), "planner_data", None) or {}).values()
    return len({path[1] for path in paths if len(path) == 3 and path[0] == "rng"})


def stored_weights(folder: Path) -> Shapes:
    """Return names and shapes of the weights in a folder of shards."""
    entries = read_metadata(folder).state_dict_metadata.items()
    return {
        key.removeprefix(_WEIGHTS): tuple(entry.size)
        for key, entry in entries
        if key.startswith(_WEIGHTS) and isinstance(entry, TensorStorageMetadata)
    }


def compare_weights(checkpoint: Path, stored: Shapes, model: Shapes, *, strict: bool) -> str | None:
    """Describe in a line the weights that only the model or only the checkpoint has; None if there are none.

    Args:
        checkpoint: Begins every sentence.
        stored: Names and shapes in the checkpoint.
        model: Names and shapes of the model.
        strict: They have to be the same.

    Raises:
        CheckpointError: They differ and `strict` is set, a weight has another shape, or no weight matches.
    """
    new = [name for name in model if name not in stored]
    left = [name for name in stored if name not in model]
    reshaped = [name for name in model if name in stored and stored[name] != model[name]]
    if len(new) == len(model):
        raise CheckpointError(
            f"{checkpoint}: holds none of the model's {len(model)} weights, such as {new[0]}."
        )
    said = [
        f"{_some(names)} {what}" for names, what in ((new, "not in it"), (left, "not in the model")) if names
    ]
    if reshaped or (strict and said):
        there, here = _sizes(stored), _sizes(model)
        keys = [key for key in there if there[key] != here.get(key)]
        why = [f"model.{key} is {there[key]} there and {here.get(key)} here" for key in keys]
        why = (
            why or [f"{name} is {stored[name]} there and {model[name]} here" for name in reshaped[:1]] or said
        )
        advice = "Make them equal"
        if not reshaped:
            advice += (
                ", or take what both have with load_strict_model_weights: false, load_weights_only: true"
            )
        raise CheckpointError(f"{checkpoint}: does not fit this run: {'; '.join(why)}. {advice}.")
    return f"{checkpoint}: {'; '.join(said)}" if said else None


def _some(names: Sequence[str]) -> str:
    """List names of weights, shortened."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


def _sizes(shapes: Shapes) -> dict[str, Any]:
    """Return the keys of a config that follow from the shapes of its weights."""
    names = [todays_name(name.removeprefix("model.")) for name in shapes]
    by_name = dict(zip(names, shapes.values(), strict=True))
    sizes: dict[str, Any] = {"n_layers": len({n.split(".")[2] for n in names if n.startswith(_BLOCKS)})}
    for key, name, axis in (
        ("vocab_size", EMBEDDING, 0),
        ("d_model", EMBEDDING, 1),
        ("max_seq_len", POSITIONS, 0),
    ):
        if name in by_name:
            sizes[key] = by_name[name][axis]
    return sizes | {"no_bias": not any(name.endswith(".bias") for name in names)}


def fill_state(state: dict[str, Any], folder: Path, *, strict: bool = True) -> None:
    """Read a state of the form of `state` from a folder of shards, in place; all ranks together.

    Args:
        state: Its tensors are overwritten, its values replaced. What the folder lacks stays as it is.
        folder: The checkpoint.
        strict: A weight or a part of the optimizer that the folder lacks is an error.

    Raises:
        CheckpointError: It is damaged, lacks something, or loading it would run code.
    """
    metadata = read_metadata(folder)
    if reason := why_folder_is_not_whole(folder, metadata):
        raise CheckpointError(f"{folder}: {reason}.")
    try:
        dcp.load(state, storage_reader=Reader(folder, metadata), planner=_PlainPlanner(folder, strict=strict))
    except dcp.api.CheckpointException as error:
        cause = next(cause for cause, _ in error.failures.values())
        raise own_cause(error) or CheckpointError(
            f"{folder}: can't be loaded ({first_line(cause)})."
        ) from error
    except (*DAMAGE, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: can't be loaded ({first_line(error)}).") from error


class _PlainPlanner(dcp.DefaultLoadPlanner):
    """torch's planner, which accepts only tensors and plain values."""

    def __init__(self, folder: Path, *, strict: bool) -> None:
        super().__init__(allow_partial_load=True)
        self._folder = folder
        self._strict = strict

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        stored: Mapping[str, Any] = self.metadata.state_dict_metadata  # type: ignore[union-attr]
        missing = [key for key in self.state_dict if key not in stored and key.startswith(_NEEDED)]
        if missing and self._strict:
            raise CheckpointError(f"{self._folder}: {len(missing)} parts are missing, such as {missing[0]}.")
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        load_plain_bytes(value, f"{self._folder}: {read_item.storage_index.fqn}")
        value.seek(0)
        super().load_bytes(read_item, value)
