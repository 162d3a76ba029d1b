"""Coordination between ranks: rank 0 decides for all, one process per node works while the others wait, and
every rank learns which ranks have failed or are silent.

Ranks report outside the collectives, through the rendezvous store and over a separate connection, so it works
while the main thread waits. Words: a *beat* is what a rank reports every few seconds: its batch, and where
its main thread is. A rank whose beats stop is lost; one that beats but is not in the collective where the
others wait is late.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from mptfoundry import errors
from mptfoundry.errors import DataError, MPTFoundryError, TrainingError

T = TypeVar("T")
FAILURE, BEAT, _HEARD = "mptfoundry/failure", "mptfoundry/beat", "mptfoundry/heard"
SECONDS_TO_WAIT_FOR_RANK_0 = 10.0
_SECONDS_TO_CONNECT = 10.0
_LONGEST_SECONDS_BETWEEN_BEATS = 5.0
# Messages of gloo, NCCL and the store when a collective fails or times out.
_COMMUNICATION = re.compile(r"gloo|NCCL|ProcessGroup|TCPStore|Connection (closed|reset|refused)|Broken pipe")
_LIBRARIES = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"])
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_WORDS = 30
# Every rank makes these calls in the same order, so all ranks have the same count.
_calls = count()
_COLLECTIVES = ("torch/distributed/", "torch/autograd/graph.py")


def rank() -> int:
    """Return this process's global rank."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return this process's rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def say(text: str) -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        print(text, flush=True)


def decided_by_rank_0(decide: Callable[[], T]) -> T | None:
    """Return rank 0's decision on all ranks, with a collective; an error of rank 0 is raised on all ranks."""
    return decide() if world_size() == 1 else _broadcast(decide)


def _broadcast(decide: Callable[[], T]) -> T | None:
    from composer.utils import dist

    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = decide()
        except MPTFoundryError as error:
            told[1] = error
    dist.broadcast_object_list(told)
    answer, raised = told
    if raised is not None:
        raise raised
    return answer


def ranks_that_differ(value: Any) -> list[int]:
    """Return the ranks whose value is not that of rank 0, on all ranks, with a collective."""
    if world_size() == 1:
        return []
    from composer.utils import dist

    values = dist.all_gather_object(value)
    return [number for number, each in enumerate(values) if each != values[0]]


def once_per_node(work: Callable[[], T], *, what: str, say: Callable[[str], None] = print) -> T:
    """Run `work` once per node while other ranks wait, without a timeout. All return its result, which JSON
    can hold, or raise its error.

    The first rank says with `say` which nodes still work, and on `what`.
    """
    return work() if world_size() == 1 else _once_on_each_node(work, what, say)


