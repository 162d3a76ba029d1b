"""Numbers of shared memory, beside those that other runs take."""

from __future__ import annotations

from typing import Any

import pytest
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _get_path
from streaming.base.world import World

from mptfoundry.data.text import shared_names
from mptfoundry.data.text.shared_names import take_number

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
