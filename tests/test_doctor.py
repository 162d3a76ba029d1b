from __future__ import annotations

import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from mptfoundry import doctor as module
from mptfoundry.cli import main
from mptfoundry.doctor import doctor, troubles
from mptfoundry.plan.devices import Device
from mptfoundry.plan.install_sets import PYTHONS, pins
from tests.nvidia_smi import gpu_row, put_nvidia_smi


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_page_has_every_section_and_finds_no_trouble_in_a_whole_installation() -> None:
    page = doctor()
    for title in ("Packages", "Devices", "Attention", "Room", "Network", "Good to know here", "Trouble"):
        assert f"\n{title}\n" in page
    assert page.endswith("Trouble\n  none")
    assert "switched off by HF_HUB_OFFLINE" in page


def section(title: str) -> list[str]:
    """The lines of a section of the page."""
    return [line.strip() for line in doctor().split(f"\n{title}\n")[1].split("\n\n")[0].splitlines()]


def test_every_backend_works_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "launcher_device", lambda: Device("gpu", "GPU", has_bf16=True))
    assert section("Attention")[0].startswith("auto      takes triton, which")
    monkeypatch.setattr(module, "launcher_device", lambda: Device("cpu", "CPU"))
    on_cpu = section("Attention")
    assert [line.split()[0] for line in on_cpu] == ["auto", "torch", "triton", "flash"]
    assert on_cpu[0] == "auto      takes torch, which serves this model in float32 on cpu"
    assert on_cpu[1].endswith("works")
    assert on_cpu[3] == "flash     does not work: it needs a GPU"


def test_gpus_are_named_with_the_install_sets_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [gpu_row("Tesla V100-SXM2-32GB", "7.0", "470.82.01", uuid="GPU-7")]
    put_nvidia_smi(tmp_path, monkeypatch, rows)
    assert section("Devices")[0].endswith("no bf16, driver 470.82.01; install sets that work: none")
    assert any("470.82.01 is too old" in line or "has no code for the" in line for line in troubles())


def install(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Have packages of these versions be installed, or none of that name, whatever is really there."""

    def version(name: str) -> str:
        found = versions.get(name, real(name) if name not in versions else None)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    real = metadata.version
    monkeypatch.setattr(metadata, "version", version)


def test_a_triton_that_makes_the_kernels_slower_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_reported(gpu: str, capability: str, triton: str) -> bool:
        put_nvidia_smi(tmp_path, monkeypatch, [gpu_row(gpu, capability, "580.82.07", uuid="GPU-7")])
        install(monkeypatch, triton=triton)
        return any("is slower with Triton" in line for line in section("Good to know here"))

    assert is_reported("NVIDIA H100 80GB HBM3", "9.0", "3.3.1")
    assert not is_reported("NVIDIA H100 80GB HBM3", "9.0", "3.8.0")
    assert not is_reported("NVIDIA A100-SXM4-80GB", "8.0", "3.3.1")


def test_a_missing_package_is_trouble_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, omegaconf=None)
    assert troubles() == [
        "omegaconf is not installed. `mptfoundry doctor install=current` prints the command."
    ]


def test_a_missing_optional_package_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, peft=None)
    assert troubles() == []
    assert any(line.startswith("peft ") and "not installed (LoRA;" in line for line in section("Packages"))


def test_a_version_that_nobody_declares_or_tests_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torch="2.1.0", transformers="6.0.0")
    said = {line.split()[0]: line for line in section("Packages")}
    assert "outside what mosaicml declares" in said["torch"] and "outside what" in said["transformers"]
    assert "differ: " in said["nearest"] and "torch 2.1.0 instead of " in said["nearest"]


def test_what_a_tested_set_has_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PYTHONS:
        install(monkeypatch, **pins(name))
        assert section("Packages")[0] == f"the set {name}, exactly"
        assert not any("outside" in line for line in section("Packages"))


@pytest.mark.serial
def test_an_unreachable_hub_is_said_within_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started_at = time.monotonic()
    assert "not reachable" in section("Network")[0]
    assert time.monotonic() - started_at < 60


def test_it_works_where_only_python_is_installed(tmp_path: Path) -> None:
    """A bare interpreter, the project on its path: no torch, no packaging, nothing."""
    root = Path(module.__file__).parent.parent
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from mptfoundry.doctor import doctor, troubles; print(doctor()); sys.exit(bool(troubles()))"
    )
    answer = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert answer.returncode == 1, answer.stderr
    assert "torch" in answer.stdout and "MISSING" in answer.stdout
    assert "nothing works without torch" in answer.stdout


def test_the_report_of_a_fault_has_versions_and_variables_but_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert main(["doctor", "env=true"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("```\nmptfoundry ") and printed.endswith("```\n")
    assert f"torch=={metadata.version('torch')}" in printed and "NCCL_DEBUG=INFO" in printed
    assert "WANDB_API_KEY=<redacted>" in printed and "0123456789abcdef" not in printed
