"""A StreamingDataset with integrity checks.

Shards are verified before use, a failure reaches every process, every epoch is complete, and the only copy of
a dataset is never deleted.

On each node, all ranks and workers share the state of every shard. A run treats shards that are already on
this machine as not ready: the first process that needs a shard checks or fetches it while the others wait.
`GuardedStream` does the checking and fetching.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import ceil
from pathlib import Path
from time import sleep
from typing import Any, Literal, NoReturn

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
# A transfer can damage a file. If the file is bad twice, the source is damaged.
MOST_FETCHES = 2
# What streaming reads from a dataset's state in a checkpoint.
PLACE = {"epoch", "sample_in_epoch", "num_canonical_nodes", "shuffle_seed"}

log = logging.getLogger(__name__)

streaming.base.dataset.get_shm_prefix = take_number


class GuardedStream(Stream):
    """A stream that checks its shards against the index.

    Args:
        where: The stream's key in the config, for errors.
        verify: `off` checks sizes only. Otherwise hashes are checked too, with `validate_hash` or else the
            fastest algorithm in the index.
        stream: Arguments of streaming's Stream, including `local`.

    Attributes:
        here: Names of the local files at the start; only set in the first process of a node.
        patience: How long to retry when a remote fails.
    """

    patience = FOR_DATA

    def __init__(self, *, where: str, verify: Verify, **stream: Any) -> None:
        super().__init__(**stream)
        self.where = where
        self.verify = verify
        self.here: frozenset[str] = frozenset()

    @property
    def folder(self) -> Path:
        """The local folder of the files."""
        return Path(self.local, self.split)

    @property
    def is_only_copy(self) -> bool:
        """Whether the local files are the dataset itself, not copies that can be fetched again."""
        return self.remote is None

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Any]:
        """Fetch the index if it is missing, and check it before using any file it names."""
        if not (self.folder / INDEX).is_file() and not self.is_only_copy:
            self._fetch_index(world)
        index = read_index(self.folder, self.where)
        hashes = [dict(shard["zip_data"] or shard["raw_data"])["hashes"] for shard in index.shards]
        if self.verify != "off" and not all(map(fastest_hash, hashes)) and get_rank() == 0:
            log.warning(
                "%s: its index has no hashes, so that only the sizes of files are checked.", self.where
            )
        return super().get_shards(world, allow_unsafe_types)

    def _fetch_index(self, world: Any) -> None:
        path = self.folder / INDEX
        if world.is_local_leader:
            self._download(INDEX).replace(path)
        else:
            text = f"{self.where}: {path} was not fetched by the first process of this node in time."
            wait_for_file_to_exist(str(path), TICK, self.download_timeout + self.patience.seconds, text)

    def set_up_local(self, shards: list[Any], cache_usage_per_shard: Any) -> None:
        """List the local files. Streaming would delete unexpected ones, even if they are the only copy."""
        paths = self.folder.rglob("*")
        self.here = frozenset(path.relative_to(self.folder).as_posix() for path in paths)
        for number, shard in enumerate(shards):
            files = [info for info in (shard.raw_data, shard.zip_data) if info and info.basename in self.here]
            cache_usage_per_shard[number] = 0 if self.is_only_copy else sum(info.bytes for info in files)

    def stored(self, shard: Any) -> Any:
        """Return the index entry of the compressed file, unless the uncompressed one was already here."""
        is_raw = shard.zip_data is None or shard.raw_data.basename in self.here
        return shard.raw_data if is_raw else shard.zip_data

    def problem(self, entry: Any, path: Path | None = None) -> str | None:
        """Describe what is wrong with an index entry's file, or its copy at `path`; None if it is fine."""
        algorithm = None
        if self.verify != "off":
            algorithm = self._hash_to_validate(entry) if self.validate_hash else fastest_hash(entry.hashes)
        if path is None:
            path = self.folder / entry.basename
            if not self.is_only_copy:
                wait_for_writer(path, entry.bytes)
        return problem_of(path, vars(entry), algorithm)

    def _hash_to_validate(self, entry: Any) -> str:
        """Return `validate_hash`, an algorithm that the entry must have."""
        if self.validate_hash not in entry.hashes:
            has = f"no {self.validate_hash}. It has {', '.join(entry.hashes) or 'none'}."
            raise DataError(f"{self.where}.validate_hash: {entry.basename} has {has}")
        return str(self.validate_hash)

    def _prepare_shard_part(self, raw_info: Any, zip_info: Any = None, compression: str | None = None) -> int:
        """Make sure a shard's file is here and correct; return how many bytes the cache grew."""
        before = self._bytes_of(raw_info, zip_info)
        if problem := self.problem(raw_info):
            self._restore(raw_info, problem, zip_info, str(compression))
        if zip_info and not self.safe_keep_zip:
            (self.folder / zip_info.basename).unlink(missing_ok=True)
        return 0 if self.is_only_copy else self._bytes_of(raw_info, zip_info) - before

    def _bytes_of(self, *infos: Any) -> int:
        return sum(info.bytes for info in infos if info and (self.folder / info.basename).is_file())

    def _restore(self, raw: Any, problem: str, packed: Any, compression: str) -> None:
        """Fetch a shard's file that is missing or bad, or unpack it from its compressed file."""
        if packed is None:
            self._fetch(raw, problem)
            return
        if packed_problem := self.problem(packed):
            self._fetch(packed, packed_problem)
        self._unpack(packed, raw, compression)

    def _fetch(self, entry: Any, problem: str) -> None:
        """Fetch a file that is missing or bad."""
        path = self.folder / entry.basename
        if self.is_only_copy:
            refuse(self.where, [f"{path} {problem}"])
        if problem != MISSING:
            log.warning("%s: the copy %s %s. It is fetched again.", self.where, path, problem)
        for _ in range(MOST_FETCHES):
            part = self._download(entry.basename)
            problem_again = self.problem(entry, part)
            if problem_again is None:
                part.replace(path)
                return
            part.unlink()
        raise DataError(
            f"{self.where}: {self._remote(entry.basename)} {problem_again}, also when fetched again. Fix "
            f"it there; if it was replaced there, remove {self.folder / INDEX} here."
        )

    def _download(self, name: str) -> Path:
        """Fetch a file under a temporary name, so nobody reads an incomplete or bad file."""
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
        problem = self.problem(raw)
        if problem:
            raise DataError(f"{self.where}: {source}, once unpacked, {problem}. Prepare it again.")

    def _remote(self, name: str) -> str:
        return os.path.join(self.remote or "", self.split, name)  # noqa: PTH118 -- a URL


