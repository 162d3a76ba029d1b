"""Start programs on the pretended GPU: the code path of CUDA on a machine without one."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def why_not() -> str | None:
    """Why no program can be started here; None if one can."""
    import torch

    if sys.platform != "linux" or _compiler() is None:
        return "needs a C compiler (cc) and Linux, to pretend that there is a GPU"
    if torch.version.cuda is None:
        return "the installed torch is a build for CPUs, which has no code path for CUDA to look at"
    return None


def run_program(folder: Path, program: str, *words: str) -> Any:
    """Run a program of this folder with words; returns what its last line says as JSON.

    Args:
        folder: For the compiled stubs, and what the program prints; later calls use it again.
        program: Such as `memory.py`.
        words: Its command line.
    """
    server, output = _server(folder), folder / f"{program}.txt"
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([str(HERE / program), words, str(output)]) + "\n")
    server.stdin.flush()
    code = server.stdout.readline()
    printed = output.read_text() if output.exists() else ""
    output.unlink(missing_ok=True)
    assert code == "0\n", printed[-4000:]
    return json.loads(printed.splitlines()[-1])


@functools.cache
def _server(folder: Path) -> subprocess.Popen[str]:
    """The process that the programs are forked from. It ends with this one, which closes its input."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "LD_PRELOAD": str(_stubs(folder)),
        "PYTHONPATH": str(HERE.parents[1]),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # nothing is compiled, so no pool of compilers is started
    }
    command = [sys.executable, "-W", "ignore", str(HERE / "server.py")]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=folder, stdin=pipe, stdout=pipe, text=True)


def _stubs(folder: Path) -> Path:
    stubs = folder / "stubs.so"
    if not stubs.exists():
        options = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
        command = [str(_compiler()), *options, "-o", str(stubs), str(HERE / "stubs.c")]
        subprocess.run(command, check=True, capture_output=True, text=True)
    return stubs


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
