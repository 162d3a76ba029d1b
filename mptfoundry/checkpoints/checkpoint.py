"""A run's checkpoints, in both forms, and the newest whole one in a run's folder.

Words: a run folder holds `config.yaml` and checkpoints with Composer's names. A whole checkpoint is one file,
`ep0-ba10-rank0.pt`; a sharded one is a folder, `ep0-ba10`, with `.metadata` and one `__0_0.distcp` per rank.
Links called `latest-...` point at the last one, but we treat them like any other entry: a link can dangle or
point at a file that was cut short.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mptfoundry.checkpoints.checksums import (
    Verifier,
    parts_of_archive,
    parts_of_folder,
    why_archive_is_damaged,
    why_folder_is_damaged,
)
from mptfoundry.checkpoints.sharded import (
    METADATA,
    ShardedWeights,
    read_metadata,
    read_value,
    why_folder_is_not_whole,
)
from mptfoundry.checkpoints.torch_files import (
    TorchFile,
    ends_as_written,
    load_plain,
    open_composer_file,
    why_file_is_not_whole,
)
from mptfoundry.errors import CheckpointError
from mptfoundry.places import progress_of

_KNOWN = (
    "Give a run folder, a checkpoint (ep0-ba10-rank0.pt, or a folder of .distcp files), or a Hugging Face "
    "folder."
)

log = logging.getLogger(__name__)


class Checkpoint(Protocol):
    """A checkpoint on this machine: a `FileCheckpoint` or a `ShardedCheckpoint`."""

    @property
    def path(self) -> Path:
        """The file or the folder."""

    @property
    def batch(self) -> int:
        """The batch in its name; -1 if the name has none."""

    def unfinished(self) -> str | None:
        """Say what is missing, such as its end or a file after a stopped write or copy; None if complete.

        Other damage also returns None.
        """

    def problem(self) -> str | None:
        """Say why it is unfinished, or how its structure is wrong; None if nothing. Reads no tensors."""

    def parts(self) -> list[str]:
        """List the parts that have checksums, for several ranks to share; empty if there are no checksums."""

    def damage(self, parts: Sequence[str]) -> str | None:
        """Say which of these parts differ from the bytes that were written; None if none do.

        Raises:
            CheckpointError: Loading the checkpoint would run code, or its checksums can't be read.
        """

    def weights(self, verifier: Verifier) -> TorchFile | ShardedWeights:
        """Return the model's weights; each is compared with its checksum when it is read."""

    def value(self, key: str) -> Any:
        """Return a plain value stored next to the state, such as a run's notes; None if there is none.

        Raises:
            CheckpointError: It is damaged, or reading it would run code.
        """


@dataclass(frozen=True)
class _Named:
    path: Path

    @property
    def batch(self) -> int:
        progress = progress_of(self.path)
        return progress[1] if progress else -1


class FileCheckpoint(_Named):
    """A whole checkpoint: one file written by `torch.save`."""

    def unfinished(self) -> str | None:
        return None if ends_as_written(self.path) else self.problem()

    def problem(self) -> str | None:
        return why_file_is_not_whole(self.path)

    def parts(self) -> list[str]:
        return parts_of_archive(self.path)

    def damage(self, parts: Sequence[str]) -> str | None:
        if reason := why_archive_is_damaged(self.path, parts):
            return reason
        load_plain(self.path)  # checks only the structure
        return None

    def weights(self, verifier: Verifier) -> TorchFile:
        return open_composer_file(self.path, verifier)

    def value(self, key: str) -> Any:
        content = load_plain(self.path)
        return content.get(key) if isinstance(content, dict) else None


class ShardedCheckpoint(_Named):
    """A sharded checkpoint: a folder written by `torch.distributed.checkpoint`."""

    def unfinished(self) -> str | None:
        if not (self.path / METADATA).is_file():
            return self.problem()
        try:
            metadata = read_metadata(self.path)
        except CheckpointError:
            return None
        return why_folder_is_not_whole(self.path, metadata)

    def problem(self) -> str | None:
        return why_folder_is_not_whole(self.path)

    def parts(self) -> list[str]:
        return parts_of_folder(self.path)

    def damage(self, parts: Sequence[str]) -> str | None:
        return why_folder_is_damaged(self.path, parts)

    def weights(self, verifier: Verifier) -> ShardedWeights:
        return ShardedWeights(self.path, verifier)

    def value(self, key: str) -> Any:
        return read_value(self.path, key)


def checkpoint_at(path: Path) -> Checkpoint:
    """Return the checkpoint at a path, which may be unfinished or damaged."""
    return ShardedCheckpoint(path) if path.is_dir() else FileCheckpoint(path)


def find_checkpoint(path: str | Path) -> Checkpoint:
    """Find the checkpoint that `path` names: itself, or the newest whole one in a run folder.

    The newest has the highest batch in its name; checkpoints with other names come after those, by time.
    Unfinished ones are skipped with a warning that names them. Links are followed.

    Raises:
        CheckpointError: Nothing is there, nothing there is whole, or the newest one is damaged.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: the link points at {path.readlink()}, which is not there. {_KNOWN}")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder. {_KNOWN}")
    path = path.resolve()
    if path.is_file() or (path / METADATA).is_file():
        return checkpoint_at(path)
    checkpoints = newest_first(path)
    for checkpoint in checkpoints:
        reason = checkpoint.problem()
        if reason is None:
            return checkpoint
        if checkpoint.unfinished() is None:
            raise CheckpointError(f"{checkpoint.path}: {reason}. Restore it, or name another checkpoint.")
        log.warning("%s: %s; passed over.", checkpoint.path, reason)
    if checkpoints:
        raise CheckpointError(f"{path}: none of its {len(checkpoints)} checkpoints is whole.")
    raise CheckpointError(
        f"{path}: no checkpoint in it. Looked for *.pt files and for folders with {METADATA}. {_KNOWN}"
    )


def newest_first(run_folder: Path) -> list[Checkpoint]:
    """List all entries of a run folder whose name or form is that of a checkpoint, with links followed.

    Empty if the folder does not exist.
    """
    if not run_folder.is_dir():
        return []
    entries = {entry.resolve() for entry in run_folder.iterdir() if not entry.name.startswith(".")}
    checkpoints = map(checkpoint_at, filter(_looks_like_a_checkpoint, entries))
    return sorted(checkpoints, key=_age, reverse=True)


def _looks_like_a_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return (path / METADATA).is_file() or progress_of(path) is not None
    return path.is_file() and (path.suffix == ".pt" or progress_of(path) is not None)


def _age(checkpoint: Checkpoint) -> tuple[int, float]:
    changed_at = 0.0
    with contextlib.suppress(FileNotFoundError):  # a run may delete old checkpoints at any time
        changed_at = checkpoint.path.stat().st_mtime
    return checkpoint.batch, changed_at
