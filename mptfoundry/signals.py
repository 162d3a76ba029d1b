"""SIGTERM and SIGINT are requests to stop, which a run answers at the end of a batch.

Python runs a signal's handler in the main thread, and only between two of its instructions: not while that
thread waits in a collective for a rank that is gone. So a thread of its own takes note of signals here, and
can end the process whatever the main thread is doing. Before training begins there is nothing to save, and a
signal ends the process at once.

The launcher signals each rank, and a signal to the whole group arrives, too: all within a few seconds of the
first are one request. Child processes, such as the loader's workers, leave signals to their parent.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mptfoundry.errors import RunStopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS_OF_ONE_REQUEST = 5.0
SECONDS_TO_END = 10.0

_listening = False


class StopSignals:
    """Listens, as a context, from the main thread; in another thread, where Python allows no handlers, not.

    Args:
        speaks: Print what a signal does; on one rank of all.
        failure: The exit code of a rank that has failed, if one has: then a signal is the launcher's, which
            ends the others, and no request.

    Attributes:
        requested: The signal's name, once one has come.
    """

    def __init__(self, *, speaks: bool = True, failure: Callable[[], int | None] = lambda: None) -> None:
        self.requested: str | None = None
        self._speaks = speaks
        self._failure = failure
        self._is_training = self._is_failing = False
        self._first_at: float | None = None
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> StopSignals:
        global _listening
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
            _listening = True
        return self

    def __exit__(self, *_: Any) -> None:
        global _listening
        if self._pipe is None:
            return
        _listening = False
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)

    @contextmanager
    def answered_by_training(self) -> Iterator[None]:
        """While this lasts, a request is kept for whoever looks at `requested`.

        Where it ends with an error, that is what is reported, whatever signals come.
        """
        self._is_training = True
        try:
            yield
        except BaseException:
            self._is_failing = True
            raise
        self._is_training = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The main thread's part: leave whatever comes before training."""
        if self._is_training:
            return
        code = self._failure()
        if code is not None:
            raise SystemExit(code)
        raise RunStopped(
            f"{signal.Signals(number).name}: stopped outside of training; nothing had to be saved."
        )

    def _listen(self) -> None:
        assert self._pipe is not None
        while True:
            waits_for_the_end = self._first_at is not None and not self._is_training
            if not select.select([self._pipe[0]], [], [], SECONDS_TO_END if waits_for_the_end else None)[0]:
                os._exit(RunStopped.exit_code)
            number = os.read(self._pipe[0], 1)[0]
            if number == 0:
                return
            if number in SIGNALS:
                self._arrived(signal.Signals(number))

    def _arrived(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            code = self._failure()
            if code is not None:
                os._exit(code)
            self.requested = number.name
            if self._is_training and not self._is_failing:
                self._say(
                    f"{number.name}: the run saves at the end of this batch, and stops. Another signal after "
                    f"{SECONDS_OF_ONE_REQUEST:g} s ends it at once."
                )
        elif now - self._first_at > SECONDS_OF_ONE_REQUEST:
            self._say(f"{number.name} again: the run ends at once, and goes on from its newest checkpoint.")
            os._exit(RunStopped.exit_code)

    def _say(self, text: str) -> None:
        if self._speaks:
            print(text, file=sys.stderr, flush=True)


def _obey_the_parent_alone() -> None:
    """In a forked child: signals to the whole group are its parent's; what the parent sends it ends it."""
    if not _listening:
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Blocked, since only who waits for a signal learns who has sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_the_parents, args=(os.getppid(),), daemon=True).start()


def _wait_for_the_parents(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


os.register_at_fork(after_in_child=_obey_the_parent_alone)
