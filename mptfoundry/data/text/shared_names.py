"""Names in shared memory that no other run has.

Runs of one machine tell their shared memory apart by a number. StreamingDataset looks for one that is free
and takes it later; a run that takes it in between ends the other's start with `File exists`.
"""

from __future__ import annotations

import torch.distributed as dist
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _check_and_find_retrying, _check_self, _get_path, _pack_locals
from streaming.base.world import World


def take_number(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """Take a number for the processes of a node; in place of streaming's `get_shm_prefix`.

    The first process of the node tries numbers until one is its own, which making a file decides, and tells
    the others.

    Args:
        streams_local: Where the shards of each stream are kept.
        streams_remote: Where they come from, None for those in place.
        world: Which process this is.
        retry: How often to look again where another run seems to keep its copies in the same folder.

    Returns:
        The number, and the shared memory that holds it.

    Raises:
        ValueError: Two streams, or this run and another, would keep copies in one folder.
    """
    _check_self(streams_local)
    number, taken, problem = 0, None, ""
    # The others must not look: they would find the first process's own name, and take it for another run's.
    if world.is_local_leader:
        try:
            number = max(
                _check_and_find_retrying(streams_local, streams_remote, name, retry) for name in SHM_TO_CLEAN
            )
        except ValueError as error:
            problem = str(error)
    while world.is_local_leader and taken is None and not problem:
        data = _pack_locals(streams_local, number)
        try:
            taken = SharedMemory(_get_path(number, LOCALS), True, len(data))
            taken.buf[: len(data)] = data
        except FileExistsError:
            number += 1
    if dist.is_initialized():
        answers = [(number, problem)] * dist.get_world_size()
        dist.all_gather_object(answers, (number, problem))
        number = answers[world.rank - world.rank_of_node][0]
        problem = next((text for _, text in answers if text), "")
    if problem:
        raise ValueError(problem)
    return number, taken or SharedMemory(_get_path(number, LOCALS), False)
