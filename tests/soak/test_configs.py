"""Thousands of mutated configs: `check` answers each in lines, soon, and without a traceback."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "config" / "mutated.py"


@pytest.mark.parametrize("seed", range(8))
def test_every_mutated_config_is_planned_or_answered(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("mutated", FILE)
    assert spec is not None and spec.loader is not None
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)
    monkeypatch.chdir(tmp_path)
    for said, text in mutated.mutations(seed=seed, count=500):
        try:
            mutated.judge(text, tmp_path)
        except Exception as error:
            raise AssertionError(f"{said}\n{text}") from error
