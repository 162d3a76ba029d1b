"""Encode units on a Spark cluster, with results in the order of the units.

This process is the driver. It splits the inputs into units and joins the results, the same as without Spark,
so the shards are the same bytes, and a killed preparation resumes with either engine. (Streaming also has a
Spark converter, but there each task writes its own shards and drops the tokens left over at the end of its
data.) Every machine needs the inputs at the same paths, and the same versions of this package and of the
tokenizers library.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers

from mptfoundry import __version__
from mptfoundry.data.prepare.work import EncodingPlan, UnitEncoder, UnitResult
from mptfoundry.data.records.records import Unit
from mptfoundry.errors import DataError

# The driver gets all results of a job at once, about 64 MB.
MOST_UNITS_OF_A_JOB = 64
JOBS_AT_ONCE = 3


def encode_on_spark(units: Iterable[Unit], plan: EncodingPlan) -> Iterator[UnitResult]:
    """Encode units on a Spark cluster.

    The cluster is that of the running session, of `spark-submit --master`, or of Spark's configuration. If
    there is none, Spark uses this machine's CPUs.

    Args:
        units: The units to read.
        plan: How to encode them.

    Raises:
        DataError: Spark can't be started, a machine lacks a file or version, or a unit can't be read.
    """
    context, end = _start()
    try:
        shared = context.broadcast((plan, _versions()))
        encode = partial(_encode_on_executor, shared)
        size = max(1, min(context.defaultParallelism, MOST_UNITS_OF_A_JOB))

        def run(group: Sequence[Unit]) -> list[UnitResult | DataError]:
            return context.parallelize(group, len(group)).map(encode).collect()

        yield from _in_order(iter(units), run, size)
    finally:
        context.cancelAllJobs()
        end()


def _in_order(
    units: Iterator[Unit], run: Callable[[Sequence[Unit]], list[UnitResult | DataError]], size: int
) -> Iterator[UnitResult]:
    """Run a few groups of units at a time, so that machines don't wait for the driver."""
    running: deque[Future[list[UnitResult | DataError]]] = deque()
    pool = ThreadPoolExecutor(JOBS_AT_ONCE)
    try:
        while True:
            while len(running) < JOBS_AT_ONCE and (group := list(islice(units, size))):
                running.append(pool.submit(run, group))
            if not running:
                return
            try:
                results = running.popleft().result()
            except Exception as error:
                raise DataError(f"engine: spark: a task failed: {_last_line(error)}") from error
            for result in results:
                if isinstance(result, DataError):
                    raise result
                yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start() -> tuple[Any, Callable[[], None]]:
    """Return Spark's context, and a function that stops the session if we started it."""
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise DataError(
            "engine: spark needs the package pyspark. Install it (pip install 'mptfoundry[spark]'), or use "
            "engine=local."
        ) from error
    running = SparkSession.getActiveSession()
    try:
        session = running or SparkSession.builder.appName("mptfoundry prepare").getOrCreate()
    except Exception as error:
        raise DataError(
            f"engine: spark can't be started: {_last_line(error)} It needs Java, and a master that answers."
        ) from error
    session.sparkContext.setLogLevel("ERROR")
    return session.sparkContext, (lambda: None) if running else session.stop


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _versions() -> str:
    return f"mptfoundry {__version__} and tokenizers {tokenizers.__version__}"


_encoder: UnitEncoder | None = None


def _encode_on_executor(shared: Any, unit: Unit) -> UnitResult | DataError:
    """Encode a unit, or return the error that stops the preparation. The encoder is reused between units."""
    global _encoder
    plan, versions = shared.value
    if versions != _versions():
        return DataError(f"engine: spark: {socket.gethostname()} has {_versions()}; here is {versions}.")
    for part in unit.parts:
        is_file = isinstance(part.source, str) and part.kind not in ("line_bytes", "bad")
        if is_file and not Path(str(part.source)).exists():
            return DataError(
                f"{part.source}: {socket.gethostname()}, a machine of the Spark cluster, has no such file. "
                "Put the inputs where every machine sees them under the same path."
            )
    if _encoder is None or _encoder.plan is not plan:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _encoder = UnitEncoder(plan)
    try:
        return _encoder.encode(unit)
    except DataError as error:
        return error
