"""Run everything that needs a GPU with one command: `make gpu`.

    python scripts/gpu.py [seconds=540] [out=gpu.jsonl] [steps=ceilings,kernels,...]

The steps share one deadline of `seconds`, and the most important come first; a step for which no time is left
is reported as not run. Every result is written to `out` as soon as it is known, one JSON object a line, with
its step and what it was compared with. A step is a process group of its own, which is ended as a whole. The
steps: device, compile (kernels, on all cores), ceilings, kernels (against the formula, head_dim 64 and 128),
7b step, attention (against its peers), 8k step, 65k step, kernel tests, 125m step, composer tests.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Seconds that a group has to end after SIGTERM, and the least time in which a step is worth starting.
GRACE, SHORTEST = 3.0, 5.0

DEVICE = """
import json, torch
from mptfoundry.mpt.attention_tiles import generation_of
if not torch.cuda.is_available():
    raise SystemExit("error: no GPU found here. Run this on a machine with one.")
capability = torch.cuda.get_device_capability()
print(json.dumps({
    "device": torch.cuda.get_device_name(), "capability": capability, "torch": torch.__version__,
    "cuda": torch.version.cuda, "arch": int(generation_of(capability).removeprefix("sm_")),
}))
"""
# What the first steps launch, and what the tests launch.
FIRST_KERNELS = (
    "arch={arch} dtype=bfloat16 group=1 head_dim=64,128 "
    "features=causal,alibi,alibi+unskipped,alibi+documents,alibi+documents+unskipped"
)
OTHER_KERNELS = (
    "arch={arch} dtype=bfloat16 group=1 features=alibi+documents "
    "and arch={arch} dtype=bfloat16 group=1 head_dim=128 features=alibi+window,alibi+softcap,alibi+prefix "
    "and arch={arch} dtype=bfloat16 group=4 head_dim=128 "
    "features=alibi+documents,alibi+documents+window+prefix+softcap "
    "and arch={arch} dtype=float16,float32 group=1 head_dim=64,128 features=alibi+documents"
)
EIGHT_ROWS = "global_train_batch_size=8 device_train_microbatch_size=8 repeats=3"
LONG = "max_seq_len={0} batch={1} steps=2 fsdp_config.activation_checkpointing=true"
# One process for each file of tests, so that an import error loses no other file's tests.
PYTEST = "-m pytest -v -p no:cacheprovider --tb=short --continue-on-collection-errors"


@dataclass(frozen=True)
class Step:
    """A part of the report.

    Attributes:
        name: Its name in the results.
        command: Words after `python`; `{arch}` is the GPU's architecture, such as 90.
        at_most: Seconds that it may take, if the deadline leaves so many.
        compared_with: What its results are compared with, where they don't say it themselves.
    """

    name: str
    command: list[str]
    at_most: float
    compared_with: str


def script(name: str, words: str) -> list[str]:
    return [f"scripts/{name}", *words.split(), "lines=true"]


TESTS = "the plain formula in the same dtype: at most twice as far from float64 as that"
PEAK = "the device's dense bf16 peak, and the bare replay of the step's matrix products (ceilings)"
STEPS = [
    Step(
        "compile", script("compile_kernels.py", FIRST_KERNELS), 100, "limits of registers, spills and memory"
    ),
    Step(
        "ceilings", script("bench_ceilings.py", "config=configs/mpt-7b.yaml batch=8"), 40, "the vendor's peak"
    ),
    Step("kernels", script("bench_attention.py", "check=true head_dim=128,64 seq=2048"), 60, TESTS),
    Step("7b step", script("bench_train.py", f"configs/mpt-7b.yaml {EIGHT_ROWS} out=7b.json"), 150, PEAK),
    Step("attention", script("bench_attention.py", "seconds=100"), 120, "the first contestant of its case"),
    Step("8k step", script("bench_step.py", f"config=configs/mpt-7b.yaml {LONG.format(8192, 2)}"), 60, PEAK),
    Step(
        "65k step", script("bench_step.py", f"config=configs/mpt-7b.yaml {LONG.format(65536, 1)}"), 90, PEAK
    ),
    Step(
        "compile the rest", script("compile_kernels.py", OTHER_KERNELS), 100, "limits of registers and memory"
    ),
    Step("kernel tests", [*PYTEST.split(), "tests/gpu/test_gpu_kernels.py"], 240, TESTS),
    Step("network tests", [*PYTEST.split(), "tests/gpu/test_gpu.py"], 120, TESTS),
    Step("125m step", script("bench_step.py", "config=configs/mpt-125m.yaml batch=8"), 60, PEAK),
    Step("start tests", [*PYTEST.split(), "tests/gpu/test_gpu_pretrained.py"], 120, "the same run unsharded"),
    Step(
        "sharding tests", [*PYTEST.split(), "tests/gpu/test_gpu_sharding.py"], 120, "the same run unsharded"
    ),
]
_TEST = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b|^(ERROR) (tests/\S+)")
Write = Callable[..., None]


def main(words: list[str], device: Iterable[str] = ("-c", DEVICE), steps: Iterable[Step] = STEPS) -> int:
    options = dict(word.split("=", 1) for word in words)
    seconds = float(options.get("seconds", "540"))
    out = Path(options.get("out", "gpu.jsonl"))
    chosen = options["steps"].split(",") if "steps" in options else None
    started_at = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the step that runs, too
    with out.open("w", encoding="utf-8") as file:

        def write(**row: Any) -> None:
            row = {"at": round(time.monotonic() - started_at, 1), **row}
            file.write(json.dumps(row) + "\n")
            file.flush()

        found: dict[str, Any] = {}

        def note(**row: Any) -> None:
            found.update(row)
            write(**row)

        first = Step("device", list(device), 60, "nothing")
        if run(first, started_at + seconds, found, note) != 0:
            return 1
        results = {}
        for step in steps:
            if chosen is None or step.name in chosen:
                results[step.name] = run(step, started_at + seconds, found, write)
    print(f"\n{found.get('device')}, torch {found.get('torch')}; results in {out}")
    for name, result in results.items():
        shown = result if isinstance(result, str) else "ok" if result == 0 else f"failed ({result})"
        print(f"  {name:18} {shown}")
    return 0 if all(result == 0 for result in results.values()) else 1


def run(step: Step, deadline: float, found: dict[str, Any], write: Write) -> int | str:
    """Run a step until its end or the deadline; returns its exit code, or in words why it has none."""
    left = min(step.at_most, deadline - time.monotonic() - GRACE)
    if left < SHORTEST:
        write(step=step.name, result="not run", reason="no time left", compared_with=step.compared_with)
        return "not run: no time left"
    command = [sys.executable, *(word.replace("{arch}", str(found.get("arch"))) for word in step.command)]
    print(f"\n== {step.name}, at most {left:.0f} s: {' '.join(command)[:300]}", flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    out_of_time = threading.Event()

    def stop() -> None:
        out_of_time.set()
        end(process)

    timer = threading.Timer(left, stop)
    timer.start()
    try:
        for line in process.stdout or ():
            row = row_of(line)
            if row is None:
                print(line, end="", flush=True)
            else:
                write(step=step.name, **{"compared_with": step.compared_with, **row})
        exit_code = process.wait()
    finally:
        timer.cancel()
        end(process)
    result = "out of time" if out_of_time.is_set() else "ok" if exit_code == 0 else "failed"
    write(step=step.name, result=result, exit_code=exit_code, compared_with=step.compared_with)
    return result if result == "out of time" else exit_code


def row_of(line: str) -> dict[str, Any] | None:
    """A result that a line of a step's output holds: a JSON object, or pytest's word about a test."""
    if line.startswith("{"):
        try:
            return json.loads(line)
        except ValueError:
            return None
    if match := _TEST.match(line):
        test, outcome, error, file = match.groups()
        print(line, end="", flush=True)
        return {"test": test or file, "outcome": (outcome or error).lower()}
    return None


def end(process: subprocess.Popen[str]) -> None:
    """End a step's whole process group: first politely, then not."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except (ProcessLookupError, PermissionError):
            return
        until = time.monotonic() + GRACE
        while kind == signal.SIGTERM and time.monotonic() < until and _lives(process.pid):
            process.poll()
            time.sleep(0.05)


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
