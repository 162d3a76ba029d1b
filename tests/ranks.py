"""Runs a script on several ranks, forked from a server that has imported torch and Composer once.

A launcher starts every rank as a new process, whose imports take ten seconds each. What a test of a launcher
itself holds needs the real one: see `launch` in conftest.py.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS_FOR_THE_OTHERS = 30
_CONTEXT = multiprocessing.get_context("forkserver")


def run_on_ranks(script: str | Path, *words: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run `script` with `words` as its arguments on each of `ranks` processes, in the repository's root.

    Gives the first exit code that is not 0, and what all ranks printed, each rank's after the other's.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = Ranks(Path(folder), script, *words, ranks=ranks)
        code = started.wait()
        return subprocess.CompletedProcess([str(script)], code, started.printed, "")


class Ranks:
    """Running ranks, each in a session of its own; `returncode` is None until all have ended.

    When one rank fails the others get SIGTERM and have 30 seconds to end, as under Composer's launcher.
    """

    def __init__(self, folder: Path, script: str | Path, *words: object, ranks: int = 2, **more: str) -> None:
        self.returncode: int | None = None
        self._logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        self._ended = threading.Event()
        self._processes = []
        _start_server()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        shared = {
            **os.environ,
            **more,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONUNBUFFERED": "1",
        }
        for rank, log in enumerate(self._logs):
            log.touch()
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (str(script), [str(word) for word in words], environment, str(log))
            self._processes.append(_CONTEXT.Process(target=_rank, args=arguments))
            self._processes[-1].start()
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def printed(self) -> str:
        """What all ranks have printed, each rank's after the other's."""
        return "".join(log.read_text(errors="replace") for log in self._logs)

    def poll(self) -> int | None:
        """The first exit code that is not 0, or 0, once all ranks have ended."""
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """The same, after waiting for it."""
        if not self._ended.wait(timeout):
            self.kill()
            raise TimeoutError(self.printed)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """Kill all ranks and their children at once, as a machine that loses its power does."""
        for process in self._processes:
            if process.pid is not None:
                for kill in (
                    os.killpg,
                    os.kill,
                ):  # a rank that has only just started is in no group of its own
                    with contextlib.suppress(ProcessLookupError):
                        kill(process.pid, signal.SIGKILL)
        self._ended.wait()

    def _watch(self) -> None:
        failed_at: float | None = None
        while any(process.is_alive() for process in self._processes):
            time.sleep(0.05)
            if failed_at is None and any(process.exitcode for process in self._processes):
                failed_at = time.monotonic()
                for process in self._processes:
                    process.terminate()
            if failed_at is not None and time.monotonic() - failed_at > SECONDS_FOR_THE_OTHERS:
                for process in self._processes:
                    process.kill()
        self.returncode = next((process.exitcode for process in self._processes if process.exitcode), 0)
        self._ended.set()


def _start_server() -> None:
    """Start the server if it doesn't run; its environment is that of its imports."""
    _CONTEXT.set_forkserver_preload(["tests.ranks_imports"])
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rank(script: str, words: list[str], environment: dict[str, str], log: str) -> None:
    """What the process of a rank does: become what `python script words` would be."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *words]
    sys.path[:0] = [str(Path(script).parent), str(ROOT)]
    code: object = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(bool(code)))
