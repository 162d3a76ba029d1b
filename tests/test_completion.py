"""The scripts that complete the command in a shell, in the shells that are installed here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mptfoundry.cli import main
from mptfoundry.completion import SHELLS


def complete_in_bash(tmp_path: Path, script: str, line: str) -> list[str]:
    """What bash offers at the end of a line."""
    (tmp_path / "completion.bash").write_text(script)
    asked = """
        source completion.bash
        compopt() { :; }  # bash has it only while it completes
        COMP_LINE="$1"; COMP_POINT=${#1}; COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        _mptfoundry
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(["bash", "-c", asked, "bash", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@pytest.fixture
def bash_script(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", "bash"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mptfoundry expo", ["export"]),
        ("mptfoundry export runs/a hf/a form", ["format=auto", "format=custom", "format=native"]),
        ("mptfoundry export runs/a hf/a format=n", ["native"]),
        ("mptfoundry train a.yaml optimizer.name=decoupled_l", ["decoupled_lionw"]),
        ("mptfoundry check a.yaml max_dur", ["max_duration="]),
        ("mptfoundry check conf", ["config.yaml"]),
        ("mptfoundry doctor cle", ["clean=false", "clean=true"]),
    ],
)
def test_bash_completes(tmp_path: Path, bash_script: str, line: str, offered: list[str]) -> None:
    (tmp_path / "config.yaml").touch()
    assert complete_in_bash(tmp_path, bash_script, line) == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_the_scripts_are_valid(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "decoupled_lionw" in script and "generate" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here, so only the script's words were looked at")
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_shell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "powershell"]) == 2
    assert "name one shell of bash, zsh, fish" in capsys.readouterr().err
