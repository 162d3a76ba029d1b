"""A program named nvidia-smi that answers as the driver's own does, for tests on machines without a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

# What nvidia-smi prints on machines with these problems, and its exit code.
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
    "NVIDIA driver is installed and running.\n",
    9,
)
MISMATCH = ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.54\n", 18)
NO_DEVICES = ("No devices were found\n", 6)


def gpu_row(
    name: str, capability: str, driver: str, *, mib: str = "81559", uuid: str = "GPU-0", mig: str = "Disabled"
) -> dict[str, str]:
    """A GPU as fields of nvidia-smi's query."""
    return {
        "name": name,
        "memory.total": mib,
        "compute_cap": capability,
        "driver_version": driver,
        "uuid": uuid,
        "mig.mode.current": mig,
    }


def put_nvidia_smi(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: Sequence[dict[str, str]] = (),
    *,
    error: tuple[str, int] | None = None,
    listing: str = "",
    unknown: str = "nothing",
) -> None:
    """Put nvidia-smi first on the path.

    Args:
        folder: Where the program is written.
        monkeypatch: Sets the path.
        rows: The GPUs that it lists.
        error: What it prints instead, and its exit code.
        listing: What it prints for `-L`.
        unknown: A field that it doesn't know.
    """
    script = folder / "nvidia-smi"
    script.write_text(
        f"""#!/usr/bin/env -S python3 -S
import sys
rows, error, listing, unknown = {list(rows)!r}, {error!r}, {listing!r}, {unknown!r}
if error is not None:
    print(error[0], end="")
    sys.exit(error[1])
if sys.argv[1] == "-L":
    print(listing, end="")
    sys.exit()
fields = sys.argv[1].removeprefix("--query-gpu=").split(",")
if unknown in fields:
    print(f'Field "{{unknown}}" is not a valid field to query.')
    sys.exit(2)
for row in rows:
    print(", ".join(row[field] for field in fields))
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
