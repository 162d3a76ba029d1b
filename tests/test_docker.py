"""The image can't be built where tests run; what it is made of can be checked."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()


def test_what_the_image_copies_is_there() -> None:
    copied = re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", DOCKERFILE, re.MULTILINE)
    for source in " ".join(copied).split():
        assert (ROOT / source).exists(), source


def test_the_image_installs_the_pinned_list_of_a_run() -> None:
    assert "COPY mptfoundry/requirements/current.txt /opt/current.txt" in DOCKERFILE
    assert re.findall(r"pip install (.+?) &&", DOCKERFILE) == [
        "--no-deps -r /opt/current.txt",
        "--no-deps --editable .",
    ]


def test_the_image_runs_without_root() -> None:
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE) == ["1000"]
