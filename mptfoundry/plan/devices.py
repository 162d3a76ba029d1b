"""The devices of a run on this machine, without importing torch.

A device is a GPU, or one process's share of a CPU machine. Memory is in bytes; peaks are the vendor's dense
bf16 FLOP/s.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

from mptfoundry.errors import ConfigError
from mptfoundry.plan.gpus import GPU, SHORT_NAMES, Visible, full_name, kind_of, visible_gpus

GIB = 2**30
# Numbers of malloc.h, and the environment variables that set the same.
MALLOC_OPTIONS = {-1: "MALLOC_TRIM_THRESHOLD_", -3: "MALLOC_MMAP_THRESHOLD_"}
# Of machines elsewhere; most have more.
CORES_PER_GPU = 8
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Device:
    """The kind and number of a run's devices.

    Attributes:
        kind: `cpu` or `gpu`.
        name: A readable name, such as `NVIDIA H100 80GB HBM3`.
        count: Devices of the run, over all machines; one process drives each.
        per_node: Devices of the run on one machine.
        memory: Bytes of one device; on a CPU its share of the machine's memory. None if unknown. If GPUs
            differ, the smallest.
        peak_flops: Dense bf16 FLOP/s of one device. None if unknown. If GPUs differ, the slowest.
        has_bf16: Whether it multiplies faster in bf16 than in fp32.
        cores: CPU cores for one device.
        found: How the device was detected, in words for the user.
        gpus: The GPUs of the run on this machine.
        trouble: Why the GPUs of this machine can't be used, although it has some.
        is_ordered: Whether CUDA is known to count the GPUs in this order.
        is_here: Whether it is this machine, not a cluster that a user asks about.
    """

    kind: Literal["cpu", "gpu"]
    name: str
    count: int = 1
    per_node: int = 1
    memory: int | None = None
    peak_flops: float | None = None
    has_bf16: bool = False
    cores: int = 1
    found: str = ""
    gpus: tuple[GPU, ...] = ()
    trouble: str | None = None
    is_ordered: bool = True
    is_here: bool = True

    @property
    def torch_type(self) -> str:
        """torch's device type: `cpu` or `cuda`."""
        return "cuda" if self.kind == "gpu" else "cpu"

    @property
    def capability(self) -> tuple[int, int] | None:
        """The lowest compute capability of the GPUs; None on a CPU or if one is unknown."""
        known = [gpu.capability for gpu in self.gpus if gpu.capability is not None]
        return min(known) if known and len(known) == len(self.gpus) else None

    @property
    def lacks_bf16(self) -> bool:
        """Whether a GPU of the run is known to have no bfloat16 units."""
        return any(gpu.has_bf16 is False for gpu in self.gpus)


def launcher_device(environ: Mapping[str, str] = os.environ) -> Device:
    """The devices that the `composer` launcher would use here: all visible GPUs, or one CPU process."""
    visible = visible_gpus(environ)
    return _device(visible, int(environ.get("WORLD_SIZE") or 0) or max(1, len(visible.gpus)), environ)


def detect_device(world_size: int | None = None, environ: Mapping[str, str] = os.environ) -> Device:
    """The devices that this process and its peers compute on; `world_size`, the number of processes, is by
    default that of the launcher's environment variables.
    """
    return _device(visible_gpus(environ), world_size or int(environ.get("WORLD_SIZE") or 1), environ)


def cluster_device(gpu: str, count: int, per_node: int = 8) -> Device:
    """The devices of a cluster that is elsewhere, from the table of GPUs.

    Args:
        gpu: A short name, such as `h100` or `a100-40gb`.
        count: GPUs of the run.
        per_node: GPUs of a machine.

    Raises:
        ConfigError: The table has no such GPU, or the GPUs are not whole machines.
    """
    name = full_name(gpu)
    kind = kind_of(name)
    if kind is None:
        raise ConfigError(f"gpu: {gpu} is not in the table of GPUs. Use one of {', '.join(SHORT_NAMES)}.")
    if count > per_node and count % per_node:
        raise ConfigError(
            f"gpus: {count} are not whole machines of {per_node} GPUs. Use a multiple, or set gpus_per_node."
        )
    one = GPU(name, memory=kind.gib * 2**30, capability=kind.capability)
    return Device(
        kind="gpu",
        name=name,
        count=count,
        per_node=min(count, per_node),
        memory=one.memory,
        peak_flops=one.peak_flops,
        has_bf16=bool(one.has_bf16),
        cores=CORES_PER_GPU,
        found=f"as asked, {per_node} on a machine",
        gpus=(one,) * min(count, per_node),
        is_here=False,
    )


def _device(visible: Visible, count: int, environ: Mapping[str, str]) -> Device:
    here = int(environ.get("LOCAL_WORLD_SIZE") or 0) or len(visible.gpus) or count
    per_node = min(count, here)
    if not visible.gpus:
        return _cpu(visible, count, per_node)
    return _gpus(visible, count, per_node, is_limited="CUDA_VISIBLE_DEVICES" in environ)


def _gpus(visible: Visible, count: int, per_node: int, *, is_limited: bool) -> Device:
    used = visible.gpus[:per_node]
    uses_all = len(used) == len(visible.gpus) and not is_limited
    return Device(
        kind="gpu",
        name=" and ".join(dict.fromkeys(gpu.name for gpu in used)),
        count=count,
        per_node=per_node,
        memory=_smallest([gpu.memory for gpu in used]),
        peak_flops=_smallest([gpu.peak_flops for gpu in used]),
        has_bf16=all(gpu.has_bf16 for gpu in used),
        cores=max(1, _cores() // per_node),
        found=visible.found,
        gpus=used,
        is_ordered=visible.is_ordered or uses_all,
    )


def _smallest(numbers: Sequence[Number | None]) -> Number | None:
    """The smallest number; None if one is unknown."""
    known = [number for number in numbers if number is not None]
    return min(known) if len(known) == len(numbers) else None


def _cpu(visible: Visible, count: int, per_node: int) -> Device:
    memory = total_memory()
    return Device(
        kind="cpu",
        name="CPU",
        count=count,
        per_node=per_node,
        memory=memory // per_node if memory else None,
        cores=max(1, _cores() // per_node),
        found=visible.found,
        trouble=visible.trouble,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free: to return it and ask for it again takes 5 % of a step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option, variable in MALLOC_OPTIONS.items():
        if mallopt is not None and variable not in os.environ:
            mallopt(option, 2**31 - 1)  # bytes, the most that it takes


@lru_cache
def cpu_name() -> str:
    """The processor's name as Linux tells it; elsewhere its architecture."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return name[1] if name else platform.machine()


def total_memory() -> int | None:
    """Total memory of this machine or container in bytes; None if unknown.

    It is not the free memory, because a restarted run must resolve to the same values.
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text()))
    return total
