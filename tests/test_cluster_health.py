"""The check of a cluster: a slow rank and a slow machine are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mptfoundry.cluster_health import Health, describe, slow_ones
from tests.ranks import run_on_ranks

GOOD = Health("node-a", "NVIDIA H100 80GB HBM3", 700.0, 360.0, 300.0)
SLOWED = """\
import sys, time
import mptfoundry.cluster_health as health
from mptfoundry.cli import main
from mptfoundry.ranks import rank

plain = health.multiply

def slowed(left, right):
    if rank() == int(sys.argv[1]):
        time.sleep(0.3)
    return plain(left, right)

health.multiply = slowed
sys.exit(main(["doctor", "cluster=true"]))
"""


def test_ranks_and_machines_that_are_much_slower_are_named() -> None:
    other = replace(GOOD, host="node-b")
    assert slow_ones([GOOD, GOOD, other, other]) == []
    [line] = slow_ones([GOOD, GOOD, other, replace(other, tflops=500.0)])
    assert line.startswith("rank 3 on node-b is slow: 500 TFLOP/s, where the median is 700.")
    slow = replace(other, machine_gbs=100.0)
    [line] = slow_ones([GOOD, GOOD, slow, slow])
    assert line.startswith(
        "node-b communicates slowly: 100 GB/s within the machine, where the median is 360."
    )
    assert "all-reduce over all 2 ranks: 300 GB/s" in describe([GOOD, GOOD])


def test_of_two_ranks_the_slowed_one_is_named(tmp_path: Path) -> None:
    script = tmp_path / "slowed.py"
    script.write_text(SLOWED)
    done = run_on_ranks(script, 1)
    assert done.returncode == 1
    assert "rank 1 on " in done.stdout and "is slow" in done.stdout and "rank 0 on " not in done.stdout
    assert "all-reduce over all 2 ranks: " in done.stdout
