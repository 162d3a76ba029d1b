"""The packages that a logger or a method of training needs, by the versions that work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mptfoundry.config.engine.signatures import LOGGERS
from mptfoundry.plan.packages import OF_SECTIONS, OF_THE_MODEL, package_problem

ROOT = Path(__file__).parents[2]
NO_PACKAGE = {"file_logger", "in_memory_logger", "inmemory"}


def test_every_logger_that_imports_a_package_names_it() -> None:
    named = {name for section, name in OF_SECTIONS if section == "loggers"}
    assert named == set(LOGGERS) - NO_PACKAGE


@pytest.mark.parametrize("wanted", [*OF_SECTIONS.values(), *OF_THE_MODEL.values()])
def test_the_advice_is_what_the_project_declares(wanted: str) -> None:
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    declared = re.findall(r'^\w+ = \["([^"]+)"\]$', extras, re.MULTILINE)
    name = Requirement(wanted).name
    assert wanted in declared or name not in {Requirement(each).name for each in declared}


def installed(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_version_that_does_not_work_is_named_with_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    said = "needs the package nobodys: pip install 'nobodys<0.28'"
    assert package_problem("nobodys<0.28") == said
    (tmp_path / "nobodys").mkdir()  # as a run of wandb leaves `wandb` in the working directory
    assert package_problem("nobodys<0.28") == said
    installed(tmp_path, "nobodys", "0.31.0")
    assert package_problem("nobodys<0.28") == "nobodys 0.31.0 does not work here: pip install 'nobodys<0.28'"


def test_a_version_that_works_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    installed(tmp_path, "wandb", "0.27.1")
    assert package_problem("wandb<0.28") is None
