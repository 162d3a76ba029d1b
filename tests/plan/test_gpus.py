from __future__ import annotations

from pathlib import Path

import pytest

from mptfoundry.plan import gpus as module
from mptfoundry.plan.devices import GIB, detect_device, launcher_device
from mptfoundry.plan.gpus import KINDS, kind_of, visible_gpus
from tests.nvidia_smi import MISMATCH, NO_DEVICES, NO_DRIVER, gpu_row, put_nvidia_smi

A100 = "NVIDIA A100-SXM4-80GB"
H100 = "NVIDIA H100 80GB HBM3"
MIG_LISTING = f"""GPU 0: {A100} (UUID: GPU-5d5b)
  MIG 3g.40gb     Device  0: (UUID: MIG-aaaa)
  MIG 1g.10gb     Device  1: (UUID: MIG-bbbb)
GPU 1: {A100} (UUID: GPU-6e6c)
  MIG 7g.80gb     Device  0: (UUID: MIG-cccc)
"""


@pytest.fixture(autouse=True)
def no_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DRIVER", "PCI", "DEVICE_FILES"):
        monkeypatch.setattr(module, name, tmp_path / name)


def put_on_the_pci_bus(folder: Path, vendor: str = "0x10de") -> None:
    device = folder / "PCI" / "0000:3b:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text("0x030200\n")


# As nvidia-smi and torch print them -> memory in GiB, dense bf16 TFLOP/s.
@pytest.mark.parametrize(
    ("name", "gib", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 40, 312),
        ("NVIDIA A100-PCIE-40GB", 40, 312),
        ("NVIDIA A100 80GB PCIe", 80, 312),
        ("NVIDIA A10", 22, 125),
        ("NVIDIA A30", 24, 165),
        ("NVIDIA H100 80GB HBM3", 80, 989.4),
        ("NVIDIA H100 PCIe", 80, 756),
        ("NVIDIA H100 NVL", 93, 835.5),
        ("NVIDIA H200", 140, 989.4),
        ("NVIDIA H200 NVL", 140, 835.5),
        ("NVIDIA GH200 480GB", 95, 989.4),
        ("NVIDIA GH200 144G HBM3e", 140, 989.4),
        ("NVIDIA B200", 179, 2250),
        ("NVIDIA GB200", 184, 2500),
        ("NVIDIA B300 SXM6 AC", 268, 2250),
        ("NVIDIA GB300", 268, 2500),
        ("NVIDIA L4", 22, 121),
        ("NVIDIA L40S", 45, 362.05),
        ("NVIDIA GeForce RTX 3090", 24, 71),
        ("NVIDIA GeForce RTX 4090", 24, 165.2),
        ("NVIDIA GeForce RTX 5090", 32, 209.5),
        ("NVIDIA RTX 6000 Ada Generation", 48, 364.25),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 95, 503.8),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 95, 438.9),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95, None),
        ("NVIDIA GeForce RTX 4090 D", 24, None),
        ("Tesla V100-SXM2-16GB", 16, None),
        ("Tesla V100-PCIE-32GB", 32, None),
        ("Tesla T4", 15, None),
    ],
)
def test_a_published_gpu_is_known_by_its_name(name: str, gib: int, tflops: float | None) -> None:
    kind = kind_of(name)
    assert kind is not None and (kind.gib, kind.tflops) == (gib, tflops)


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA A800-SXM4-80GB", "NVIDIA L40", "NVIDIA RTX A6000"])
def test_a_gpu_with_a_similar_name_is_not_taken_for_it(name: str) -> None:
    assert kind_of(name) is None


def test_each_kind_names_its_source() -> None:
    assert all(kind.source for kind in KINDS)
    assert all(kind.tflops is None for kind in KINDS if kind.capability < (8, 0))


def test_a_gpu_is_described_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, [gpu_row(H100, "9.0", "580.95.05", uuid="GPU-8a1b")])
    (gpu,) = visible_gpus({}).gpus
    assert (gpu.name, gpu.memory, gpu.capability, gpu.driver) == (H100, 81559 * 2**20, (9, 0), "580.95.05")
    assert gpu.peak_flops == 989.4e12 and gpu.has_bf16


def test_a_driver_that_does_not_know_a_field_is_asked_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [gpu_row("Tesla V100-SXM2-16GB", "", "470.82.01", mib="16160")]
    put_nvidia_smi(tmp_path, monkeypatch, rows, unknown="compute_cap")
    (gpu,) = visible_gpus({}).gpus
    assert (gpu.capability, gpu.driver, gpu.has_bf16) == ((7, 0), "470.82.01", False)


def test_an_unknown_gpu_leaves_only_utilisation_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, [gpu_row("NVIDIA X1000", "9.0", "580.95.05", mib="40000")])
    device = launcher_device({})
    assert (device.peak_flops, device.memory, device.has_bf16) == (None, 40000 * 2**20, True)


def test_what_nvidia_smi_may_not_say_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = gpu_row("NVIDIA X1000", "[N/A]", "580.95.05", mib="[Insufficient Permissions]", mig="[N/A]")
    put_nvidia_smi(tmp_path, monkeypatch, [row])
    (gpu,) = visible_gpus({}).gpus
    assert (gpu.memory, gpu.capability, gpu.has_bf16, gpu.peak_flops) == (None, None, None, None)


