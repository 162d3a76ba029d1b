"""Numbers of shared memory, beside those that other runs take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from streaming.base.constant import LOCALS, RESUME, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _get_path
from streaming.base.world import World

from mptfoundry.data.text import shared_names
from mptfoundry.data.text.shared_names import take_number
from tests.ranks import run_on_ranks

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "two runs start at the same moment",
        "one takes the other's number in shared memory",
        "the other takes the next number",
    ),
    (
        "a data set that is being freed still has its position in shared memory",
        "when the next one takes its number",
        "the next one takes another number, and starts at its own place",
    ),
]

pytestmark = pytest.mark.serial


def test_a_number_that_another_run_takes_meanwhile_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    others = []
    look = shared_names._check_and_find_retrying

    def look_and_be_late(local: Any, remote: Any, name: str, retry: int) -> int:
        number = look(local, remote, name, retry)
        if name == SHM_TO_CLEAN[-1]:
            free = look(local, remote, LOCALS, retry)
            others.extend(SharedMemory(_get_path(free + i, LOCALS), True, 8) for i in range(2))
        return number

    monkeypatch.setattr(shared_names, "_check_and_find_retrying", look_and_be_late)
    number, taken = take_number(["/a"], [None], World.detect())
    names = [shared.shm.name for shared in (*others, taken)]
    for shared in (*others, taken):
        shared.cleanup()
    assert len(set(names)) == 3
    assert _get_path(number, LOCALS) == names[-1]


def test_a_number_of_which_a_name_is_left_is_passed_over() -> None:
    """A run that resumed leaves its position under a name that hardly any other number has."""
    _, running = take_number(["/a"], [None], World.detect())
    number, ended = take_number(["/b"], [None], World.detect())
    ended.cleanup()
    left = SharedMemory(_get_path(number, RESUME), True, 8)
    try:
        other, taken = take_number(["/b"], [None], World.detect())
        taken.cleanup()
    finally:
        left.cleanup()
        running.cleanup()
    assert other > number


LATE_RANK = """
import sys, time
from composer.utils import dist
from streaming.base.world import World
from mptfoundry.data.text.shared_names import take_number
dist.initialize_dist("cpu")
if dist.get_global_rank() == 1:
    time.sleep(2)  # longer than streaming looks again
number, shared = take_number([sys.argv[1]], ["/remote"], World.detect(), retry=10)
dist.barrier()
try:
    take_number([sys.argv[1]], ["/remote"], World.detect(), retry=10)
except ValueError as error:
    print("refused:", str(error).split(":")[0])
dist.barrier()
"""


def test_a_rank_that_comes_late_takes_its_own_runs_name_for_no_other(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE_RANK)
    done = run_on_ranks(tmp_path / "late.py", tmp_path / "copies")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("refused: Reused local directory") == 2, done.stdout
