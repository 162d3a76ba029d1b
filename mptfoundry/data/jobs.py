"""Work on many units: in several processes, in order, continued where a killed process stopped.

A *unit* is a piece of the input; what is made of it is its *result*. A *sink* takes in the results in the
order of the units, so that it makes the same bytes for any number of workers. While a job runs, its folder
holds a *state*: how many units are in the sink, and what the sink needs to continue from there. A state
replaces the one before in one move, so what is on disk is one moment of the job, whole.

A worker process imports neither torch nor transformers, and ends when its parent does, however that ends.
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
# Gives what works on a unit, in the process that calls it. It is sent to workers by pickle.
Make = Callable[[], Callable[[Any], Any]]
# Who works on units, in place of processes of this machine.
Engine = Callable[[Iterable[Any]], Iterator[Any]]


class Sink(Protocol):
    """What takes in the results of a job.

    Attributes:
        tokens: Tokens taken in by this process.
    """

    tokens: int

    def add(self, result: Any) -> None:
        """Take in the result of the next unit; it has a `weight` in bytes of input."""

    def state(self, units: int) -> dict[str, Any]:
        """What `restore` needs, as JSON has it, after so many units. All that it names is on disk by now."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Raises OSError, KeyError, TypeError or ValueError if that is damaged."""

    def finish(self) -> Any:
        """Complete what the sink makes."""


@dataclass
class Job:
    """One job as far as it is done.

    Attributes:
        folder: Holds the state; it exists, and this process holds its lock.
        title: Before the progress bar.
        size: Bytes of all units.
        sink: Takes in the results.
        identity: Kept in the state, for whoever compares it.
        units: How many units are in the sink.
        weight: Their bytes.
        seconds: Spent on them, by all processes.
        saved_units: How many units the state on disk holds.
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
        """Continue from a state, as `read_state` gave it. Raises as `Sink.restore` does."""
        self.sink.restore(state)
        self.units, self.weight, self.seconds = state["units"], state["weight"], state["seconds"]
        self.saved_units = self.units

    def add(self, result: Any) -> None:
        """Take in the result of the next unit, and save now and then."""
        self.sink.add(result)
        self.units += 1
        self.weight += result.weight
        if time.monotonic() - self._saved_at > self._period_seconds:
            self.save()

    def save(self) -> None:
        """Put this moment on disk; the next time so much later that saving takes little of the whole."""
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
        """Remove the state: the job is complete, or taken back."""
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
    """Work on the units that are not in the job's sink yet, and finish the sink.

    Args:
        job: New, or restored.
        units: All of them, in their order.
        make: Gives what works on a unit; called once in each process.
        workers: Processes. Default: one for each processor. Little data is worked on in this process.
        engine: Who works on the units in place of processes of this machine.
        progress: Show a progress bar.

    Returns:
        What the sink's `finish` gives.

    Raises:
        DataError: A unit's, or a worker died.
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
    """The state of a job that was not finished; None if there is none.

    Raises:
        OSError, ValueError: It is damaged.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return state


def in_processes(
    units: Iterable[Unit], make: Callable[[], Callable[[Unit], Result]], workers: int
) -> Iterator[Result]:
    """Work on units in worker processes; results in the units' order.

    Args:
        units: What to work on.
        make: Called once in each process, gives what works on a unit there. It is sent by pickle.
        workers: How many processes.

    Raises:
        DataError: A worker died, or raised it.
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
            # A few units more than workers keep them busy; more would only fill memory.
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
    # Ctrl-C reaches the whole group of processes; the parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    _worker = make()


def _end_with_parent(parent: int) -> None:
    """A killed parent leaves its workers waiting forever on a pipe that they hold open themselves."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work_in_worker(unit: Any) -> Any:
    assert _worker is not None
    return _worker(unit)
