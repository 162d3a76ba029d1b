"""Signals that ask a run to stop, which it does at the end of a batch.

These are SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is closed) and SIGUSR1 (which Slurm's `--signal`
usually names). Other signals that end a process by default end the run, which prints their name. If the
terminal is closed, the run prints nothing more, but still saves.

Python runs a signal handler in the main thread, and only between two of its instructions: not while that
thread waits in a collective for a rank that is gone. So we receive signals in a separate thread, which can
end the process whatever the main thread is doing. Before training begins there is nothing to save, and a
signal ends the process at once; during imports of libraries it does so without an exception, which would
cause an abort in the middle of their C++.

The launcher signals each rank, and a signal to the whole group arrives, too: all signals within a few seconds
of the first are one request. Child processes, such as the loader's workers, leave signals to their parent.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, TextIO

from mptfoundry.errors import RunStopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# These signals end a process by default, too.
DEADLY = (signal.SIGQUIT, signal.SIGUSR2, signal.SIGXCPU, signal.SIGALRM)
SECONDS_OF_ONE_REQUEST = 5.0
SECONDS_TO_END = 10.0

_listening = False


class StopSignals:
    """Listen for signals, as a context; only in the main thread, because Python allows no handlers elsewhere.

    Args:
        speaks: Print what a signal does; true on one rank only.
        failure: Returns the exit code of a failed rank, if any: then the signal comes from the launcher,
            which ends the other ranks, and is not a request to stop.

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
            self._before = {number: signal.signal(number, self._handle) for number in heeded()}
            self._before |= {number: signal.signal(number, _left_to_the_thread) for number in DEADLY}
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
        """Within this context a request only sets `requested`, which training reads.

        The run reports an error in this context even if signals arrive.
        """
        self._is_training = True
        try:
            yield
        except BaseException:
            self._is_failing = True
            raise
        self._is_training = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread: end whatever runs before training."""
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
        # select() fails on file numbers above 1023, in a process with many open files.
        poll = select.poll()
        poll.register(self._pipe[0], select.POLLIN)
        while True:
            waits_for_the_end = self._first_at is not None and not self._is_training
            if not poll.poll(SECONDS_TO_END * 1000 if waits_for_the_end else None):
                os._exit(RunStopped.exit_code)
            number = os.read(self._pipe[0], 1)[0]
            if number == 0:
                return
            if number in SIGNALS:
                self._arrived(signal.Signals(number))
            elif number in DEADLY:
                self._die_of(signal.Signals(number))

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
            self._say(f"{number.name} again: the run ends at once and continues from its newest checkpoint.")
            os._exit(RunStopped.exit_code)

    def _die_of(self, number: signal.Signals) -> None:
        asks = ", ".join(each.name for each in SIGNALS)
        _print(
            f"{number.name}: the run ends at once and continues from its newest checkpoint. To have it save "
            f"first, send one of {asks}."
        )
        os._exit(128 + number)

    def _say(self, text: str) -> None:
        if self._speaks:
            _print(text)


def heeded() -> list[signal.Signals]:
    """Return the signals that request a stop; without SIGHUP if it was ignored at start, as with `nohup`."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not is_ignored]


@contextmanager
def importing(numbers: Sequence[signal.Signals], said: str, exit_code: int) -> Iterator[None]:
    """A context for imports of heavy libraries: some signals end the process without an exception.

    The process prints `said`, with the signal's name for `{name}`. After the context the earlier handlers are
    back, whatever a library has set. Garbage is not looked for: what modules make stays, and going through it
    again and again would take 40 % of the time.
    """
    # macOS has no sigwaitinfo.
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "sigwaitinfo"):
        yield
        return
    is_over = threading.Event()

    def wait() -> None:
        came = signal.sigwaitinfo(numbers)
        if not (is_over.is_set() and came.si_pid == os.getpid()):
            if said:
                _print(said.format(name=signal.Signals(came.si_signo).name))
            os._exit(exit_code)

    before = {number: signal.getsignal(number) for number in numbers}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    thread = threading.Thread(target=wait, name="signals while importing", daemon=True)
    thread.start()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        is_over.set()
        signal.pthread_kill(thread.ident or 0, numbers[0])
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within this context, drop output to a closed terminal or pipe instead of raising an error."""
    out, errors = _Lasting(sys.stdout), _Lasting(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):  # type: ignore[type-var]
        yield


class _Lasting:
    """A stream that drops output when its terminal, pipe or disk is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._stream, name)
        return partial(self._unless_gone, attribute) if name in ("write", "flush") else attribute

    def _unless_gone(self, act: Callable[..., Any], *arguments: str) -> Any:
        try:
            return act(*arguments)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            return act(*arguments)


def _print(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: our thread only receives signals that have a handler."""


def _obey_the_parent_alone() -> None:
    """In a forked child, ignore signals to the whole group; only a signal from the parent ends the child."""
    if not _listening:
        return
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, *DEADLY):
        signal.signal(number, signal.SIG_DFL)
    # Blocked, because only sigwaitinfo tells who has sent a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_the_parents, args=(os.getppid(),), daemon=True).start()


def _wait_for_the_parents(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


os.register_at_fork(after_in_child=_obey_the_parent_alone)
