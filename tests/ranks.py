"""Runs a script on several ranks, forked from a server that has imported torch and Composer once.

A launcher starts every rank as a new process, whose imports take ten seconds each. What a test of a launcher
itself holds needs the real one: see `launch` in conftest.py.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS_FOR_THE_OTHERS = 30
_CONTEXT = multiprocessing.get_context("forkserver")


def run_on_ranks(script: str | Path, *words: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run `script` with `words` as its arguments on each of `ranks` processes, in the repository's root.

    When one rank fails the others get SIGTERM and have 30 seconds to end, as under Composer's launcher. Gives
    the first exit code that is not 0, and what all ranks printed, each rank's after the other's.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = []
        _start_server()
        for rank, log in enumerate(logs):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (str(script), [str(word) for word in words], environment, str(log))
            processes.append(_CONTEXT.Process(target=_rank, args=arguments))
            processes[-1].start()
        code = _wait(processes)
        printed = "".join(log.read_text() for log in logs)
    return subprocess.CompletedProcess([str(script)], code, printed, "")


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


def _wait(processes: list[ForkServerProcess]) -> int:
    failed_at: float | None = None
    while any(process.is_alive() for process in processes):
        time.sleep(0.05)
        if failed_at is None and any(process.exitcode for process in processes):
            failed_at = time.monotonic()
            for process in processes:
                process.terminate()
        if failed_at is not None and time.monotonic() - failed_at > SECONDS_FOR_THE_OTHERS:
            for process in processes:
                process.kill()
    return next((process.exitcode for process in processes if process.exitcode), 0)


def _rank(script: str, words: list[str], environment: dict[str, str], log: str) -> None:
    """What the process of a rank does: become what `python script words` would be."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
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
