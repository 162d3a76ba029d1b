"""However the processes of a run are started, by a launcher or by a scheduler, it is the same run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import losses_by_batch

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "Slurm stops a job",
        "SIGTERM to all its processes, 2 scripts",
        "saves, exits with 143, is queued again, continues",
    ),
]

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
# A machine has shared memory and temporary files of its own, by which streaming's processes on it meet.
MACHINE = """#!/bin/bash
exec unshare --map-root-user --mount bash -c '
  mount -t tmpfs none /dev/shm && mount -t tmpfs none /var/tmp && TMPDIR=/var/tmp exec "$@"' machine "$@"
"""
# Slurm's commands, for a cluster of such machines, one task on each.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=0 SLURM_NODEID=$rank machine "$@" &
  tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do
  wait "$task"
  code=$?
  worst=$((code > worst ? code : worst))
done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$2" >> "$REQUEUED"; fi
"""
SQUEUE = "#!/bin/bash\necho RUNNING\n"

# A third of a second a batch, so that there is time to stop it; in place of a callback with a known name.
SLOW = """
import time
from composer.core import Callback
from mptfoundry import plugins

class Slow(Callback):
    def batch_start(self, state, logger):
        time.sleep(0.3)

plugins.callbacks["lr_monitor"] = Slow
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two machines with a device each."""
    commands = tmp_path / "slurm"
    commands.mkdir()
    for name, text in {"machine": MACHINE, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(random.SystemRandom().randrange(10_000)), "SLURM_JOB_NODELIST": "node-[a-b]"}
    job |= {"SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "1"}
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    here = {"VENV": str(BIN.parent), "OMP_NUM_THREADS": "1", "REQUEUED": str(tmp_path / "requeued")}
    environment = {**os.environ, **job, **here, "PATH": path}
    if subprocess.run([commands / "machine", "true"], env=environment).returncode:
        pytest.skip("this machine lets nobody have shared memory of their own")
    return environment


@pytest.fixture
def start(slurm: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a command on the first machine; nothing of it outlives the test."""
    started: list[subprocess.Popen[bytes]] = []

    def popen(*words: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(words, cwd=ROOT, env=slurm, start_new_session=True))
        return started[-1]

    yield popen
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def torchrun(port: int, machines: int, processes: int) -> list[list[str]]:
    """The command of each machine."""
    where = [f"--nnodes={machines}", f"--nproc-per-node={processes}", "--master-addr=127.0.0.1"]
    return [
        [
            "machine",
            f"{BIN}/torchrun",
            *where,
            f"--master-port={port}",
            f"--node-rank={node}",
            "scripts/train.py",
        ]
        for node in range(machines)
    ]


def test_every_way_to_start_two_processes_gives_the_same_losses(
    tiny_run: Path,
    launch: Callable[..., Any],
    start: Callable[..., Any],
    tmp_path: Path,
    slurm: dict[str, str],
) -> None:
    launched = launch(tiny_run, "run_name=launched", ranks=2)
    assert launched.wait() == 0, launched.printed
    port = 30_000 + int(slurm["SLURM_JOB_ID"])
    ways = {
        "slurm": [["bash", "clusters/slurm.sbatch"]],
        "slurm-direct": [["bash", "clusters/slurm-direct.sbatch"]],
        "torchrun": torchrun(port, 1, 2),
        "torchrun-on-two": torchrun(port + 1, 2, 1),
    }
    for name, machines in ways.items():
        started = [start(*words, str(tiny_run), f"run_name={name}") for words in machines]
        assert [process.wait(timeout=240) for process in started] == [0] * len(started), name
        assert losses_by_batch(tmp_path / name) == losses_by_batch(tmp_path / "launched"), name
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm-direct.sbatch"])
def test_a_job_that_slurm_stops_is_queued_again_and_goes_on_as_if_nothing_had_happened(
    tiny_run: Path,
    launch: Callable[..., Any],
    start: Callable[..., Any],
    tmp_path: Path,
    slurm: dict[str, str],
    script: str,
) -> None:
    """Slurm signals every process of its steps at once: launchers, ranks and the loaders' workers."""
    (tmp_path / "slow.py").write_text(SLOW)
    words = [str(tiny_run), "run_name=stopped", "train_loader.num_workers=1"]
    slow = [f"code_paths=[{tmp_path}/slow.py]", "allow_code=true", "callbacks.lr_monitor={}"]
    command = ["bash", f"clusters/{script}", *words]
    job = start(*command, *slow)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    until = time.monotonic() + 240
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 4):
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    [srun] = psutil.Process(job.pid).children()
    for process in srun.children(recursive=True):
        process.terminate()
    assert job.wait(timeout=60) == 143
    assert (tmp_path / "requeued").read_text() == f"{slurm['SLURM_JOB_ID']}\n"
    done = losses_by_batch(tmp_path / "stopped")[-1][0]
    assert 4 <= done < 12 and (tmp_path / "stopped" / f"ep0-ba{done}-rank0.pt").is_file()
    assert start(*command).wait(timeout=240) == 0
    whole = launch(tiny_run, "run_name=whole", "train_loader.num_workers=1", ranks=2)
    assert whole.wait() == 0, whole.printed
    assert losses_by_batch(tmp_path / "stopped") == losses_by_batch(tmp_path / "whole")
