"""StreamingDataset where what it leaves unsafe is safe: shards are checked before they are read, what fails
in one process is waited for in none, an epoch has all of its samples, and nobody's only copy is removed.

On each node the processes of all ranks and workers share the state of every shard. A shard that lies on this
machine when a run starts is to them one that is not here yet: the process that first needs it checks it, or
fetches it, while the others wait. How a shard comes to be here says `GuardedStream`.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from math import ceil
from pathlib import Path
from time import sleep
from typing import Any, Literal

import numpy as np
import streaming.base.dataset
import torch
from streaming import Stream, StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import NEVER, _ShardState
from streaming.base.distributed import barrier, get_rank
from streaming.base.util import wait_for_file_to_exist

from mptfoundry.data.shards.index import INDEX, read_index
from mptfoundry.data.shards.integrity import (
    MISSING,
    fastest_hash,
    problem_of,
    problems_of,
    refuse,
    unpack,
    wait_for_writer,
)
from mptfoundry.data.text.shared_names import take_number
from mptfoundry.errors import DataError
from mptfoundry.stores import FOR_DATA, patiently, reason_of, size_of

Verify = Literal["lazy", "full", "off"]
# A transfer may damage what it copies; the same damage twice is that of the source.
MOST_FETCHES = 2
# What streaming reads of a data set's state in a checkpoint.
PLACE = {"epoch", "sample_in_epoch", "num_canonical_nodes", "shuffle_seed"}

log = logging.getLogger(__name__)

streaming.base.dataset.get_shm_prefix = take_number


class GuardedStream(Stream):
    """A stream whose shards are what its index says, or an error.

    Args:
        where: What the user calls it, for errors.
        verify: `off` looks at sizes alone; else at hashes, by `validate_hash` or the fastest that there is.
        stream: Arguments of streaming's Stream, with `local`.

    Attributes:
        here: Names of the files that lay here at the start; known to the first process of a node.
        patience: How long a file's remote may fail.
    """

    patience = FOR_DATA

    def __init__(self, *, where: str, verify: Verify, **stream: Any) -> None:
        super().__init__(**stream)
        self.where = where
        self.verify = verify
        self.here: frozenset[str] = frozenset()

    @property
    def folder(self) -> Path:
        """Where its files lie on this machine."""
        return Path(self.local, self.split)

    @property
    def is_only_copy(self) -> bool:
        """Whether its files here are the data set itself, and no copies that can be fetched again."""
        return self.remote is None

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Any]:
        """Fetch the index if it is not here, and check it before anything that it names is touched."""
        path = self.folder / INDEX
        if not path.is_file() and not self.is_only_copy:
            if world.is_local_leader:
                self._download(INDEX).replace(path)
            else:
                text = f"{self.where}: {path} was not fetched by the first process of this node in time."
                wait_for_file_to_exist(str(path), TICK, self.download_timeout + self.patience.seconds, text)
        index = read_index(self.folder, self.where)
        hashes = [dict(shard["zip_data"] or shard["raw_data"])["hashes"] for shard in index.shards]
        if self.verify != "off" and not all(map(fastest_hash, hashes)) and get_rank() == 0:
            log.warning(
                "%s: its index has no hashes, so that only the sizes of files are checked.", self.where
            )
        return super().get_shards(world, allow_unsafe_types)

    def set_up_local(self, shards: list[Any], cache_usage_per_shard: Any) -> None:
        """See what is here. Streaming would also remove what it finds odd, be it the only copy."""
        paths = self.folder.rglob("*")
        self.here = frozenset(path.relative_to(self.folder).as_posix() for path in paths)
        for number, shard in enumerate(shards):
            files = [info for info in (shard.raw_data, shard.zip_data) if info and info.basename in self.here]
            cache_usage_per_shard[number] = 0 if self.is_only_copy else sum(info.bytes for info in files)

    def stored(self, shard: Any) -> Any:
        """The entry of the file that a shard is kept in: the compressed one, unless the other was here."""
        is_raw = shard.zip_data is None or shard.raw_data.basename in self.here
        return shard.raw_data if is_raw else shard.zip_data

    def problem(self, entry: Any, path: Path | None = None) -> str | None:
        """What is wrong with the file (or the copy of it at `path`) that an index's entry is of."""
        algorithm = None
        if self.verify != "off":
            algorithm = self.validate_hash or fastest_hash(entry.hashes)
            if algorithm is not None and algorithm not in entry.hashes:
                has = ", ".join(entry.hashes) or "none"
                raise DataError(
                    f"{self.where}.validate_hash: {entry.basename} has no {algorithm}. It has {has}."
                )
        if path is None:
            path = self.folder / entry.basename
            if not self.is_only_copy:
                wait_for_writer(path, entry.bytes)
        return problem_of(path, vars(entry), algorithm)

    def _prepare_shard_part(self, raw_info: Any, zip_info: Any = None, compression: str | None = None) -> int:
        """Have the file of a shard here, whole and checked; gives by how many bytes the cache has grown."""
        files = [info for info in (raw_info, zip_info) if info]
        before = sum(info.bytes for info in files if (self.folder / info.basename).is_file())
        problem = self.problem(raw_info)
        if problem and zip_info is None:
            self._fetch(raw_info, problem)
        elif problem:
            packed_problem = self.problem(zip_info)
            if packed_problem:
                self._fetch(zip_info, packed_problem)
            self._unpack(zip_info, raw_info, str(compression))
        if zip_info and not self.safe_keep_zip:
            (self.folder / zip_info.basename).unlink(missing_ok=True)
        after = sum(info.bytes for info in files if (self.folder / info.basename).is_file())
        return 0 if self.is_only_copy else after - before

    def _fetch(self, entry: Any, problem: str) -> None:
        """Fetch a file in place of one that is missing or bad."""
        path = self.folder / entry.basename
        if self.is_only_copy:
            refuse(self.where, [f"{path} {problem}"])
        if problem != MISSING:
            log.warning("%s: the copy %s %s. It is fetched again.", self.where, path, problem)
        for _ in range(MOST_FETCHES):
            part = self._download(entry.basename)
            found = self.problem(entry, part)
            if found is None:
                part.replace(path)
                return
            part.unlink()
        raise DataError(
            f"{self.where}: {self._remote(entry.basename)} {found}, and so it was when fetched again. Mend "
            f"it there; if it was replaced there, remove {self.folder / INDEX} here."
        )

    def _download(self, name: str) -> Path:
        """Fetch a file under another name, so that none is seen half, or bad, under its own."""
        part = self.folder / f"{name}.{socket.gethostname()}.part"
        try:
            part.unlink(missing_ok=True)
            patiently(
                lambda: self._download_file(name, part.relative_to(self.folder).as_posix()),
                what=f"{self.where}: {self._remote(name)} can't be fetched",
                patience=self.patience,
                sign=lambda: size_of(part),
            )
        except Exception as error:
            raise DataError(
                f"{self.where}: {self._remote(name)} can't be fetched: {reason_of(error)}."
            ) from error
        return part

    def _unpack(self, packed: Any, raw: Any, compression: str) -> None:
        path, source = self.folder / raw.basename, self.folder / packed.basename
        part = path.with_name(f"{path.name}.{socket.gethostname()}.part")
        try:
            part.write_bytes(unpack(compression, source.read_bytes(), raw.bytes))
            part.replace(path)
        except (ValueError, OSError) as error:
            part.unlink(missing_ok=True)
            raise DataError(f"{self.where}: {source} can't be unpacked: {error}.") from error
        found = self.problem(raw)
        if found:
            raise DataError(f"{self.where}: {source}, once unpacked, {found}. Prepare it again.")

    def _remote(self, name: str) -> str:
        return os.path.join(self.remote or "", self.split, name)  # noqa: PTH118 -- a URL


