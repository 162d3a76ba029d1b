"""README and docs tell the truth: their commands, links and numbers hold, their programs run, the site builds
without a warning, and what is generated is up to date."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mptfoundry
from mptfoundry.cli import VERBS, main
from mptfoundry.config.load import load_train_config
from mptfoundry.mpt.flops import count_parameters
from scripts.write_docs import pages
from tests.test_architecture import FLOORS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(p.relative_to(ROOT)): p.read_text() for p in [*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md"))]}
README = PAGES["README.md"]


def commands() -> list[str]:
    """The lines of all bash blocks, comments taken off, continued lines joined, loops unrolled; each once."""
    blocks = [block for text in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    text = re.sub(
        r"^for (\w+) in (.*); do\n(.*?)\ndone$", unrolled, "\n".join(blocks), flags=re.DOTALL | re.M
    )
    lines = text.replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line for line in (re.sub(r"\s+#.*", "", x).strip() for x in lines) if line))


def unrolled(loop: re.Match[str]) -> str:
    name, values, body = loop.groups()
    return "\n".join(body.replace(f"${name}", value) for value in values.split())


def test_the_readme_is_a_front_door() -> None:
    assert README.count("\n") <= 250


def test_the_architecture_page_lists_every_room_with_its_floor() -> None:
    page = PAGES["docs/internals/architecture.md"]
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", page, re.MULTILINE)
    listed = {
        (int(floor), name.removesuffix("/").removesuffix(".py"))
        for floor, rooms in rows
        for name in re.findall(r"`(\S+?)`", rooms)
    }
    assert listed == {(floor, room) for floor, rooms in enumerate(FLOORS, 1) for room in rooms}


def test_every_config_is_listed_with_its_parameters() -> None:
    listed = dict(re.findall(r"^\| `(\S+)` \| ([\d,]+) \|", PAGES["docs/guide/configs.md"], re.MULTILINE))
    for path in (ROOT / "configs").glob("*.yaml"):
        config, _ = load_train_config(path)
        assert listed[path.stem] == f"{count_parameters(config.model):,}"


def test_the_complete_config_of_the_readme_is_a_run(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mpt-tiny.yaml").write_text(block)
    assert load_train_config(tmp_path / "mpt-tiny.yaml") == load_train_config(ROOT / "configs/mpt-tiny.yaml")


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
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all(line in README for line in errors) or "max_duration" not in command


@pytest.mark.parametrize(
    ("page", "link"),
    [
        (page, link)
        for page in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
        for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", PAGES[page])
    ],
)
def test_links_out_of_the_top_level_pages_exist(page: str, link: str) -> None:
    assert (ROOT / link).exists()


def test_the_site_builds_in_strict_mode(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "index.html").is_file()


@pytest.mark.parametrize("name", ["reference/config.md", "reference/cli.md", "internals/reliability.md"])
def test_generated_pages_say_what_the_code_says(name: str) -> None:
    assert PAGES[f"docs/{name}"] == pages()[name], "run: make docs"


def test_the_program_of_the_python_api_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGES["docs/reference/python-api.md"], re.DOTALL)
    exec(compile("\n".join(blocks), "python-api.md", "exec"), {"__name__": "program"})
    assert (tmp_path / "hf" / "mine" / "config.json").is_file()


def test_every_public_name_is_documented_and_can_be_imported() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", PAGES["docs/reference/python-api.md"], re.MULTILINE)
    assert listed == mptfoundry.__all__
    for name in listed:
        assert getattr(mptfoundry, name).__doc__


@pytest.mark.parametrize(
    "file",
    sorted(set(re.findall(r"\| `(\S+\.py)` \|$", PAGES["docs/internals/reliability.md"], re.MULTILINE))),
)
def test_the_tests_of_every_fault_exist(file: str) -> None:
    assert (ROOT / "tests" / file).is_file()
