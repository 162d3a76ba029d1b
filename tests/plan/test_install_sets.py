"""The pinned lists agree with pyproject.toml and with what the package imports."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mptfoundry.errors import ConfigError
from mptfoundry.plan import install_sets
from mptfoundry.plan.install_sets import FOLDER, PYTHONS, install_command, installed_set, lines_of, pins

ROOT = Path(__file__).parents[2]
FILES = [f"{name}{kind}" for name in PYTHONS for kind in ("", "-dev")]
# Modules that the package imports only where an optional package is asked for.
OPTIONAL = {
    "flash_attn",
    "bitsandbytes",
    "pyspark",
    "peft",
    "accelerate",
    "comet_ml",
    "lm_eval",
    "wandb",
    "torchao",
}


@pytest.mark.parametrize("name", FILES)
def test_a_list_pins_each_package_once_and_names_no_index(name: str) -> None:
    seen: dict[str, list[Requirement]] = {}
    for line in lines_of(FOLDER / f"{name}.txt"):
        pin = Requirement(line)
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), (
            line
        )  # one version, not a local one such as +cpu
        assert pin.url is None, line
        assert all(pin.marker for pin in [*seen.get(pin.name, []), pin]) or pin.name not in seen, line
        seen.setdefault(pin.name, []).append(pin)
    options = [line for line in (FOLDER / f"{name}.txt").read_text().splitlines() if line.startswith("-")]
    assert options == ([f"-r {name.removesuffix('-dev')}.txt"] if name.endswith("-dev") else [])


@pytest.mark.parametrize("name", PYTHONS)
def test_a_set_contradicts_no_range_of_the_project(name: str) -> None:
    try:
        declared = metadata.requires("mptfoundry") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the project is on the path but not installed, so its requirements can't be read")
    here = {**pins(name), **dev_pins(name)}
    for line in declared:
        requirement = Requirement(line.lower())
        if requirement.marker is None:
            pin = pins(name)[requirement.name]
        elif requirement.name in here:
            pin = here[requirement.name]
        else:
            assert requirement.name in {"flash-attn", "bitsandbytes", "pyspark", "comet_ml", "torchao"}, (
                f"{name} lacks {requirement.name}"
            )
            continue
        assert requirement.specifier.contains(pin, prereleases=True), f"{requirement} has {pin} in {name}"


def dev_pins(name: str) -> dict[str, str]:
    lines = map(Requirement, lines_of(FOLDER / f"{name}-dev.txt"))
    return {line.name: str(line.specifier).removeprefix("==") for line in lines}


def test_a_set_has_every_package_that_a_run_imports() -> None:
    imported = set()
    for path in (ROOT / "mptfoundry").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                imported.add(node.module.split(".")[0])
    owners = metadata.packages_distributions()
    for module in imported - set(sys.stdlib_module_names) - {"mptfoundry"} - OPTIONAL:
        packages = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners.get(module, [module])}
        for name in PYTHONS:
            assert packages & pins(name).keys(), f"{module} is imported, {name}.txt lacks {packages}"


def test_composer_pins_keep_to_what_composer_declares() -> None:
    compared = 0
    for owner in ("mosaicml", "mosaicml-streaming"):
        if metadata.version(owner) != pins("composer-pins")[owner]:
            continue  # what the pinned version declares is not known here
        compared += 1
        for line in metadata.requires(owner) or []:
            requirement = Requirement(line)
            if requirement.marker is None and requirement.name in pins("composer-pins"):
                pin = pins("composer-pins")[requirement.name]
                assert requirement.specifier.contains(pin), f"{owner} declares {requirement}, pinned is {pin}"
    assert compared


def test_an_exact_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PYTHONS:
        monkeypatch.setattr(install_sets, "version_of", pins(name).get)
        assert installed_set() == (name, [])


def test_what_differs_from_the_nearest_set_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {**pins("current"), "torch": "2.15.0"} | {"transformers": None}
    monkeypatch.setattr(install_sets, "version_of", installed.get)
    pinned = pins("current")["torch"]
    assert installed_set() == (
        "current",
        [f"torch 2.15.0 instead of {pinned}", "transformers is not installed"],
    )
    monkeypatch.setattr(install_sets, "version_of", {**pins("current"), "torch": f"{pinned}+cpu"}.get)
    assert installed_set() == ("current", [])


def test_the_command_installs_a_list_that_is_there_or_says_which_set_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = shlex.split(install_command(install_sets.usual_set()))
    assert (
        words[:6] == [sys.executable, "-m", "pip", "install", "--no-deps", "-r"] and Path(words[6]).is_file()
    )
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    assert install_sets.usual_set() == "composer-pins"
    with pytest.raises(
        ConfigError, match=r"for Python 3\.11 to 3\.14, and this is 3\.10\. Use the set composer-pins"
    ):
        install_command("current")
    monkeypatch.setattr(sys, "version_info", (3, 15, 0, "final", 0))
    with pytest.raises(ConfigError, match="Use another Python"):
        install_command("current")


def test_a_missing_package_is_answered_with_the_command(tmp_path: Path) -> None:
    """A bare interpreter, as before the first installation."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from mptfoundry.cli import main; sys.exit(main(['check', 'run.yaml']))"
    )
    answer = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert answer.returncode == 1
    assert "is not installed. Install all that mptfoundry needs: " in answer.stderr
    assert "requirements/" in answer.stderr and "Traceback" not in answer.stderr
