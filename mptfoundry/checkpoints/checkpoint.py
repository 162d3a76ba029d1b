"""A checkpoint of a run, in either of its two forms, and the newest whole one in a run's folder.

Words: a run folder holds `config.yaml` and checkpoints by Composer's names. A whole checkpoint is one file,
`ep0-ba10-rank0.pt`; a sharded one is a folder, `ep0-ba10`, with `.metadata` and one `__0_0.distcp` per rank.
Links called `latest-...` point at the last one, but they are only looked at like any other entry: a link can
be dangling or point at a file that was cut short.
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
        """Batches that its name tells; -1 for a name that tells none."""

    def unfinished(self) -> str | None:
        """Why it lacks its end or a file, as when its writing or copying was stopped; None if it has them.

        None also for one that is damaged in another way.
        """

    def problem(self) -> str | None:
        """Why it is unfinished, or what is wrong with its outline; None if nothing. No tensor is read."""

    def parts(self) -> list[str]:
        """The parts that have checksums, for several ranks to share; none where none were written."""

    def damage(self, parts: Sequence[str]) -> str | None:
        """Which of these parts holds other bytes than were written; None if none does.

        Raises:
            CheckpointError: Loading the checkpoint would run code, or its checksums can't be read.
        """

    def weights(self, verifier: Verifier) -> TorchFile | ShardedWeights:
        """The model's weights, each compared with its checksum when it is read."""

    def value(self, key: str) -> Any:
        """A plain value that lies next to the state, such as a run's notes; None if there is none.

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
    """A whole checkpoint: one file of `torch.save`."""

    def unfinished(self) -> str | None:
        return None if ends_as_written(self.path) else self.problem()

    def problem(self) -> str | None:
        return why_file_is_not_whole(self.path)

    def parts(self) -> list[str]:
        return parts_of_archive(self.path)

    def damage(self, parts: Sequence[str]) -> str | None:
        if reason := why_archive_is_damaged(self.path, parts):
            return reason
        load_plain(self.path)  # the outline alone
        return None

    def weights(self, verifier: Verifier) -> TorchFile:
        return open_composer_file(self.path, verifier)

    def value(self, key: str) -> Any:
        content = load_plain(self.path)
        return content.get(key) if isinstance(content, dict) else None


class ShardedCheckpoint(_Named):
    """A sharded checkpoint: a folder of `torch.distributed.checkpoint`."""

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
    """The checkpoint at a path, which may be unfinished or damaged."""
    return ShardedCheckpoint(path) if path.is_dir() else FileCheckpoint(path)


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint that `path` names: itself, or the newest whole one in a run folder.

    Newest is the one with the most batches in its name; checkpoints named otherwise come after those, by
    time. Unfinished ones are passed over, with a warning that names them. Links are followed.

    Raises:
        CheckpointError: Nothing is there, or nothing that is whole, or the newest one is damaged.
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
    """All entries of a run folder that are named or shaped like checkpoints, with links followed.

    None where the folder does not exist.
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
    with contextlib.suppress(FileNotFoundError):  # a run may delete its older ones meanwhile
        changed_at = checkpoint.path.stat().st_mtime
    return checkpoint.batch, changed_at
