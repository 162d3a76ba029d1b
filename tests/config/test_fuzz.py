"""Whatever a YAML holds, `check` answers in lines and without a traceback; the long form is in tests/soak."""

from __future__ import annotations

from pathlib import Path

import pytest

from .mutated import judge, mutations

SMALL = ("mpt-tiny", "mpt-text-classification", "finetune-demo")


def test_every_mutated_config_is_planned_or_answered_in_short_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for said, text in mutations(seed=7, count=15, names=SMALL):
        try:
            answer = judge(text, tmp_path)
        except Exception as error:
            raise AssertionError(f"{said}\n{text}") from error
        assert all(len(line) < 1000 for line in (answer or "").splitlines()), said
