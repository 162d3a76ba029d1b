"""`composer scripts/doctor.py cluster=true`: does each rank compute and communicate as fast as the others?

Each rank multiplies matrices; then all of them add up a large tensor together (all-reduce), each machine by
itself and all machines. A rank that multiplies much slower than the median is named, and so is a machine
whose ranks communicate much slower.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mptfoundry.errors import MPTFoundryError
from mptfoundry.ranks import local_rank, rank, world_size

# Slower than this share of the median is slow.
SLOW = 0.8
SIZE = {"cuda": 8192, "cpu": 512}
ALL_REDUCE_BYTES = {"cuda": 2**30, "cpu": 2**22}
REPEATS = 5
TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Health:
    """What a rank measured.

    Attributes:
        host: Its machine.
        device: Its device.
        tflops: Of its matrix products.
        machine_gbs: Bus bandwidth of the all-reduce within its machine, in GB/s; 0 if it is alone there.
        all_gbs: Of the all-reduce over all ranks.
    """

    host: str
    device: str
    tflops: float
    machine_gbs: float
    all_gbs: float


def cluster_health() -> str:
    """Return the table of all ranks, on every rank.

    Raises:
        MPTFoundryError: A rank or a machine is slow.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(local_rank())
    if world_size() > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        found: list[Health | None] = [None] * world_size()
        mine = measure(kind)
        if world_size() > 1:
            dist.all_gather_object(found, mine)
        else:
            found = [mine]
    finally:
        if world_size() > 1:
            dist.destroy_process_group()
    ranks = [each for each in found if each is not None]
    table = describe(ranks)
    if slow := slow_ones(ranks):
        raise MPTFoundryError("\n".join([table, *slow]))
    return table


def measure(kind: str) -> Health:
    """Measure this rank, together with the others."""
    size = SIZE[kind]
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=kind, dtype=dtype) for _ in range(2))
    seconds = median_seconds(lambda: multiply(left, right), kind)
    name = torch.cuda.get_device_name() if kind == "cuda" else "CPU"
    machine, everyone = 0.0, 0.0
    if world_size() > 1:
        everyone = all_reduce_gbs(kind, None, world_size())
        of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        if 1 < of_machine < world_size():
            first = range(0, world_size(), of_machine)
            groups: list[Any] = [dist.new_group(list(range(start, start + of_machine))) for start in first]
            machine = all_reduce_gbs(kind, groups[rank() // of_machine], of_machine)
    return Health(socket.gethostname(), name, 2 * size**3 / seconds / 1e12, machine, everyone)


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """One matrix product."""
    return left @ right


def all_reduce_gbs(kind: str, group: dist.ProcessGroup | None, ranks: int) -> float:
    """The bus bandwidth of an all-reduce: bytes that each rank sends and receives, per second."""
    numbers = torch.ones(ALL_REDUCE_BYTES[kind] // 4, device=kind)
    seconds = median_seconds(lambda: dist.all_reduce(numbers, group=group), kind)
    return ALL_REDUCE_BYTES[kind] * 2 * (ranks - 1) / ranks / seconds / 1e9


def median_seconds(work: Callable[[], object], kind: str) -> float:
    """The median time of some work, after a first time that warms up."""
    spent = []
    for _ in range(REPEATS + 1):
        started_at = time.perf_counter()
        work()
        if kind == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started_at)
    return statistics.median(spent[1:])


def describe(ranks: list[Health]) -> str:
    """A line for each rank."""
    lines = []
    for number, each in enumerate(ranks):
        text = f"rank {number:4}  {each.host}  {each.device}  {each.tflops:8.3g} TFLOP/s"
        if each.machine_gbs:
            text += f"  {each.machine_gbs:7.3g} GB/s within the machine"
        lines.append(text)
    if len(ranks) > 1:
        lines.append(f"all-reduce over all {len(ranks)} ranks: {ranks[0].all_gbs:.3g} GB/s")
    return "\n".join(lines)


def slow_ones(ranks: list[Health]) -> list[str]:
    """A sentence for each rank that multiplies slowly, and each machine that communicates slowly."""
    usual = statistics.median_high(each.tflops for each in ranks)
    slow = [
        f"rank {number} on {each.host} is slow: {each.tflops:.3g} TFLOP/s, where the median is {usual:.3g}. "
        "Leave this machine out, or look at its clocks and temperature (nvidia-smi -q -d PERFORMANCE)."
        for number, each in enumerate(ranks)
        if each.tflops < SLOW * usual
    ]
    by_machine = {each.host: each.machine_gbs for each in ranks if each.machine_gbs}
    if by_machine:
        usual = statistics.median_high(by_machine.values())
        slow += [
            f"{host} communicates slowly: {rate:.3g} GB/s within the machine, where the median is "
            f"{usual:.3g}. Leave it out, or look at its links (nvidia-smi topo -m, nvidia-smi nvlink -s)."
            for host, rate in by_machine.items()
            if rate < SLOW * usual
        ]
    return slow
