"""Work on units in several processes, with results in the order of the units.

A worker process imports neither torch nor transformers, and ends when its parent does, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mptfoundry.errors import DataError

MOST_PROBLEMS_KEPT = 5

Unit = TypeVar("Unit")
Result = TypeVar("Result")


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
            "A worker process died, most likely for want of memory. "
            "The same command with fewer workers goes on."
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
    """A killed parent leaves its workers waiting for ever on a pipe that they hold open themselves."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work_in_worker(unit: Any) -> Any:
    assert _worker is not None
    return _worker(unit)
