"""Many seeds of odd and damaged records; one of them is part of the ordinary tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.test_records_fuzz import assert_finetuning_holds, assert_labelled_holds


@pytest.mark.parametrize("seed", range(100, 1100, 100))
def test_odd_and_damaged_records_of_finetuning_are_counted(
    seed: int, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_finetuning_holds(tmp_path, tiny_tokenizer, monkeypatch, seed=seed, values=300, files=400)


@pytest.mark.parametrize("seed", range(100, 1100, 100))
def test_odd_and_damaged_labelled_records_are_said(seed: int, tmp_path: Path, tiny_tokenizer: Any) -> None:
    assert_labelled_holds(tmp_path, tiny_tokenizer, seed=seed, values=200, files=200)
