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


def complete_in_fish(tmp_path: Path, script: str, line: str) -> list[str]:
    """What fish offers at the end of a line."""
    (tmp_path / "completion.fish").write_text(script)
    asked = f"source completion.fish; complete -C '{line}'"
    done = subprocess.run(["fish", "-c", asked], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


# zsh completes in a terminal only: this one is made by zsh itself.
IN_ZSH = """
zmodload zsh/zpty
wait_for() {
    local seen=
    repeat 100; do
        zpty -r -t z part && seen+=$part
        [[ $seen == *$1* ]] && break
        sleep 0.1
    done
    print -r -- $seen
}
zpty z zsh -f -i
zpty -w z "PS1='rea''dy'; autoload -U compinit; compinit -u -D; source completion.zsh"
zpty -w z "bindkey '^I' complete-word"
wait_for ready > /dev/null
zpty -w -n z "$1"$'\t'
wait_for "$2"
"""


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


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed here")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mptfoundry expo", ["export"]),
        ("mptfoundry export runs/a hf/a form", ["format=auto", "format=custom", "format=native"]),
        ("mptfoundry train a.yaml optimizer.name=decoupled_l", ["optimizer.name=decoupled_lionw"]),
        ("mptfoundry check conf", ["config.yaml"]),
    ],
)
def test_fish_completes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, offered: list[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    assert main(["completion", "fish"]) == 0
    assert complete_in_fish(tmp_path, capsys.readouterr().out, line) == offered


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed here")
@pytest.mark.parametrize(
    ("line", "whole"),
    [
        ("mptfoundry expo", "mptfoundry export"),
        ("mptfoundry check a.yaml max_dur", "mptfoundry check a.yaml max_duration="),
        ("mptfoundry check conf", "mptfoundry check config.yaml"),
    ],
)
def test_zsh_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, whole: str) -> None:
    (tmp_path / "config.yaml").touch()
    assert main(["completion", "zsh"]) == 0
    (tmp_path / "completion.zsh").write_text(capsys.readouterr().out)
    added = whole.removeprefix(line)
    command = ["zsh", "-f", "-c", IN_ZSH, "zsh", line, added]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60).stdout
    assert added in shown.partition(line)[2], shown


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
