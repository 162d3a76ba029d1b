from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from mptfoundry.errors import ConfigError
from mptfoundry.plan import gpu_support as module
from mptfoundry.plan.devices import Device, launcher_device
from mptfoundry.plan.gpu_support import (
    SETS,
    TorchBuild,
    describe_gpus,
    gpu_problem,
    imported_torch,
    installed_torch,
    refuse_unsupported,
    runs_on,
)
from mptfoundry.plan.gpus import GPU
from mptfoundry.plan.install_sets import pins
from tests.nvidia_smi import gpu_row, put_nvidia_smi

CURRENT, PINS = (TorchBuild(f"{pins(each.name)['torch']}+cu", each.cuda, each.architectures) for each in SETS)
A100 = GPU("NVIDIA A100-SXM4-80GB", capability=(8, 0), driver="580.95.05")
V100 = GPU("Tesla V100-SXM2-32GB", capability=(7, 0), driver="580.95.05")
B200 = GPU("NVIDIA B200", capability=(10, 0), driver="580.95.05")
INSTALL_PINS = (
    "nstall the set composer-pins (make install SET=composer-pins, or the pip command that mptfoundry doctor "
    "install=composer-pins prints)."
)
INSTALL_CURRENT = INSTALL_PINS.replace("composer-pins", "current")


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver has no library that is newer than itself."""
    monkeypatch.setattr(module.ctypes, "CDLL", raise_os_error)


def raise_os_error(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


def problem(torch: TorchBuild, *gpus: GPU, is_ordered: bool = True) -> str:
    """The error of a run on these GPUs, empty if there is none."""
    device = Device("gpu", gpus[0].name, len(gpus), len(gpus), gpus=gpus, is_ordered=is_ordered)
    return ": ".join(gpu_problem(device, lambda: torch) or ())


def test_the_table_holds_what_the_installed_torch_says() -> None:
    before, after = installed_torch(), imported_torch()
    assert before is not None and after is not None
    assert (before.version, before.cuda) == (torch.__version__, torch.version.cuda)
    if before.architectures is None:
        pytest.skip(f"the table has no row for torch {torch.__version__}")
    assert set(before.architectures) == set(after.architectures or ())
    assert platform.machine() == "x86_64"


@pytest.mark.parametrize(
    ("torch", "capabilities"),
    [
        (CURRENT, {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}),
        (PINS, {(5, 2), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)}),
    ],
)
def test_code_runs_on_its_major_version_from_its_minor_version_on(
    torch: TorchBuild, capabilities: set[tuple[int, int]]
) -> None:
    every = {(3, 7), (5, 2), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)}
    every |= {(10, 0), (10, 3), (11, 0), (12, 0), (12, 1)}
    assert {each for each in every if runs_on(torch.architectures or (), each)} == capabilities


def test_ptx_runs_on_later_gpus_and_code_of_one_gpu_on_no_other() -> None:
    assert runs_on(["compute_90"], (12, 0)) and not runs_on(["compute_90"], (8, 9))
    assert runs_on(["sm_100a"], (10, 0)) and not runs_on(["sm_100a"], (10, 3))
    assert runs_on(["sm_100f"], (10, 3)) and not runs_on(["sm_100f"], (12, 0))


@pytest.mark.parametrize("torch", [CURRENT, PINS])
def test_a_gpu_with_code_and_a_new_driver_is_supported(torch: TorchBuild) -> None:
    assert problem(torch, A100) == ""
    assert problem(torch, GPU("NVIDIA X1000")) == ""


def test_a_v100_needs_the_older_set() -> None:
    assert problem(CURRENT, V100) == (
        "torch: version 2.14.1 (CUDA 13.0) has no code for the Tesla V100-SXM2-32GB (compute capability 7.0)."
        f" I{INSTALL_PINS}"
    )
    assert problem(PINS, V100) == ""


def test_a_b200_needs_the_newer_set() -> None:
    assert problem(PINS, B200) == (
        "torch: version 2.7.0 (CUDA 12.6) has no code for the NVIDIA B200 (compute capability 10.0). "
        f"I{INSTALL_CURRENT}"
    )
    assert problem(CURRENT, B200) == ""


def test_an_old_driver_needs_an_update_or_the_older_set() -> None:
    a100 = GPU(A100.name, capability=(8, 0), driver="550.54.15")
    assert problem(CURRENT, a100) == (
        "driver: 550.54.15 is too old for torch 2.14.1 (CUDA 13.0), which needs 580 or newer. "
        f"Update the driver, or i{INSTALL_PINS}"
    )
    assert problem(PINS, a100) == ""


def test_a_driver_that_is_too_old_for_each_set_needs_an_update() -> None:
    assert problem(PINS, GPU(V100.name, capability=(7, 0), driver="470.82.01")) == (
        "driver: 470.82.01 is too old for torch 2.7.0 (CUDA 12.6), which needs 525.60.13 or newer. "
        "Update the driver to 525.60.13 or newer."
    )
    assert problem(PINS, GPU(B200.name, capability=(10, 0), driver="570.86.15")).endswith(
        f"(compute capability 10.0). Update the driver to 580 or newer, and i{INSTALL_CURRENT}"
    )


def test_the_library_of_forward_compatibility_makes_an_old_driver_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Library:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, version: object) -> int:
            version._obj.value = 13000  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(module.ctypes, "CDLL", Library)
    assert problem(CURRENT, GPU(A100.name, capability=(8, 0), driver="535.104.05")) == ""


def test_a_gpu_older_than_every_set_is_said_to_be() -> None:
    assert problem(PINS, GPU("Tesla K80", capability=(3, 7), driver="470.82.01")).endswith(
        "has no code for the Tesla K80 (compute capability 3.7). "
        "None of the project's install sets has code for this GPU."
    )


def test_different_gpus_need_a_set_for_all_or_a_choice() -> None:
    assert problem(CURRENT, V100, B200).endswith(
        "(compute capability 7.0). None of the project's install sets has code for all of these GPUs. "
        "Or use only the NVIDIA B200: CUDA_VISIBLE_DEVICES."
    )
    assert problem(CURRENT, A100, V100).endswith(
        f"I{INSTALL_PINS} Or use only the NVIDIA A100-SXM4-80GB: CUDA_VISIBLE_DEVICES."
    )


def test_gpus_in_an_unknown_order_are_refused_only_if_none_works() -> None:
    assert problem(CURRENT, A100, V100, is_ordered=False) == ""
    assert problem(CURRENT, V100, is_ordered=False) != ""


def test_a_torch_without_cuda_is_refused_on_a_gpu() -> None:
    text = problem(TorchBuild("2.14.1+cpu", None, None), A100)
    assert text.startswith(
        "torch: version 2.14.1+cpu can't use the NVIDIA A100-SXM4-80GB: it is built without"
    )
    assert "CUDA_VISIBLE_DEVICES=" in text and INSTALL_CURRENT in text


def test_a_build_that_the_table_does_not_know_is_judged_by_its_driver_alone() -> None:
    nvidias = TorchBuild("2.8.0a0+5228986c39.nv25.06", "12.9", None)
    assert problem(nvidias, B200) == ""
    assert problem(nvidias, GPU(A100.name, capability=(8, 0), driver="470.82.01")).startswith("driver: 470")


def test_a_driver_that_fails_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError) as error:
        refuse_unsupported(Device("cpu", "CPU", trouble="nvidia-smi says: Failed to initialize NVML"))
    assert str(error.value) == (
        "driver: nvidia-smi says: Failed to initialize NVML. Repair it, or set CUDA_VISIBLE_DEVICES= to "
        "compute on the CPU."
    )
    assert error.value.of_this_machine


def test_only_the_visible_gpus_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        gpu_row("Tesla V100-SXM2-32GB", "7.0", "580.95.05", uuid="GPU-7"),
        gpu_row("NVIDIA H100 PCIe", "9.0", "580.95.05", uuid="GPU-9"),
    ]
    put_nvidia_smi(tmp_path, monkeypatch, rows)
    assert gpu_problem(launcher_device({}), lambda: CURRENT) is not None
    assert gpu_problem(launcher_device({"CUDA_VISIBLE_DEVICES": "GPU-9"}), lambda: CURRENT) is None
    assert gpu_problem(launcher_device({"CUDA_VISIBLE_DEVICES": "GPU-7"}), lambda: CURRENT) is not None


def test_each_gpu_is_described_with_the_sets_that_work() -> None:
    device = Device("gpu", "", gpus=(A100, V100, GPU("NVIDIA X1000")))
    assert [line.partition("install sets that work: ")[2] for line in describe_gpus(device)] == [
        "current or composer-pins",
        "composer-pins",
        "current or composer-pins",
    ]
    assert "compute capability 8.0, 312 TFLOP/s in bf16, driver 580.95.05" in describe_gpus(device)[0]
    assert "no bf16" in describe_gpus(device)[1]
    assert "compute capability unknown, peak unknown, driver unknown" in describe_gpus(device)[2]
