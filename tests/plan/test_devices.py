from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mptfoundry.plan.devices import MALLOC_OPTIONS, Device, cpu_name, detect_device, launcher_device
from mptfoundry.plan.gpus import visible_gpus
from tests.nvidia_smi import gpu_row, put_nvidia_smi

CPU_INFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


@pytest.fixture
def two_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi lists two GPUs."""
    rows = [
        gpu_row("NVIDIA H100 80GB HBM3", "9.0", "580.95.05", uuid=uuid) for uuid in ("GPU-8a1b", "GPU-9c")
    ]
    put_nvidia_smi(tmp_path, monkeypatch, rows)


@pytest.mark.skipif("model name" not in CPU_INFO, reason="/proc/cpuinfo doesn't name this processor")
def test_the_processor_has_the_name_that_composer_finds_for_it() -> None:
    cpuinfo = pytest.importorskip("cpuinfo")
    assert cpu_name() == cpuinfo.get_cpu_info()["brand_raw"]


MAPPED = """
import ctypes, sys
from mptfoundry.plan.devices import keep_freed_memory
class Info(ctypes.Structure):  # of malloc.h
    _fields_ = [(name, ctypes.c_int) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = Info
if sys.argv[1] == "kept":
    keep_freed_memory()
before = mallinfo().hblks
large = ctypes.create_string_buffer(1 << 26)
print(mallinfo().hblks - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_large_memory_is_not_given_back_unless_the_environment_says_so() -> None:
    def mapped_alone(how: str, **environ: str) -> bool:
        words, environ = [sys.executable, "-c", MAPPED, how], {**os.environ, **environ}
        return subprocess.check_output(words, env=environ, text=True) == "1\n"

    by_user = dict.fromkeys(MALLOC_OPTIONS.values(), "131072")
    assert mapped_alone("usual") and not mapped_alone("kept") and mapped_alone("kept", **by_user)


def test_a_device_has_torchs_name_for_its_kind() -> None:
    assert (Device("cpu", "CPU").torch_type, Device("gpu", "H100").torch_type) == ("cpu", "cuda")


@pytest.mark.usefixtures("two_h100")
def test_gpus_are_found_by_nvidia_smi() -> None:
    device = launcher_device(environ={})
    assert (device.kind, device.count, device.per_node) == ("gpu", 2, 2)
    assert device.memory == 81559 * 2**20
    assert device.peak_flops == 989.4e12 and device.has_bf16


@pytest.mark.usefixtures("two_h100")
def test_the_launcher_says_how_many_devices_a_run_has() -> None:
    device = detect_device(environ={"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "2"})
    assert (device.count, device.per_node) == (16, 2)
    assert detect_device(environ={}).count == 1


@pytest.mark.usefixtures("two_h100")
@pytest.mark.parametrize(
    ("chosen", "count"), [("0,1", 2), ("1", 1), ("0,7", 1), ("GPU-8a,GPU-9c", 2), ("GPU-7", 0)]
)
def test_cuda_visible_devices_chooses_gpus(chosen: str, count: int) -> None:
    assert len(visible_gpus({"CUDA_VISIBLE_DEVICES": chosen}).gpus) == count


@pytest.mark.usefixtures("two_h100")
@pytest.mark.parametrize("chosen", ["", "-1"])
def test_hidden_gpus_leave_the_cpu_and_the_reason(chosen: str) -> None:
    device = detect_device(environ={"CUDA_VISIBLE_DEVICES": chosen})
    assert device.kind == "cpu"
    assert device.found == f"CUDA_VISIBLE_DEVICES={chosen!r} hides the 2 GPUs of this machine"


def test_processes_on_one_cpu_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    one, four = detect_device(environ={}), detect_device(environ={"WORLD_SIZE": "4"})
    if one.kind == "gpu":
        pytest.skip("the driver lists a GPU here")
    assert one.memory is not None and four.memory == one.memory // 4
