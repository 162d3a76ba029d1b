"""Detect this machine's devices without importing torch.

A device is a GPU, or one process's share of a CPU machine. Memory is in bytes; peaks are the vendor's dense
bf16 FLOP/s.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """The kind and number of a run's devices.

    Attributes:
        kind: `cpu` or `gpu`.
        name: A readable name, such as `NVIDIA H100 80GB HBM3`.
        count: Devices of the run, over all machines; one process drives each.
        per_node: Devices of the run on one machine.
        memory: Bytes of one device; on a CPU its share of the machine's memory. None if unknown.
        peak_flops: Dense bf16 FLOP/s of one device. None if unknown.
        has_bf16: Whether it multiplies faster in bf16 than in fp32.
        cores: CPU cores for one device.
        found: How the device was detected, in words for the user.
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

    @property
    def torch_type(self) -> str:
        """torch's device type: `cpu` or `cuda`."""
        return "cuda" if self.kind == "gpu" else "cpu"


# A pattern in nvidia-smi's name -> GiB and FLOP/s. The first match counts.
_KNOWN: tuple[tuple[str, int, float], ...] = (
    (r"a100.*40\s?gb", 40, 312e12),
    (r"a100", 80, 312e12),
    (r"h100.*pcie", 80, 756e12),
    (r"h100", 80, 989.4e12),
    (r"h200", 140, 989.4e12),
)


def launcher_device(environ: Mapping[str, str] = os.environ) -> Device:
    """The devices that the `composer` launcher would use here: all visible GPUs, or one CPU process."""
    world_size = int(environ.get("WORLD_SIZE") or 0) or max(1, len(visible_gpus(environ)[0]))
    return detect_device(world_size, environ)


def detect_device(world_size: int | None = None, environ: Mapping[str, str] = os.environ) -> Device:
    """The devices that this process and its peers compute on.

    Args:
        world_size: Processes of the run. Default: from the launcher's environment variables, or one.
        environ: The environment variables.
    """
    gpus, found = visible_gpus(environ)
    count = world_size or int(environ.get("WORLD_SIZE") or 1)
    here = int(environ.get("LOCAL_WORLD_SIZE") or 0) or (len(gpus) if gpus else count)
    per_node = min(count, here)
    if not gpus:
        return _cpu(count, per_node, found)
    name, mib, capability = gpus[0]
    row = next((row for row in _KNOWN if re.search(row[0], name, re.IGNORECASE)), None)
    return Device(
        kind="gpu",
        name=name,
        count=count,
        per_node=per_node,
        memory=mib * 2**20 if mib else row[1] * GIB if row else None,
        peak_flops=row[2] if row else None,
        has_bf16=row is not None or capability >= 8,
        cores=max(1, _cores() // per_node),
        found=found,
    )


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[list[tuple[str, int, float]], str]:
    """The GPUs that this process may use, as name, memory in MiB and compute capability (0: unknown),
    and a phrase that says how they were detected or why there are none."""
    gpus = _nvidia_smi()
    how = "nvidia-smi"
    if not gpus:
        gpus = [(name, 0, 0.0) for name in _driver_gpus()]
        how = "/proc/driver/nvidia"
    if not gpus:
        return [], "no GPU found: neither nvidia-smi nor /proc/driver/nvidia names one"
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus, f"found by {how}"
    visible = []
    for word in filter(None, chosen.replace(" ", "").split(",")):
        if word == "-1" or (word.isdigit() and int(word) >= len(gpus)):
            break  # CUDA ignores everything after an invalid index
        visible.append(gpus[int(word)] if word.isdigit() else gpus[0])
    if not visible:
        return [], f"CUDA_VISIBLE_DEVICES={chosen!r} hides the {len(gpus)} GPUs of this machine"
    return visible, f"found by {how}, chosen by CUDA_VISIBLE_DEVICES={chosen}"


def _nvidia_smi() -> list[tuple[str, int, float]]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 2) for line in answer.splitlines() if line.count(",") >= 2]
    return [(name.strip(), int(_number(mib)), _number(capability)) for name, mib, capability in rows]


def _driver_gpus() -> list[str]:
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", path.read_text(errors="replace"), re.MULTILINE)
        names.append(model[1].strip() if model else "NVIDIA GPU")
    return names


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _cpu(count: int, per_node: int, found: str) -> Device:
    memory = total_memory()
    return Device(
        kind="cpu",
        name="CPU",
        count=count,
        per_node=per_node,
        memory=memory // per_node if memory else None,
        cores=max(1, _cores() // per_node),
        found=found,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int | None:
    """Total memory of this machine or container in bytes; None if unknown.

    It is not the free memory, because a restarted run must resolve to the same values.
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return total
