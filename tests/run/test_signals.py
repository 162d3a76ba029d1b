"""Each test has a process of its own: signals belong to a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from mptfoundry.run.signals import DEADLY, StopSignals

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("repeated signals; a later one while the process hangs", "4", "count as one request; ends at once"),
]

pytestmark = pytest.mark.serial

HEAD = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup, which ignores it
from mptfoundry.run import signals
from mptfoundry.errors import RunStopped
from mptfoundry.run.signals import DEADLY, StopSignals
signals.SECONDS_OF_ONE_REQUEST, signals.SECONDS_TO_END = 1.0, 1.0
"""
TRAINS = """
with StopSignals() as stop, stop.answered_by_training():
    print("ready", flush=True)
    until = time.monotonic() + 20
    while time.monotonic() < until and not stop.requested:
        time.sleep(0.01)
    {then}
"""

Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program that says when it is ready for signals."""
    started: list[subprocess.Popen[str]] = []

    def run(body: str) -> subprocess.Popen[str]:
        program = [sys.executable, "-c", HEAD + body]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(program, stdout=pipe, stderr=pipe, text=True, start_new_session=True))
        assert started[-1].stdout is not None and started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


# A closed terminal sends SIGHUP, and Slurm usually SIGUSR1.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_kept_for_the_training_to_answer(start: Start, number: int) -> None:
    process = start(TRAINS.format(then="print(stop.requested)"))
    process.send_signal(number)
    out, said = process.communicate(timeout=20)
    assert out == f"{signal.Signals(number).name}\n" and process.returncode == 0
    assert "the run saves at the end of this batch, and stops." in said


def test_signals_within_some_seconds_are_one_request(start: Start) -> None:
    process = start(TRAINS.format(then="time.sleep(0.5); print('saved')"))
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.communicate(timeout=10)[0] == "saved\n" and process.returncode == 0


def test_a_later_signal_ends_the_process_whatever_its_main_thread_does(start: Start) -> None:
    # A lock that is never released: the main thread runs no line of Python any more.
    process = start(
        TRAINS.format(then="import _thread; l = _thread.allocate_lock(); l.acquire(); l.acquire()")
    )
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=10)[1]
    assert process.returncode == 143 and "SIGTERM again: the run ends at once" in said


def test_before_training_a_signal_ends_the_run_cleanly(start: Start) -> None:
    process = start(
        """
try:
    with StopSignals():
        print("ready", flush=True)
        time.sleep(20)
except RunStopped as stopped:
    print(stopped)
    sys.exit(stopped.exit_code)
"""
    )
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[0].startswith("SIGTERM: stopped outside of training")
    assert process.returncode == 143


def test_a_start_that_waits_for_ever_is_ended_too(start: Start) -> None:
    process = start(
        """
import select
with StopSignals():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the main thread never learns of it
    print("ready", flush=True)
    time.sleep(20)
"""
    )
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143


def test_the_launchers_signal_after_the_failure_of_a_rank_is_no_request(start: Start) -> None:
    process = start(TRAINS.replace("StopSignals()", "StopSignals(failure=lambda: 2)").format(then="pass"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 2


def test_workers_leave_signals_to_their_parent_and_end_when_it_says_so(start: Start) -> None:
    process = start(
        """
import multiprocessing
def work():
    time.sleep(20)
with StopSignals() as stop, stop.answered_by_training():
    workers = [multiprocessing.get_context("fork").Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    time.sleep(0.3)
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    time.sleep(0.3)
    print(all(worker.is_alive() for worker in workers))
    for worker in workers:
        worker.terminate()
        worker.join(5)
    print([worker.exitcode for worker in workers])
"""
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        os.killpg(process.pid, number)
    assert process.communicate(timeout=10)[0] == "True\n[0, 0]\n"


def test_afterwards_signals_are_what_they_were() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop._handle
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_run_that_was_started_with_nohup_ignores_a_closed_terminal(start: Start) -> None:
    process = start(
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + TRAINS.format(then="print(stop.requested)")
    )
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "SIGTERM\n"


@pytest.mark.parametrize("number", DEADLY)
def test_another_signal_that_ends_a_process_is_named(start: Start, number: int) -> None:
    process = start(TRAINS.format(then="pass"))
    process.send_signal(number)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + number
    assert said.startswith(
        f"{signal.Signals(number).name}: the run ends at once and continues from its newest"
    )
    assert "SIGTERM, SIGINT, SIGHUP, SIGUSR1" in said


def test_workers_leave_the_signals_of_a_whole_group_to_their_parent(start: Start) -> None:
    process = start(
        """
with StopSignals() as stop, stop.answered_by_training():
    worker = os.fork()
    if worker == 0:
        time.sleep(20)
        os._exit(0)
    time.sleep(0.3)
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    time.sleep(0.3)
    print(os.waitpid(worker, os.WNOHANG))
    os.kill(worker, signal.SIGKILL)
"""
    )
    for number in (signal.SIGUSR1, signal.SIGHUP):
        os.killpg(process.pid, number)
    assert process.communicate(timeout=20)[0] == "(0, 0)\n"


IMPORTS = """
from mptfoundry.run.signals import SIGNALS, importing
def of_a_library(number, frame):
    sys.exit(3)
def ours(number, frame):
    print("ours")
    sys.exit(4)
signal.signal(signal.SIGINT, ours)
with importing(SIGNALS, "{name}: stopped", 9):
    signal.signal(signal.SIGINT, of_a_library)
    if %r:
        print("ready", flush=True)
        time.sleep(20)
print("ready", flush=True)
time.sleep(20)
"""


def test_a_signal_while_libraries_are_imported_ends_the_process_without_an_exception(start: Start) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process = start(IMPORTS % True)
        process.send_signal(number)
        assert process.communicate(timeout=20) == ("", f"{signal.Signals(number).name}: stopped\n")
        assert process.returncode == 9


def test_after_imports_a_signal_is_handled_as_before_them_whatever_a_library_has_set(start: Start) -> None:
    process = start(IMPORTS % False)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "ours\n" and process.returncode == 4


def test_garbage_is_not_collected_during_imports_and_what_they_made_is_left_out_afterwards() -> None:
    program = """
import gc
from mptfoundry.run.signals import SIGNALS, importing
try:
    with importing(SIGNALS, "", 9):
        during, made = gc.isenabled(), [[]]
        raise ImportError
except ImportError:
    after = gc.isenabled()
print(during, after, any(each is made for each in gc.get_objects()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False True False\n"


def test_output_falls_silent_when_its_reader_is_gone() -> None:
    program = """
import sys
from mptfoundry.run.signals import lasting_output
with lasting_output():
    sys.stdin.read()
    for _ in range(3):
        print("x" * 100_000, flush=True)
        print("y", file=sys.stderr, flush=True)
sys.exit(5)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        for end in (process.stdout, process.stderr, process.stdin):
            assert end is not None
            end.close()
        assert process.wait(20) == 5


def test_a_process_with_many_open_files_hears_signals() -> None:
    """select() refuses file numbers above 1023."""
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with StopSignals(speaks=False) as stop, stop.answered_by_training():
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 30
            while stop.requested is None and time.monotonic() < deadline:
                time.sleep(0.01)
        assert stop.requested == "SIGTERM"
    finally:
        for number in opened:
            os.close(number)
