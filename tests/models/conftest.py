"""A script run by one process and by two, whose results are then compared."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_on_ranks


@pytest.fixture
def on_one_rank_and_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any]]:
    """Run a script on one rank and on two; gives what each writes as JSON to the file of its first word."""

    def run(text: str, *words: str) -> tuple[Any, Any]:
        script, one, two = (str(tmp_path / name) for name in ("train.py", "one.json", "two.json"))
        Path(script).write_text(text)
        done = run_on_ranks(script, two, *words)
        assert done.returncode == 0, done.stdout
        monkeypatch.setattr(sys, "argv", [script, one, *words])
        runpy.run_path(script, run_name="__main__")
        return json.loads(Path(one).read_text()), json.loads(Path(two).read_text())

    return run
