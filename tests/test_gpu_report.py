"""`make gpu`: a deadline that all steps share, results as they come, and steps that end as a whole."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import gpu
from gpu import STEPS, Step

H200 = ("-c", """print('{"device": "H200", "arch": 90, "torch": "2.14"}')""")
HANGS = """
import subprocess, sys, time
deaf = "import signal, time; signal.signal(15, lambda *_: 0); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf])
print('{"pid": %d}' % child.pid)
time.sleep(60)
"""


def step(name: str, code: str, at_most: float = 30) -> Step:
    return Step(name, ["-c", code], at_most, f"what {name} is for")


def report(tmp_path: Path, *steps: Step, seconds: float = 60) -> tuple[int, list[dict[str, Any]]]:
    out = tmp_path / "gpu.jsonl"
    code = gpu.main([f"seconds={seconds}", f"out={out}"], H200, steps)
    return code, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.3)
    monkeypatch.setattr(gpu, "SHORTEST", 0.5)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)


def test_every_result_says_what_it_was_compared_with(tmp_path: Path) -> None:
    own = """print('{"ms": 3, "compared_with": "a peer"}'); print("words"); print('{"ms": 4}')"""
    code, rows = report(tmp_path, step("first", own), step("second", "import nowhere"), step("third", ""))
    assert code == 1
    assert all(row["compared_with"] for row in rows)
    assert [(row["step"], row.get("ms"), row.get("result")) for row in rows] == [
        ("device", None, None),
        ("device", None, "ok"),
        ("first", 3, None),
        ("first", 4, None),
        ("first", None, "ok"),
        ("second", None, "failed"),
        ("third", None, "ok"),
    ]
    assert [row["compared_with"] for row in rows[2:4]] == ["a peer", "what first is for"]


def test_a_step_that_hangs_is_ended_with_its_children_and_keeps_its_results(tmp_path: Path) -> None:
    started_at = time.monotonic()
    code, rows = report(tmp_path, step("hangs", HANGS, at_most=2), step("next", "print('{}')"))
    assert code == 1 and time.monotonic() - started_at < 20
    pid = next(row["pid"] for row in rows if "pid" in row)
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert [row["result"] for row in rows if "result" in row] == ["ok", "out of time", "ok"]


def test_steps_share_one_deadline_and_the_last_ones_are_not_run(tmp_path: Path) -> None:
    started_at = time.monotonic()
    slow = [step(name, "import time; time.sleep(60)") for name in ("one", "two", "three")]
    code, rows = report(tmp_path, *slow, seconds=2.5)
    assert code == 1 and time.monotonic() - started_at < 15
    assert [row["result"] for row in rows if "result" in row] == ["ok", "out of time", "not run", "not run"]


def test_each_test_of_a_step_is_a_result(tmp_path: Path) -> None:
    said = (
        "print('tests/gpu/test_gpu.py::test_a[x y] PASSED [ 5%]')\n"
        "print('tests/gpu/test_gpu.py::test_b FAILED')\nprint('ERROR tests/gpu/test_c.py')"
    )
    _, rows = report(tmp_path, step("tests", said))
    assert [(row["test"], row["outcome"]) for row in rows if "test" in row] == [
        ("tests/gpu/test_gpu.py::test_a[x y]", "passed"),
        ("tests/gpu/test_gpu.py::test_b", "failed"),
        ("tests/gpu/test_c.py", "error"),
    ]


def test_without_a_gpu_nothing_is_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.jsonl"
    code = gpu.main([f"out={out}"], ("-c", "raise SystemExit('error: no GPU found here.')"), [step("x", "")])
    assert code == 1 and "no GPU found here" in capfd.readouterr().out
    assert "x" not in {json.loads(line)["step"] for line in out.read_text().splitlines()}


def test_the_steps_exist_and_the_important_ones_come_first() -> None:
    root = Path(gpu.__file__).parent.parent
    names = [each.name for each in STEPS]
    assert names[:6] == ["compile", "ceilings", "kernels", "7b step", "attention", "8k step"]
    for each in STEPS:
        file = next(word for word in each.command if word.endswith(".py"))
        assert (root / file).is_file() and os.path.commonpath([file, "scripts/x"]) in ("scripts", "")
        assert each.compared_with and each.at_most <= 540


def test_the_kernels_tests_need_no_composer() -> None:
    root = Path(gpu.__file__).parent.parent
    for name in ("tests/gpu/test_gpu_kernels.py", "tests/gpu/test_gpu.py", "tests/mpt/cases.py"):
        assert "composer" not in (root / name).read_text()
