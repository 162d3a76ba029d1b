"""A tiny run that has ended, and copies of it that were stopped, for the tests of a file.

The file says in `WORDS` what its runs have besides the keys of `tiny_runs`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mptfoundry.checkpoints.checkpoint import newest_first
from mptfoundry.config.load import load_train_config
from mptfoundry.train import train


@pytest.fixture(scope="module")
def run(tiny_runs: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Trains under a name, with further words; returns the run's folder."""

    def start(name: str, *words: str) -> Path:
        train(load_train_config(tiny_runs, [*request.module.WORDS, f"run_name={name}", *words])[0])
        return tiny_runs.parent / name

    return start


@pytest.fixture(scope="module")
def whole(run: Callable[..., Path]) -> Path:
    return run("whole")


@pytest.fixture
def stopped(whole: Path, request: pytest.FixtureRequest) -> Path:
    """The folder of the run as it was before it wrote its last checkpoint."""
    folder = whole.parent / f"stopped-{abs(hash(request.node.name))}"
    shutil.copytree(whole, folder, symlinks=True)
    last, before = (each.path for each in newest_first(folder)[:2])
    last.unlink()
    (folder / "latest-rank0.pt").unlink()
    (folder / "latest-rank0.pt").symlink_to(before.name)
    return folder
