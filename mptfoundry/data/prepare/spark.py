"""Encode units on the machines of a Spark cluster, with results in the order of the units.

The driver, which is this process, cuts the inputs into units and joins what they give, just as without Spark:
so the shards are the same bytes, and a killed preparation continues with either engine. (Streaming has
a converter for Spark, too. There each task writes shards of its own, whose borders fall where Spark cuts the
data, and what is left over at each border is lost.) Every machine has to see the inputs under the same paths,
and to have the same version of this package and of the tokenizers library.
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

# A job's results come to the driver at once: some 64 MB.
MOST_UNITS_OF_A_JOB = 64
JOBS_AT_ONCE = 3


def encode_on_spark(units: Iterable[Unit], plan: EncodingPlan) -> Iterator[UnitResult]:
    """Encode units on a cluster, which is that of the running session, of `spark-submit --master`, or of
    Spark's configuration; without one, on this machine's processors.

    Args:
        units: What to read.
        plan: How to encode it.

    Raises:
        DataError: Spark can't be started, a machine lacks something, or a unit can't be read.
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
    """Run groups of units, a few at a time, so that no machine waits for the driver."""
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
    """Spark's context, and what ends the session if it is ours."""
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
    """What a unit gives, or the error that ends the preparation; the encoder is kept from unit to unit."""
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
