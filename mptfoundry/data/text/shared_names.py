"""Pick names for shared memory that no other run uses.

Each run on a machine has a number in the names of its shared memory. StreamingDataset looks for a free number
and claims it later. If another run claims it in between, startup fails with `File exists`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch.distributed as dist
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _check_and_find_retrying, _check_self, _get_path, _pack_locals
from streaming.base.world import World

Claim = tuple[int, SharedMemory]
SHARED_MEMORY = Path("/dev/shm")


def take_number(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 100
) -> Claim:
    """Claim a number for the processes of a node, with shared memory of that name; replaces streaming's
    `get_shm_prefix`. ValueError if two streams, or two runs, would keep copies of shards in one folder.
    """
    _check_self(streams_local)
    claim = partial(_claim, streams_local, streams_remote, retry)
    return _claim_together(claim, world) if dist.is_initialized() else claim()


def _claim_together(claim: Callable[[], Claim], world: World) -> Claim:
    """Claim a number in the first process of each node, which tells the others."""
    number, taken, problem = 0, None, ""
    # Other processes must not look: they would mistake the first process's name for another run's.
    if world.is_local_leader:
        try:
            number, taken = claim()
        except ValueError as error:
            problem = str(error)
    answers = [(number, problem)] * dist.get_world_size()
    dist.all_gather_object(answers, (number, problem))
    number = answers[world.rank - world.rank_of_node][0]
    problem = next((text for _, text in answers if text), "")
    if problem:
        raise ValueError(problem)
    return number, taken or SharedMemory(_get_path(number, LOCALS), False)


def _claim(streams_local: list[str], streams_remote: list[str | None], retry: int) -> Claim:
    """Claim the first free number; if another process takes it first, the next one."""
    number = max(
        _check_and_find_retrying(streams_local, streams_remote, name, retry) for name in SHM_TO_CLEAN
    )
    # A closing run unlinks its blocks one by one. This run must not read the resume position left in them.
    while any((SHARED_MEMORY / _get_path(number, name)).exists() for name in SHM_TO_CLEAN):
        number += 1
    while True:
        data = _pack_locals(streams_local, number)
        with suppress(FileExistsError):
            taken = SharedMemory(_get_path(number, LOCALS), True, len(data))
            taken.buf[: len(data)] = data
            return number, taken
        number += 1
