"""Process many units in parallel and in order, and resume after a kill.

A *unit* is a piece of the input, and a *result* is the output for one unit. A *sink* receives results in the
order of the units, so its output is the same bytes for any number of workers. While a job runs, its folder
has a *state*: how many units are in the sink, and what the sink needs to resume from there. Each state
replaces the previous one atomically, so the state on disk is always consistent.

A worker process does not import torch, and imports transformers only if its function has a tokenizer of that
library. It exits when its parent dies for any reason.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from mptfoundry.data.shards.writer import write_whole
from mptfoundry.errors import DataError

STATE = "state.json"
MOST_PROBLEMS_KEPT = 5
SMALLEST_PARALLEL_BYTES = 1 << 22
SHORTEST_PERIOD_SECONDS = 1.0
MOST_TIME_SAVING = 0.05

Unit = TypeVar("Unit")
Result = TypeVar("Result")
# Makes the function that processes a unit. Each worker gets a pickled copy of the maker, and calls it once.
Make = Callable[[], Callable[[Any], Any]]
# Processes units instead of local worker processes.
Engine = Callable[[Iterable[Any]], Iterator[Any]]


class Sink(Protocol):
    """Receives the results of a job.

    Attributes:
        tokens: Tokens received in this process.
    """

    tokens: int

    def add(self, result: Any) -> None:
        """Receive the result of the next unit; its `weight` is in bytes of input."""

    def state(self, units: int) -> dict[str, Any]:
        """Return a JSON-serializable state for `restore`, after `units` units. Files it names are on disk."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a state. Raises OSError, KeyError, TypeError or ValueError if it is damaged."""

    def finish(self) -> Any:
        """Finish the output."""


@dataclass
class Job:
    """A job and its progress.

    Attributes:
        folder: The folder for the state; it exists, and this process has locked it.
        title: Title of the progress bar.
        size: Bytes of all units.
        sink: Receives the results.
        identity: Saved in the state, so that callers can check what the state belongs to.
        units: Number of units in the sink.
        weight: Bytes of the units in the sink.
        seconds: Time spent on the job, over all runs.
        saved_units: Number of units in the state on disk.
    """

    folder: Path
    title: str
    size: int
    sink: Sink
    identity: Mapping[str, Any] = field(default_factory=dict)
    units: int = 0
    weight: int = 0
    seconds: float = 0.0
    saved_units: int = 0
    _saved_at: float = 0.0
    _period_seconds: float = SHORTEST_PERIOD_SECONDS

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a state that `read_state` returned. Raises the same errors as `Sink.restore`."""
        self.sink.restore(state)
        self.units, self.weight, self.seconds = state["units"], state["weight"], state["seconds"]
        self.saved_units = self.units

    def add(self, result: Any) -> None:
        """Pass the next unit's result to the sink, and save the state periodically."""
        self.sink.add(result)
        self.units += 1
        self.weight += result.weight
        if time.monotonic() - self._saved_at > self._period_seconds:
            self.save()

    def save(self) -> None:
        """Save the state, and schedule the next save so that saving takes only a small part of the time."""
        started_at = time.monotonic()
        done = {
            "identity": self.identity,
            "units": self.units,
            "weight": self.weight,
            "seconds": self.seconds,
        }
        state = {**done, **self.sink.state(self.units)}
        write_whole(self.folder / STATE, json.dumps(state, sort_keys=True).encode())
        self.saved_units = self.units
        self._saved_at = time.monotonic()
        self._period_seconds = max(SHORTEST_PERIOD_SECONDS, (self._saved_at - started_at) / MOST_TIME_SAVING)

    def close(self) -> None:
        """Remove the state, because the job is finished or undone."""
        (self.folder / STATE).unlink(missing_ok=True)


def run_job(
    job: Job,
    units: Iterable[Any],
    make: Make,
    *,
    workers: int | None = None,
    engine: Engine | None = None,
    progress: bool = True,
) -> Any:
    """Process the units that are not in the job's sink yet, and finish the sink.

    Args:
        job: A new or restored job.
        units: All units, in order.
        make: Returns the function that processes a unit; called once in each process.
        workers: Number of processes. By default one per CPU; small data uses only this process.
        engine: Processes the units instead of local worker processes.
        progress: Whether to show a progress bar.

    Returns:
        The result of the sink's `finish`.

    Raises:
        DataError: A unit raised it, or a worker died.
    """
    units = islice(units, job.units, None)
    is_small = job.size - job.weight < SMALLEST_PARALLEL_BYTES
    workers = 1 if is_small else workers or len(os.sched_getaffinity(0))
    if engine is not None:
        results = engine(units)
    else:
        results = map(make(), units) if workers == 1 else in_processes(units, make, workers)
    seconds_before, started_at = job.seconds, time.monotonic()
    with tqdm(
        total=job.size,
        initial=job.weight,
        desc=job.title,
        unit="B",
        unit_scale=True,
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        for result in results:
            job.add(result)
            seconds = max(time.monotonic() - started_at, 1e-9)
            job.seconds = seconds_before + seconds
            tokens = job.sink.tokens
            bar.set_postfix_str(f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update(result.weight)
    made = job.sink.finish()
    job.close()
    return made


def read_state(folder: Path) -> dict[str, Any] | None:
    """Read the state of an unfinished job; None if there is none.

    Raises:
        OSError, ValueError: The state is damaged.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return state


def in_processes(
    units: Iterable[Unit], make: Callable[[], Callable[[Unit], Result]], workers: int
) -> Iterator[Result]:
    """Process units in worker processes and yield results in the order of the units.

    Args:
        units: The units to process.
        make: Returns the function that processes a unit. It is pickled and called once in each process.
        workers: Number of processes.

    Raises:
        DataError: A worker raised it or died.
    """
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(make, os.getpid()),
    )
    running: deque[Future[Result]] = deque()
    try:
        for unit in units:
            running.append(pool.submit(_work_in_worker, unit))
            # A short queue keeps all workers busy; a longer one would only use memory.
            if len(running) >= 2 * workers + 2:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "A worker process died, most likely because memory ran out. "
            "The same command continues; use fewer workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: Callable[[Any], Any] | None = None


def _start_worker(make: Callable[[], Callable[[Any], Any]], parent: int) -> None:
    global _worker
    # Ctrl-C reaches the whole process group; the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    _worker = make()


def _end_with_parent(parent: int) -> None:
    """Exit if the parent dies. Otherwise workers wait forever on a pipe that they keep open themselves."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work_in_worker(unit: Any) -> Any:
    assert _worker is not None
    return _worker(unit)