class GuardedDataset(StreamingDataset):
    """A StreamingDataset of guarded streams.

    Args:
        where: What the user calls it, for errors.
        verify: When shards are compared with their hashes: `lazy`, before each is first read in this run;
            `full`, those that are here also when `check_files` is called; `off`, never.
        varies: Epochs differ; otherwise each is as the first.
        streaming: Arguments of StreamingDataset; `streams` are GuardedStreams.

    Attributes:
        planned: (workers,) int64 in shared memory: how many samples this epoch deals to each worker of this
            rank, repeats included; -1 where a worker has not begun.
        background_error: What failed in a thread that prepares shards.
    """

    def __init__(self, *, where: str, verify: Verify, varies: bool = True, **streaming: Any) -> None:
        self.where = where
        self.verify = verify
        self.varies = varies
        self.background_error: BaseException | None = None
        self.planned = torch.full((1,), -1, dtype=torch.int64)
        super().__init__(**streaming)
        if self._unique_rank_world.is_local_leader:
            self._shard_states.numpy()[:] = _ShardState.REMOTE
        barrier()

    def __len__(self) -> int:
        """Samples of this rank in an epoch, with the repeats that fill ranks and canonical nodes."""
        world = self._parallel_rank_world
        if self.batching_method != "random":
            return super().__len__()
        canonical = self.num_canonical_nodes or world.num_nodes
        of_each = ceil(self.epoch_size / canonical)
        physical = max(1, world.num_nodes // canonical)
        of_node = canonical * ceil(of_each / physical) * physical // world.num_nodes
        return ceil(of_node / world.ranks_per_node)

    def check_files(self) -> None:
        """Look for every file that has to be on this machine, and with `verify: full` into all that are.

        Raises:
            DataError: Files of a data set that lies here are missing or damaged. Bad copies of a remote one
                are fetched again when they are needed.
        """
        is_full = self.verify == "full"
        files = []
        for shard_id, shard in enumerate(self.shards):
            stream = self._stream_of(shard_id)
            entry = stream.stored(shard)
            if stream.is_only_copy or (is_full and entry.basename in stream.here):
                files.append((shard_id, stream, entry))

        def look(file: tuple[int, GuardedStream, Any]) -> str | None:
            _, stream, entry = file
            path = stream.folder / entry.basename
            return stream.problem(entry) if is_full else problem_of(path, vars(entry), None)

        title = f"{self.where}: checking shards" if is_full and get_rank() == 0 else ""
        problems = problems_of(files, look, lambda file: file[2].bytes, title=title)
        lost = [
            (stream.folder / entry.basename, text)
            for (_, stream, entry), text in problems
            if stream.is_only_copy
        ]
        refuse(self.where, [f"{path} {text}" for path, text in lost])
        if is_full:
            bad = {shard_id for (shard_id, _, _), _ in problems}
            good = [shard_id for shard_id, _, _ in files if shard_id not in bad]
            self._shard_states[good] = _ShardState.LOCAL

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """One sample, of a shard that is here and checked."""
        shard_id, _ = self.spanner[sample_id]
        while self._shard_states[shard_id] != _ShardState.LOCAL:
            self.prepare_shard(shard_id)
        return super().get_item(sample_id, retry)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """As streaming's; what fails here is tried by the processes that waited for it, and not for ever."""
        state = self._shard_states[shard_id]
        if state == _ShardState.PREPARING and not blocking:
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException as error:
            self._shard_states[shard_id] = _ShardState.REMOTE
            if self._cache_filelock.is_locked:
                self._cache_filelock.release(force=True)
            if isinstance(error, (OSError, ValueError)):
                raise DataError(f"{self._stream_of(shard_id).where}: {error}") from error
            raise

    def on_exception(self, future: Future) -> None:
        """Keep what failed in the background and stop the threads, so that iteration can raise it."""
        error = future.exception()
        if error is not None:
            self.background_error = error
            self._event.set()

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """As streaming's, with the samples of a global batch."""
        return {**super().state_dict(num_samples, from_beginning), "global_batch_size": self._global_batch()}

    def load_state_dict(self, obj: Mapping[str, Any]) -> None:
        """Go on at the sample that the state says.

        Raises:
            DataError: It is of another kind of loader, or of another batch size where the order of this
                `batching_method` depends on that.
        """
        if not isinstance(obj, Mapping) or not obj.keys() >= PLACE:
            raise DataError(
                f"{self.where}: the checkpoint's place in the data is that of another loader. Restore that "
                "one, or start a new run from its weights, with load_path and load_weights_only: true."
            )
        before = obj.get("global_batch_size", self._global_batch())
        if self.batching_method != "random" and before != self._global_batch():
            raise DataError(
                f"{self.where}.batching_method: with {self.batching_method} the order of samples depends on "
                f"the batch size, which was {before} and is {self._global_batch()}. Use {before}."
            )
        super().load_state_dict(dict(obj))
        # Streaming has only the workers of the first epoch know what the order of all of them depends on.
        self.num_canonical_nodes, self.shuffle_seed = obj["num_canonical_nodes"], obj["shuffle_seed"]
        self.initial_physical_nodes = obj.get("initial_physical_nodes")

    def _resume(self, world: Any, epoch: int) -> tuple[int, int]:
        """As streaming's: which epoch to read, and from which sample on."""
        return super()._resume(world, epoch if self.varies else 0)

    def _global_batch(self) -> int:
        return int(self.batch_size or 0) * self._parallel_rank_world.num_ranks

    def _stream_of(self, shard_id: int) -> GuardedStream:
        stream = self.streams[self.stream_per_shard[shard_id]]
        assert isinstance(stream, GuardedStream)
        return stream

    def _get_work(self, epoch: int, sample_in_epoch: int) -> Any:
        samples = super()._get_work(epoch, sample_in_epoch)
        self.planned[self._unique_worker_world.worker_of_rank] = int((samples != -1).sum())
        return samples

    def _prepare_thread(self, it: Any) -> None:
        try:
            super()._prepare_thread(it)
        except BaseException:
            it.on_exit()
            raise

    def _ready_thread(self, it: Any) -> None:
        """As streaming's, but for a shard that another process gave up: here it is tried again."""
        try:
            while not it.should_exit() and it.ready_index < it.total and not self._event.is_set():
                sample_id = it.sample_ids[it.ready_index]
                is_far_ahead = (self.predownload or np.inf) < it.ready_index - it.yield_index
                state = _ShardState.LOCAL
                if sample_id != -1 and not is_far_ahead:
                    shard_id, _ = self.spanner[sample_id]
                    state = self._shard_states[shard_id]
                if state == _ShardState.REMOTE and it.ready_index < it.prepare_index:
                    self.prepare_shard(shard_id, False)
                elif is_far_ahead or state != _ShardState.LOCAL:
                    sleep(TICK)
                else:
                    it.ready_index += 1
        finally:
            it.on_exit()

    def __iter__(self) -> Iterator[Any]:
        """As streaming's; an epoch after one in which something failed fails for the same reason."""
        self._raise_background_error()
        yield from super().__iter__()

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        yield from super()._each_sample_id(it)
        # Streaming only stops when a shard can't be had in the background: the epoch would seem over.
        self._raise_background_error()

    def _raise_background_error(self) -> None:
        error = self.background_error
        if isinstance(error, DataError):
            raise DataError(str(error)) from error
        if error is not None:
            raise DataError(f"{self.where}: a shard can't be read: {error}") from error

    def _evict_coldest_shard(self) -> None:
        """As streaming's, also of what was here when the run began, and never of anybody's only copy."""
        times = self._shard_access_times.numpy().copy()
        times[self._shard_states.numpy() == _ShardState.PREPARING] = NEVER
        for number, stream in enumerate(self.streams):
            if isinstance(stream, GuardedStream) and stream.is_only_copy:
                times[self.stream_per_shard == number] = NEVER
        coldest = int(times.argmin())
        if times[coldest] == NEVER:
            raise ValueError("cache_limit is too low: it holds nothing more that could be removed.")
        self._evict_shard(coldest)
