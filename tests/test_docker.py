"""The image can't be built where tests run; what it is made of can be checked."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
LINES = (ROOT / "docker/constraints.txt").read_text().splitlines()
PINS = dict(line.split("==") for line in LINES if not line.startswith("#"))


def test_what_the_image_copies_is_there() -> None:
    copied = re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", DOCKERFILE, re.MULTILINE)
    for source in " ".join(copied).split():
        assert (ROOT / source).exists(), source


def test_the_image_pins_every_dependency_within_its_range() -> None:
    try:
        declared = metadata.requires("mptfoundry") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the project is on the path but not installed, so its requirements can't be read")
    for line in declared:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "dev"}):
            pin = PINS[requirement.name.lower()]
            assert requirement.specifier.contains(pin), f"{requirement} has {pin}"


def test_the_image_runs_without_root() -> None:
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE) == ["1000"]