class GuardedDataset(StreamingDataset):
    """A StreamingDataset of GuardedStreams.

    Args:
        where: The dataset's key in the config, for errors.
        verify: When to check hashes. `lazy`: before this run first reads a shard. `full`: like `lazy`, and
            `check_files` checks all local shards. `off`: never.
        varies: Whether epochs differ. If False, every epoch is the same as the first.
        streaming: Arguments of StreamingDataset; `streams` are GuardedStreams.

    Attributes:
        planned: (workers,) int64 in shared memory: how many samples each worker of this rank gets in this
            epoch, including repeats; -1 if the worker has not started.
        background_error: The error of a background thread that prepares shards.
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
        """Return this rank's samples per epoch, including repeats that even out ranks and canonical nodes."""
        return self._samples_at_random() if self.batching_method == "random" else super().__len__()

    def _samples_at_random(self) -> int:
        world = self._parallel_rank_world
        canonical = self.num_canonical_nodes or world.num_nodes
        of_each = ceil(self.epoch_size / canonical)
        physical = max(1, world.num_nodes // canonical)
        of_node = canonical * ceil(of_each / physical) * physical // world.num_nodes
        return ceil(of_node / world.ranks_per_node)

    def check_files(self) -> None:
        """Check that required local files exist; with `verify: full`, also check the hashes of local files.

        Raises:
            DataError: Files of a local dataset are missing or damaged. Bad copies of a remote dataset are
                fetched again when they are needed.
        """
        if self.verify == "full":
            self._check_hashes()
            return

        def look(shard_id: int) -> str | None:
            stream = self._stream_of(shard_id)
            entry = stream.stored(self.shards[shard_id])
            path = stream.folder / entry.basename
            problem = problem_of(path, vars(entry), None) if stream.is_only_copy else None
            return problem and f"{path} {problem}"

        with ThreadPoolExecutor() as pool:
            problems = [each for each in pool.map(look, range(len(self.shards))) if each]
        if problems:
            refuse(self.where, problems)

    def _check_hashes(self) -> None:
        """Check the hashes of all local files; those that are right are not checked again."""
        files = []
        for shard_id, shard in enumerate(self.shards):
            stream = self._stream_of(shard_id)
            entry = stream.stored(shard)
            if stream.is_only_copy or entry.basename in stream.here:
                files.append((shard_id, stream, entry))
        title = f"{self.where}: checking shards" if get_rank() == 0 else ""
        problems = problems_of(
            files, lambda file: file[1].problem(file[2]), lambda file: file[2].bytes, title=title
        )
        lost = [(file, why) for file, why in problems if file[1].is_only_copy]
        if lost:
            refuse(
                self.where, [f"{stream.folder / entry.basename} {why}" for (_, stream, entry), why in lost]
            )
        bad = {shard_id for (shard_id, _, _), _ in problems}
        good = [shard_id for shard_id, _, _ in files if shard_id not in bad]
        self._shard_states[good] = _ShardState.LOCAL

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Read one sample, after its shard has been fetched and checked."""
        shard_id, _ = self.spanner[sample_id]
        while self._shard_states[shard_id] != _ShardState.LOCAL:
            self.prepare_shard(shard_id)
        return super().get_item(sample_id, retry)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Like streaming's, but after a failure the waiting processes try the shard themselves."""
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
        """Keep a background error and stop the threads, so that iteration can raise it."""
        error = future.exception()
        if error is not None:
            self.background_error = error
            self._event.set()

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Like streaming's, plus the global batch size in samples."""
        return {**super().state_dict(num_samples, from_beginning), "global_batch_size": self._global_batch()}

    def load_state_dict(self, obj: Mapping[str, Any]) -> None:
        """Resume at the sample given by the state.

        Raises:
            DataError: The state is from another kind of loader, or from another batch size and the sample
                order of this `batching_method` depends on it.
        """
        if not isinstance(obj, Mapping) or not obj.keys() >= PLACE:
            raise DataError(
                f"{self.where}: another kind of loader saved the checkpoint's position in the data. Use that "
                "loader, or start a new run with only the weights: load_path and load_weights_only: true."
            )
        before = obj.get("global_batch_size", self._global_batch())
        if self.batching_method != "random" and before != self._global_batch():
            raise DataError(
                f"{self.where}.batching_method: with {self.batching_method} the order of samples depends on "
                f"the batch size, which was {before} and is {self._global_batch()}. Use {before}."
            )
        super().load_state_dict(dict(obj))
        # Every epoch's order depends on these, but streaming restores them only in the first epoch's workers.
        self.num_canonical_nodes, self.shuffle_seed = obj["num_canonical_nodes"], obj["shuffle_seed"]
        self.initial_physical_nodes = obj.get("initial_physical_nodes")

    def _resume(self, world: Any, epoch: int) -> tuple[int, int]:
        """Return which epoch to read and at which sample to start, like streaming's."""
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
        """Like streaming's, but retry a shard that another process failed to prepare."""
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
        """Like streaming's, but raise an error that an earlier epoch left in the background."""
        if self.background_error is not None:
            self._raise_background_error(self.background_error)
        yield from super().__iter__()

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        try:
            yield from super()._each_sample_id(it)
        finally:
            it.non_blocking_exit()  # else its threads poll until the process ends, if nobody reads the rest
        # If a background fetch fails, streaming just stops, which looks like the end of the epoch.
        if self.background_error is not None:
            self._raise_background_error(self.background_error)

    def _raise_background_error(self, error: BaseException) -> NoReturn:
        if isinstance(error, DataError):
            raise DataError(str(error)) from error
        raise DataError(f"{self.where}: a shard can't be read: {error}") from error

    def _evict_coldest_shard(self) -> None:
        """Like streaming's, but also evict shards cached before the run, and never a shard's only copy."""
        times = self._shard_access_times.numpy().copy()
        times[self._shard_states.numpy() == _ShardState.PREPARING] = NEVER
        for number, stream in enumerate(self.streams):
            if isinstance(stream, GuardedStream) and stream.is_only_copy:
                times[self.stream_per_shard == number] = NEVER
        coldest = int(times.argmin())
        if times[coldest] == NEVER:
            raise ValueError("cache_limit is too low: the cache has no shard that could be evicted.")
        self._evict_shard(coldest)