def test_gpus_that_differ_are_planned_with_the_smallest_and_the_slowest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        gpu_row(H100, "9.0", "580.95.05", uuid="GPU-8a1b"),
        gpu_row("NVIDIA GeForce RTX 3090", "8.6", "580.95.05", mib="24576", uuid="GPU-9c"),
    ]
    put_nvidia_smi(tmp_path, monkeypatch, rows)
    device = launcher_device({})
    assert (device.count, device.memory, device.peak_flops) == (2, 24 * GIB, 71e12)
    assert device.name == f"{H100} and NVIDIA GeForce RTX 3090" and device.is_ordered
    first = detect_device(environ={"CUDA_VISIBLE_DEVICES": "0"})
    assert not first.is_ordered
    assert detect_device(environ={"CUDA_VISIBLE_DEVICES": "GPU-9c"}).name == "NVIDIA GeForce RTX 3090"
    assert detect_device(environ={"CUDA_VISIBLE_DEVICES": "GPU-9c"}).is_ordered
    by_bus = {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert detect_device(environ=by_bus).is_ordered


@pytest.mark.parametrize(
    ("chosen", "profile", "gigabytes"),
    [
        (None, "3g.40gb", 40),
        ("MIG-bbbb", "1g.10gb", 10),
        ("1", "7g.80gb", 80),
        ("MIG-bbbb,MIG-cccc", "1g.10gb", 10),
    ],
)
def test_a_process_uses_one_mig_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None, profile: str, gigabytes: int
) -> None:
    rows = [gpu_row(A100, "8.0", "550.54.15", uuid=uuid, mig="Enabled") for uuid in ("GPU-5d5b", "GPU-6e6c")]
    put_nvidia_smi(tmp_path, monkeypatch, rows, listing=MIG_LISTING)
    device = launcher_device({} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen})
    assert (device.count, device.name) == (1, f"{A100} MIG {profile}")
    assert (device.memory, device.peak_flops, device.has_bf16) == (gigabytes * 10**9, None, True)


def test_a_gpu_cut_into_no_slices_is_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [gpu_row(A100, "8.0", "550.54.15", uuid="GPU-5d5b", mig="Enabled")]
    put_nvidia_smi(tmp_path, monkeypatch, rows, listing=f"GPU 0: {A100} (UUID: GPU-5d5b)\n")
    assert launcher_device({}).trouble == f"the {A100} is in MIG mode and has no slices"


def test_a_gpu_cut_into_no_slices_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        gpu_row(A100, "8.0", "550.54.15", uuid="GPU-5d5b", mig="Enabled"),
        gpu_row(A100, "8.0", "550.54.15", uuid="GPU-6e6c"),
    ]
    put_nvidia_smi(tmp_path, monkeypatch, rows, listing=f"GPU 0: {A100} (UUID: GPU-5d5b)\n")
    assert [gpu.uuid for gpu in visible_gpus({}).gpus] == ["GPU-6e6c"]


@pytest.mark.parametrize("error", [NO_DRIVER, MISMATCH])
def test_a_driver_that_fails_is_trouble_where_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: tuple[str, int]
) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, error=error)
    said = error[0].splitlines()[0].rstrip(".")
    without = launcher_device({})
    assert (without.kind, without.trouble) == ("cpu", None)
    assert without.found == f"no GPU can be used: nvidia-smi says: {said}"
    put_on_the_pci_bus(tmp_path)
    assert launcher_device({}).trouble == f"nvidia-smi says: {said}"
    assert launcher_device({"CUDA_VISIBLE_DEVICES": ""}).trouble is None


def test_a_driver_without_gpus_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, error=NO_DEVICES)
    put_on_the_pci_bus(tmp_path)
    device = launcher_device({})
    assert (device.kind, device.trouble) == ("cpu", None)
    assert device.found == "no GPU found: nvidia-smi says: No devices were found"


def put_in_proc(folder: Path) -> None:
    gpu = folder / "DRIVER" / "gpus" / "0000:3b:00.0"
    gpu.mkdir(parents=True)
    (gpu / "information").write_text(
        "Model: \t\t NVIDIA A100-SXM4-40GB\nGPU UUID: \t GPU-8a1b\nDevice Minor: \t 3\n"
    )
    (folder / "DRIVER" / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
        "GCC version:  gcc version 12.3.0\n"
    )


def test_a_container_without_nvidia_smi_reads_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    put_in_proc(tmp_path)
    outside = visible_gpus({})
    assert outside.gpus == ()
    assert outside.found == (
        "no GPU found: the machine has 1, and this container none (docker run --gpus all)"
    )
    (tmp_path / "DEVICE_FILES").mkdir()
    (tmp_path / "DEVICE_FILES" / "nvidia3").touch()
    (gpu,) = visible_gpus({}).gpus
    assert (gpu.name, gpu.driver) == ("NVIDIA A100-SXM4-40GB", "535.104.05")
    assert (gpu.memory, gpu.capability, gpu.uuid) == (40 * GIB, (8, 0), "GPU-8a1b")