def _once_on_each_node(work: Callable[[], T], what: str, say: Callable[[str], None]) -> T:
    """Poll the store, outside of collectives: no backend timeout applies, and nobody continues early."""
    import torch
    from composer.utils import dist

    call = next(_calls)
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    per_node, node = dist.get_local_world_size(), dist.get_node_rank()
    keys = [f"mptfoundry/once/{call}/{number}" for number in range(world_size() // per_node)]
    if local_rank() == 0:
        try:
            store.set(keys[node], json.dumps({"result": work()}))
        except MPTFoundryError as error:
            store.set(keys[node], json.dumps({"error": str(error), "kind": type(error).__name__}))
        except BaseException as error:
            text = f"{what}: rank {rank()} failed ({type(error).__name__}: {error})."
            store.set(keys[node], json.dumps({"error": text, "kind": "DataError"}))
            raise
    spoke_at = time.monotonic()
    for number, key in enumerate(keys):
        while not store.check([key]):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            if rank() == 0 and time.monotonic() - spoke_at > SECONDS_BETWEEN_WORDS:
                spoke_at = time.monotonic()
                say(f"{what}: waiting for node {number}")
    answers = [json.loads(store.get(key)) for key in keys]
    for answer in answers:
        if "error" in answer:
            raise getattr(errors, answer["kind"], DataError)(answer["error"])
    return answers[node]["result"]


def connect() -> Any:
    """Connect to the store; None if this process is alone, hasn't met the others, or the store is gone."""
    return _connect() if _have_met() else None


def _connect() -> Any:
    with contextlib.suppress(RuntimeError, KeyError, OSError):
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # If nobody listens any more, torch would retry for a long time and print about it.
        socket.create_connection(place, timeout=_SECONDS_TO_CONNECT).close()
        store = sys.modules["torch"].distributed.TCPStore
        return store(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    return None


def _have_met() -> bool:
    """Whether this process is one of several that have met."""
    torch = sys.modules.get("torch")
    return world_size() > 1 and torch is not None and torch.distributed.is_initialized()


def announce_failure(store: Any, text: str, exit_code: int) -> None:
    """Tell the other ranks that this one ends with an error, and which; does nothing without a store."""
    if store is None:
        return
    _set(store, f"{FAILURE}/{rank()}", text)
    _set(store, f"{FAILURE}/code/{rank()}", str(exit_code))


def _set(store: Any, key: str, value: str = "") -> None:
    """Set a key, unless the store is gone."""
    with contextlib.suppress(RuntimeError):
        store.set(key, value)


def failure_text(store: Any, number: int) -> str | None:
    """Return the error that a rank has announced."""
    key = f"{FAILURE}/{number}"
    with contextlib.suppress(RuntimeError):
        return store.get(key).decode() if store.check([key]) else None
    return None


def report(error: MPTFoundryError) -> None:
    """Print an error once if all ranks share it, and with its rank if only one has it.

    A config is the same on every rank, so rank 0 speaks for all. Later errors are compared through the
    rendezvous store; an error of one machine from before the ranks met is printed on that machine.
    """
    lines = [f"error: {line}" for line in str(error).splitlines() if line.strip()]
    if world_size() == 1:
        print("\n".join(lines), file=sys.stderr)
        return
    store = connect()
    announce_failure(store, str(error), error.exit_code)
    speaks = (store is None and _have_met()) or error.of_this_machine
    is_silent = rank() != 0 and not speaks and (store is None or _all_report(store, str(error), [0]))
    if store is not None:
        _set(store, f"{_HEARD}/{rank()}")
    if is_silent:
        # Rank 0 prints it. The launcher ends all ranks after the first one exits: let that be rank 0.
        # Composer's handler of SIGTERM would not end the wait.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_TO_WAIT_FOR_RANK_0)
        return
    is_shared = rank() == 0 and (store is None or _all_report(store, str(error), range(world_size())))
    name = "" if is_shared else f"rank {rank()}: "
    print("\n".join(f"{name}{line}" for line in lines), file=sys.stderr, flush=True)
    if is_shared and store is not None:  # it may end with this process, and the others still read it
        _wait_for(store, [f"{_HEARD}/{each}" for each in range(1, world_size())])


def _all_report(store: Any, text: str, ranks: Iterable[int]) -> bool:
    has_all = _wait_for(store, [f"{FAILURE}/{each}" for each in ranks])
    return has_all and all(failure_text(store, each) == text for each in ranks)


def _wait_for(store: Any, keys: list[str]) -> bool:
    """Wait until the store has all keys; False if that takes too long, or if the store is gone."""
    until = time.monotonic() + SECONDS_TO_WAIT_FOR_RANK_0
    with contextlib.suppress(RuntimeError):
        while time.monotonic() < until:
            if store.check(keys):
                return True
            time.sleep(0.05)
    return False


class RankWatch:
    """Send this rank's beats, as a context, and tell which ranks are silent.

    Args:
        timeout: Seconds that a collective waits for all ranks.

    Attributes:
        batch: How many batches this rank has done.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.batch: Callable[[], int] = lambda: 0
        self._seconds = min(_LONGEST_SECONDS_BETWEEN_BEATS, timeout / 5)
        self._store: Any = None
        self._has_waited = False
        self._ended = threading.Event()

    def __enter__(self) -> RankWatch:
        if world_size() > 1:
            self._store = connect()
        if self._store is not None:
            threading.Thread(target=self._beat, name="beats", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()

    def failure(self) -> int | None:
        """Return the exit code of another rank that has announced an error; None if there is none."""
        if self._store is None:
            return None
        with contextlib.suppress(RuntimeError):
            for number in range(world_size()):
                key = f"{FAILURE}/code/{number}"
                if number != rank() and self._store.check([key]):
                    return int(self._store.get(key))
        return None

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the error of a collective that timed out into one that names the silent ranks."""
        try:
            yield
        except RuntimeError as error:
            if self._store is None or not _COMMUNICATION.search(str(error)):
                raise
            self._has_waited = True
            raise TrainingError(self.silent()) from error

    def silent(self) -> str:
        """Say which ranks did not arrive, and where they were last seen; takes two or three beats."""
        try:
            before = self._beats()
            time.sleep(2.5 * self._seconds)
            after = self._beats()
        except RuntimeError:
            return self._said_of([0])  # the store was on rank 0's machine
        lost = [each for each in after if before[each] == after[each]]
        late = [each for each in after if each not in lost and not after[each]["waits"]]
        if lost:
            return self._said_of(lost)
        if late:
            said = "; ".join(f"rank {each} did not arrive: it is in {_place(after[each])}" for each in late)
            return (
                f"{said}. The others have waited for {self.timeout:g} s. Look at its data and machine, or "
                "raise dist_timeout if it may take so long."
            )
        places = sorted({f"{_place(beat)}" for beat in after.values()})
        return (
            f"ranks wait for one another in {' and in '.join(places)}; what they compute must have differed."
        )

    def _said_of(self, lost: Iterable[int]) -> str:
        # Its last beat is older than its end, so we name the place where this rank misses it.
        said = "; ".join(f"rank {each} gives no sign of life in batch {self.batch() + 1}" for each in lost)
        return f"{said}. Its process or its machine has ended: look there. The same command continues."

    def _beats(self) -> dict[int, dict[str, Any]]:
        beats = {}
        for number in range(world_size()):
            key = f"{BEAT}/{number}"
            has_beat = self._store.check([key])
            beats[number] = json.loads(self._store.get(key)) if has_beat else {"batch": 0, "waits": False}
        return beats

    def _beat(self) -> None:
        count, stands_since, last, has_warned = 0, time.monotonic(), None, False
        with contextlib.suppress(RuntimeError):
            while not self._ended.is_set():
                frame = sys._current_frames().get(threading.main_thread().ident or 0)
                waits = self._has_waited or _waits(frame)
                beat: dict[str, Any] = {"batch": self.batch(), "where": _where(frame), "waits": waits}
                del frame
                count += 1
                self._store.set(f"{BEAT}/{rank()}", json.dumps({"count": count, **beat}))
                if beat != last:
                    last, stands_since = beat, time.monotonic()
                standing = time.monotonic() - stands_since
                if standing > self.timeout - 4 * self._seconds and not has_warned and _aborts():
                    has_warned = True
                    print(f"rank {rank()} waits: {self.silent()}", file=sys.stderr, flush=True)
                self._ended.wait(self._seconds)


def _aborts() -> bool:
    """Whether a collective that takes too long ends the process without an exception, as NCCL's do."""
    return sys.modules["torch"].distributed.get_backend() == "nccl"


def _place(beat: dict[str, Any]) -> str:
    return f"batch {beat['batch'] + 1} at {beat['where']}"


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _waits(frame: FrameType | None) -> bool:
    return any(part in each.f_code.co_filename for each in _frames(frame) for part in _COLLECTIVES)


def _where(frame: FrameType | None) -> str | None:
    """Return the innermost line outside of libraries, or else the innermost line of all."""
    own = (each for each in _frames(frame) if not each.f_code.co_filename.startswith(_LIBRARIES))
    shown = next(own, frame)
    if shown is None:
        return None
    place = Path(shown.f_code.co_filename)
    return f"{place.parent.name}/{place.name}:{shown.f_lineno}, {shown.f_code.co_name}"
