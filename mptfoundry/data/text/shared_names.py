"""Pick names for shared memory that no other run uses.

Each run on a machine has a number in the names of its shared memory. StreamingDataset looks for a free number
and claims it later. If another run claims it in between, startup fails with `File exists`.
"""

from __future__ import annotations

from contextlib import suppress

import torch.distributed as dist
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _check_and_find_retrying, _check_self, _get_path, _pack_locals
from streaming.base.world import World


def take_number(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """Claim a number for the processes of a node; replaces streaming's `get_shm_prefix`.

    The first process on the node tries numbers until it can create the file for one, then tells the others.

    Args:
        streams_local: The local folder of each stream.
        streams_remote: The remote of each stream; None if it is read in place.
        world: This process's rank and node.
        retry: How many times to check again if another run seems to use the same local folder.

    Returns:
        The number, and the shared memory that claims it.

    Raises:
        ValueError: Two streams, or this run and another, would keep copies in one folder.
    """
    _check_self(streams_local)
    number, taken, problem = 0, None, ""
    # Other processes must not look: they would mistake the first process's name for another run's.
    if world.is_local_leader:
        try:
            number, taken = _claim(streams_local, streams_remote, retry)
        except ValueError as error:
            problem = str(error)
    if dist.is_initialized():
        answers = [(number, problem)] * dist.get_world_size()
        dist.all_gather_object(answers, (number, problem))
        number = answers[world.rank - world.rank_of_node][0]
        problem = next((text for _, text in answers if text), "")
    if problem:
        raise ValueError(problem)
    return number, taken or SharedMemory(_get_path(number, LOCALS), False)


def _claim(
    streams_local: list[str], streams_remote: list[str | None], retry: int
) -> tuple[int, SharedMemory]:
    """Claim the first number that is free, and stays so until its file is made."""
    number = max(
        _check_and_find_retrying(streams_local, streams_remote, name, retry) for name in SHM_TO_CLEAN
    )
    while True:
        data = _pack_locals(streams_local, number)
        with suppress(FileExistsError):
            taken = SharedMemory(_get_path(number, LOCALS), True, len(data))
            taken.buf[: len(data)] = data
            return number, taken
        number += 1
