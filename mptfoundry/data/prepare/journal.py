"""What a preparation has done so far, on disk, so that a killed one goes on.

While `out/train` is prepared it holds a folder `.preparing` with a lock, the *state* (how many units are in
the shards, which shards there are), the ids that are in no shard yet, and a *log* that names each file
before it is written. A state is replaced in one move and names the files of ids that belong to it, so what is
on disk is one moment of the preparation, whole. Nothing is removed that the log or the state does not name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mptfoundry.data.jobs import MOST_PROBLEMS_KEPT
from mptfoundry.data.prepare.work import Encoded, UnitResult
from mptfoundry.data.shards.index import PREPARING
from mptfoundry.data.shards.writer import ShardWriter, write_whole
from mptfoundry.errors import DataError

STATE, LOG = "state.json", "written"
SHORTEST_PERIOD_SECONDS = 1.0
MOST_TIME_SAVING = 0.05


@dataclass
class SplitProgress:
    """One split as far as it is done."""

    writer: ShardWriter
    documents: int = 0
    text_bytes: int = 0

    def add(self, encoded: Encoded) -> None:
        """Append what a unit gave."""
        self.writer.add(encoded.ids)
        self.documents += encoded.documents
        self.text_bytes += encoded.text_bytes


@dataclass
class Journal:
    """A preparation as far as it is done, in memory and on disk.

    Attributes:
        folder: Of the main split; the state lies below it.
        identity: What must be the same for a killed preparation to go on.
        splits: The main split first.
        units: How many units are in `splits`.
        weight: Of those units.
        skipped: What was left out, by reason.
        problems: Messages of the first things that could not be read.
        seconds: Spent on them, by all calls.
        saved_units: How many units the state on disk holds.
        written: What this preparation wrote into the splits' folders, as `split/name`.
    """

    folder: Path
    identity: Mapping[str, Any]
    splits: dict[str, SplitProgress]
    units: int = 0
    weight: int = 0
    seconds: float = 0.0
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    saved_units: int = 0
    written: set[str] = field(default_factory=set)
    _saved_at: float = 0.0
    _period_seconds: float = SHORTEST_PERIOD_SECONDS

    def __post_init__(self) -> None:
        for name, progress in self.splits.items():
            progress.writer.announce = partial(self._announce, name)

    @property
    def log(self) -> Path:
        """The file that names what is written."""
        return self.folder / PREPARING / LOG

    def begin(self) -> None:
        """Put a preparation on disk that has done nothing yet."""
        self.log.write_bytes(b"")
        self.save()

    def add(self, result: UnitResult) -> None:
        """Take in the next unit, and save now and then."""
        for progress, encoded in zip(self.splits.values(), (result.kept, result.held_out), strict=False):
            progress.add(encoded)
        self.units += 1
        self.weight += result.weight
        self.skipped += result.skipped
        self.problems = [*self.problems, *result.problems][:MOST_PROBLEMS_KEPT]
        if time.monotonic() - self._saved_at > self._period_seconds:
            self.save()

    def save(self) -> None:
        """Put this moment on disk; the next time so much later that saving takes little of the whole."""
        started_at = time.monotonic()
        splits = {}
        for name, progress in self.splits.items():
            pending = f"{name}.{self.units}.pending"
            write_whole(self.folder / PREPARING / pending, progress.writer.pending)
            splits[name] = {
                "pending": pending,
                "shards": progress.writer.shards,
                "documents": progress.documents,
                "text_bytes": progress.text_bytes,
            }
        state = {
            "identity": self.identity,
            "units": self.units,
            "weight": self.weight,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "problems": self.problems,
            "splits": splits,
        }
        write_whole(self.folder / PREPARING / STATE, json.dumps(state, sort_keys=True).encode())
        for path in (self.folder / PREPARING).glob("*.pending"):
            if path.name not in {split["pending"] for split in splits.values()}:
                path.unlink()
        self.saved_units = self.units
        self._saved_at = time.monotonic()
        self._period_seconds = max(SHORTEST_PERIOD_SECONDS, (self._saved_at - started_at) / MOST_TIME_SAVING)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take over the state on disk, as `read_state` gave it.

        Raises:
            DataError: It is damaged.
        """
        folder = self.folder / PREPARING
        try:
            for name, progress in self.splits.items():
                split = state["splits"][name]
                progress.writer.shards = list(split["shards"])
                progress.writer.pending = bytearray((folder / split["pending"]).read_bytes())
                progress.documents, progress.text_bytes = split["documents"], split["text_bytes"]
            self.units, self.weight, self.seconds = state["units"], state["weight"], state["seconds"]
            self.skipped, self.problems = Counter(state["skipped"]), list(state["problems"])
            self._check_files()
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{folder / STATE} is damaged ({error!r}). Remove {self.folder} and start again."
            ) from error
        self.saved_units = self.units

    def remove(self) -> None:
        """Take back everything that was written."""
        for name in self.written:
            split, _, file = name.partition("/")
            (self.splits[split].writer.folder / file).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """The preparation is complete, or taken back: nothing is left to continue from."""
        (self.folder / PREPARING / STATE).unlink()

    def _announce(self, split: str, name: str) -> None:
        self.written.add(f"{split}/{name}")
        # A preparation that an older version began has no log.
        if self.log.exists():
            with self.log.open("a") as file:
                file.write(f"{split}/{name}\n")
                file.flush()
                os.fsync(file.fileno())

    def _check_files(self) -> None:
        """Raises DataError where a file is missing that the state names, or there is one that is not ours."""
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


def read_state(folder: Path) -> dict[str, Any] | None:
    """The state of a preparation of `folder` that was not finished; None if there is none.

    Raises:
        DataError: It is damaged.
    """
    path = folder / PREPARING / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}). Remove {folder} and start again.") from error
    return state


def remove_marks(folder: Path) -> None:
    """Remove what marks a folder as half prepared, and the folder and its parent if they are empty then."""
    shutil.rmtree(folder / PREPARING, ignore_errors=True)
    for empty in (folder, folder.parent):
        with suppress(OSError):
            empty.rmdir()


@contextmanager
def locked(*folders: Path) -> Iterator[None]:
    """Hold the folders of one preparation, the main split's first; the locks go with the process, however
    that ends. At the end of the block the marks are removed unless there is a state to continue from.

    Raises:
        DataError: Another preparation holds one of them.
    """
    with ExitStack() as locks:
        held: list[Path] = []
        try:
            for folder in folders:
                locks.enter_context(_lock(folder))
                held.append(folder)
            yield
        finally:
            if held and not (held[0] / PREPARING / STATE).exists():
                for folder in held:
                    remove_marks(folder)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    path = folder / PREPARING / "lock"
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except FileNotFoundError:
            continue  # another process has just finished here and removed the folder
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(f"{folder}: another process is preparing it. Wait for that one.") from error
            # Whoever held it before may have removed the file: then this lock keeps nobody out.
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                yield
                return
