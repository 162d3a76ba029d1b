"""The sink of a preparation: writes the shards of all splits, and can resume after a kill.

During a preparation `out/train` has a folder `.preparing` with a lock, the job's state (see `data/jobs.py`),
the ids that are not in a shard yet, and a *log* that names each file before it is written. A state names
the files of those ids. Outside `.preparing`, only files named in the log or the state are ever removed.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mptfoundry.data.jobs import MOST_PROBLEMS_KEPT, STATE, read_state
from mptfoundry.data.prepare.work import Encoded, UnitResult
from mptfoundry.data.shards.index import PREPARING, ShardMeta
from mptfoundry.data.shards.writer import ShardWriter, write_whole
from mptfoundry.errors import DataError
from mptfoundry.files import Held, locked

LOG = "written"


class TooLittle(DataError):
    """The text of a split is shorter than one sample."""


@dataclass
class SplitProgress:
    """The progress of one split."""

    writer: ShardWriter
    documents: int = 0
    text_bytes: int = 0

    def add(self, encoded: Encoded) -> None:
        """Append the ids of a unit."""
        self.writer.add(encoded.ids)
        self.documents += encoded.documents
        self.text_bytes += encoded.text_bytes


@dataclass
class ShardSink:
    """Writes the shards of all splits.

    Attributes:
        folder: The folder of the main split; the job's state is inside it.
        splits: Progress by split, the main split first.
        id_bytes: Bytes per id.
        max_seq_len: Tokens per sample.
        meta: Creates the metadata of a finished split from its samples, dropped tokens, documents and bytes.
        tokens: Tokens received in this process.
        skipped: Number of skipped items, by reason.
        problems: Messages of the first inputs that could not be read.
        written: Files written to the folders of the splits, as `split/name`.
    """

    folder: Path
    splits: dict[str, SplitProgress]
    id_bytes: int
    max_seq_len: int
    meta: Callable[[int, int, int, int], ShardMeta]
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    written: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name, progress in self.splits.items():
            progress.writer.announce = partial(self._announce, name)

    @property
    def log(self) -> Path:
        """The file that names the written files."""
        return self.folder / PREPARING / LOG

    def begin(self) -> None:
        """Create an empty log."""
        self.log.write_bytes(b"")

    def add(self, result: UnitResult) -> None:
        """Receive the result of the next unit."""
        for progress, encoded in zip(self.splits.values(), (result.kept, result.held_out), strict=False):
            progress.add(encoded)
            self.tokens += len(encoded.ids) // self.id_bytes
        self.skipped += result.skipped
        self.problems = [*self.problems, *result.problems][:MOST_PROBLEMS_KEPT]

    def state(self, units: int) -> dict[str, Any]:
        """Return the shards and counts of each split; write ids that are not in a shard yet to files."""
        folder, splits = self.folder / PREPARING, {}
        saved = read_state(folder) or {"splits": {}}
        named = {split["pending"] for split in saved["splits"].values()}
        for path in folder.glob("*.pending"):
            if path.name not in named:
                path.unlink()
        for name, progress in self.splits.items():
            pending = f"{name}.{units}.pending"
            write_whole(folder / pending, progress.writer.pending)
            splits[name] = {
                "pending": pending,
                "shards": progress.writer.shards,
                "documents": progress.documents,
                "text_bytes": progress.text_bytes,
            }
        return {"splits": splits, "skipped": self.skipped, "problems": self.problems}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a state.

        Raises:
            DataError: A shard is missing, or a folder has a file that this preparation did not write.
        """
        for name, progress in self.splits.items():
            split = state["splits"][name]
            progress.writer.shards = list(split["shards"])
            pending = self.folder / PREPARING / split["pending"]
            progress.writer.pending = bytearray(pending.read_bytes())
            progress.documents, progress.text_bytes = split["documents"], split["text_bytes"]
        self.skipped, self.problems = Counter(state["skipped"]), list(state["problems"])
        self._check_files()

    def finish(self) -> list[ShardMeta]:
        """Write the last shards, then the indexes. The main split's index is last and completes the dataset.

        Raises:
            TooLittle: A split has less than one full sample.
        """
        metas = []
        for name, progress in self.splits.items():
            dropped = progress.writer.finish() // self.id_bytes
            samples = sum(int(shard["samples"]) for shard in progress.writer.shards)
            if not samples:
                more = ", or more held_out" * (name != next(iter(self.splits)))
                raise TooLittle(
                    f"{progress.writer.folder}: the text gives {dropped:,} tokens, less than one sample of "
                    f"{self.max_seq_len:,}. Give more text{more}."
                )
            metas.append(self.meta(samples, dropped, progress.documents, progress.text_bytes))
        for progress, meta in reversed(list(zip(self.splits.values(), metas, strict=True))):
            progress.writer.write_index(meta)
        return metas

    def remove(self) -> None:
        """Remove everything that was written."""
        for name in self.written:
            split, _, file = name.partition("/")
            (self.splits[split].writer.folder / file).unlink(missing_ok=True)

    def _announce(self, split: str, name: str) -> None:
        self.written.add(f"{split}/{name}")
        # A preparation started by an older version has no log.
        if self.log.exists():
            with self.log.open("a") as file:
                file.write(f"{split}/{name}\n")
                file.flush()
                os.fsync(file.fileno())

    def _check_files(self) -> None:
        """Raise DataError if a shard of the state is missing, or if a folder has a file that is not ours."""
        has_log = self.log.exists()
        self.written = set(self.log.read_text().splitlines()) if has_log else set()
        for split, progress in self.splits.items():
            folder = progress.writer.folder
            for shard in progress.writer.shards:
                entry = shard["zip_data"] or shard["raw_data"]
                self.written.add(f"{split}/{entry['basename']}")
                path = folder / entry["basename"]
                if not path.is_file() or path.stat().st_size != entry["bytes"]:
                    raise DataError(
                        f"{path}: the shard is missing or cut short. Remove {self.folder} and start again."
                    )
            others = {path.name for path in folder.iterdir() if f"{split}/{path.name}" not in self.written}
            if has_log and (others := others - {PREPARING}):
                raise DataError(
                    f"{folder / min(others)}: this preparation did not write it. Move it away, and start the "
                    f"same command again."
                )


def remove_marks(folder: Path) -> None:
    """Remove `.preparing` from a folder, then the folder and its parent if they are empty."""
    shutil.rmtree(folder / PREPARING, ignore_errors=True)
    for empty in (folder, folder.parent):
        with suppress(OSError):
            empty.rmdir()


@contextmanager
def lock_folders(*folders: Path) -> Iterator[None]:
    """Lock the folders of one preparation, the main split first.

    The locks are released when the process ends, for any reason. At the end of the block `.preparing` is
    removed unless there is a state to resume from.

    Raises:
        DataError: Another preparation has locked one of them.
    """
    with ExitStack() as locks:
        held: list[Path] = []
        try:
            for folder in folders:
                try:
                    locks.enter_context(locked(folder / PREPARING / "lock"))
                except Held as error:
                    text = f"{folder}: another process is preparing it ({error}). Wait for that one."
                    raise DataError(text) from error
                held.append(folder)
            yield
        finally:
            if held and not (held[0] / PREPARING / STATE).exists():
                for folder in held:
                    remove_marks(folder)
