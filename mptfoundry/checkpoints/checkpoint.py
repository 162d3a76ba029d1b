"""Where the checkpoints of a run lie, what they are called, and which of them is the newest whole one.

Words: a run folder holds `config.yaml` and checkpoints by Composer's names. A whole checkpoint is one file,
`ep0-ba10-rank0.pt`; a sharded one is a folder, `ep0-ba10`, with `.metadata` and one `__0_0.distcp` per rank.
Links called `latest-...` point at the last one, but they are only looked at like any other entry: a link can
be dangling or point at a file that was cut short.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from mptfoundry.checkpoints.sharded import METADATA, read_metadata, why_folder_is_not_whole
from mptfoundry.checkpoints.torch_files import ends_as_written, why_file_is_not_whole
from mptfoundry.errors import CheckpointError
from mptfoundry.places import progress_of

_KNOWN = (
    "Give a run folder, a checkpoint (ep0-ba10-rank0.pt, or a folder of .distcp files), or a Hugging Face "
    "folder."
)

log = logging.getLogger(__name__)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest whole one in a run folder.

    Newest is the one with the most batches in its name; checkpoints named otherwise come after those, by
    time. Unfinished ones are passed over, with a warning that names them.

    Returns:
        A file, or a folder with `.metadata`; links are followed.

    Raises:
        CheckpointError: Nothing is there, or nothing that is whole, or the newest one is damaged.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: the link points at {path.readlink()}, which is not there. {_KNOWN}")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder. {_KNOWN}")
    path = path.resolve()
    if path.is_file() or is_sharded(path):
        return path
    candidates = checkpoints_in(path)
    for candidate in candidates:
        reason = why_not_whole(candidate)
        if reason is None:
            return candidate
        if not is_unfinished(candidate):
            raise CheckpointError(f"{candidate}: {reason}. Restore it, or name another checkpoint.")
        log.warning("%s: %s; passed over.", candidate, reason)
    if candidates:
        raise CheckpointError(f"{path}: none of its {len(candidates)} checkpoints is whole.")
    raise CheckpointError(
        f"{path}: no checkpoint in it. Looked for *.pt files and for folders with {METADATA}. {_KNOWN}"
    )


def checkpoints_in(run_folder: Path) -> list[Path]:
    """All entries of a run folder that are named or shaped like checkpoints, newest first, links followed."""
    entries = {entry.resolve() for entry in run_folder.iterdir() if not entry.name.startswith(".")}
    return sorted(filter(_looks_like_a_checkpoint, entries), key=_age, reverse=True)


def is_sharded(path: Path) -> bool:
    """Whether a folder is a sharded checkpoint."""
    return (path / METADATA).is_file()


def why_not_whole(checkpoint: Path) -> str | None:
    """What is missing from a checkpoint, from its outline alone (values aren't read); None if nothing is."""
    return why_folder_is_not_whole(checkpoint) if checkpoint.is_dir() else why_file_is_not_whole(checkpoint)


def is_unfinished(checkpoint: Path) -> bool:
    """Whether a checkpoint lacks its end or a file, as when its writing or copying was stopped.

    False also for one that has them and is damaged: `why_not_whole` tells.
    """
    if checkpoint.is_file():
        return not ends_as_written(checkpoint)
    if not is_sharded(checkpoint):
        return True
    try:
        return why_folder_is_not_whole(checkpoint, read_metadata(checkpoint)) is not None
    except CheckpointError:
        return False


def _looks_like_a_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return is_sharded(path) or progress_of(path) is not None
    return path.is_file() and (path.suffix == ".pt" or progress_of(path) is not None)


def _age(path: Path) -> tuple[int, float]:
    progress = progress_of(path)
    changed_at = 0.0
    with contextlib.suppress(FileNotFoundError):  # a run may delete its older ones meanwhile
        changed_at = path.stat().st_mtime
    return (progress[1] if progress else -1, changed_at)
