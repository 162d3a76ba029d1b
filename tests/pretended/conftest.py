"""Starts programs on a pretended GPU: the code path of CUDA, seen on a machine without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
# `make soak` looks at everything, `make test` at some of it, in a few seconds.
LOOKS_AT_ALL = os.environ.get("MPTFOUNDRY_SOAK") == "1"


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run a program of this folder with words; returns what its last line says as JSON."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs a C compiler (cc) and Linux, to pretend that there is a GPU")
    if torch.version.cuda is None:
        pytest.skip("the installed torch is a build for CPUs, which has no code path for CUDA to look at")
    stubs = tmp_path_factory.mktemp("pretended") / "stubs.so"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-w",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        str(stubs),
        str(HERE / "stubs.c"),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"LD_PRELOAD": str(stubs), "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}

    def run(program: str, *words: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(HERE / program), *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            cwd=stubs.parent,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
