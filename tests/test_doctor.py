from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mptfoundry import doctor as module
from mptfoundry.doctor import doctor, troubles
from mptfoundry.plan.devices import Device


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_page_has_every_section_and_finds_no_trouble_in_a_whole_installation() -> None:
    page = doctor()
    for title in ("Packages", "Devices", "Attention", "Room", "Network", "Good to know here", "Trouble"):
        assert f"\n{title}\n" in page
    assert page.endswith("Trouble\n  none")
    assert "switched off by HF_HUB_OFFLINE" in page


def test_every_backend_works_or_says_why_not() -> None:
    lines = doctor().split("Attention\n")[1].split("\n\n")[0].splitlines()
    verdicts = {line.split()[0]: line for line in lines}
    assert set(verdicts) == {"auto", "torch", "flash", "triton"}
    assert verdicts["torch"].endswith("works")
    assert module._attention(Device("gpu", "GPU", has_bf16=True))[0].startswith(
        "auto      takes triton, which"
    )
    on_cpu = module._attention(Device("cpu", "CPU"))
    assert on_cpu[0] == "auto      takes torch, which serves this model in float32 on cpu"
    assert on_cpu[3] == "flash     does not work: it needs a GPU"


def test_a_missing_package_is_trouble_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._PACKAGES, "no-such-package", None)
    assert troubles() == ["no-such-package is not installed. Install the project: pip install -e ."]


def test_a_missing_optional_package_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._PACKAGES, "no-such-package", "nothing")
    assert troubles() == []
    assert any("no-such-package" in line and "not installed (nothing)" in line for line in module._packages())


def test_a_version_outside_a_declared_range_is_said() -> None:
    assert "outside what mosaicml declares" in module._outside("torch", "2.11.0")
    assert "outside what" in module._outside("transformers", "5.0.0")
    assert module._outside("torch", "2.7.0") == ""


@pytest.mark.serial
def test_an_unreachable_hub_is_said_within_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started_at = time.monotonic()
    assert "not reachable" in module._hub()
    assert time.monotonic() - started_at < module._HUB_TIMEOUT_SECONDS + 1


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
