"""The README tells the truth: its map is the disk, its commands and its numbers hold."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mptfoundry.cli import VERBS, main
from mptfoundry.config.load import load_train_config
from mptfoundry.mpt.flops import count_parameters

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """The lines of all bash blocks, comments taken off, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in lines) if line]


def test_the_map_is_the_disk() -> None:
    listed = set(re.findall(r"^[├└]── (\S+)", README, re.MULTILINE))
    found = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "mptfoundry").iterdir()
        if path.name not in ("__init__.py", "__pycache__")
    }
    assert listed == found


def test_every_config_is_listed_with_its_parameters() -> None:
    listed = dict(re.findall(r"^\| `(\S+)` \| ([\d,]+) \|", README, re.MULTILINE))
    for path in (ROOT / "configs").glob("*.yaml"):
        config, _ = load_train_config(path)
        assert listed[path.stem] == f"{count_parameters(config.model):,}"


@pytest.mark.parametrize("command", commands())
def test_every_command_names_what_exists(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[0] == "mptfoundry":
        assert words[1] in VERBS
    for word in words:
        if re.fullmatch(r"(configs|scripts|docker|clusters)/\S+", word):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("command", [c for c in commands() if "scripts/train.py" in c and "docker" not in c])
def test_every_training_command_describes_a_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)
    config = words.index("scripts/train.py") + 1
    assert main(["check", str(ROOT / words[config]), *words[config + 1 :]]) == 0


@pytest.mark.parametrize(
    "command", [c for c in commands() if re.match("mptfoundry (check|explain|doctor)", c)]
)
def test_quick_commands_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ROOT / w) if w.startswith("configs/") else w for w in shlex.split(command)[1:]]
    assert main(words) == (2 if "lrr" in command else 0)


@pytest.mark.parametrize("file", sorted(set(re.findall(r"^\| .*\| `(\S+\.py)` \|$", README, re.MULTILINE))))
def test_the_tests_of_every_fault_exist(file: str) -> None:
    assert (ROOT / "tests" / file).is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_pictures_and_links_exist(link: str) -> None:
    assert (ROOT / link).exists()
