"""The long form of tests/data/test_damaged_shards.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.test_damaged_shards import SHARD, check_all, damaged_indexes, prepare_few, undamaged
from tests.fuzz import damaged_bytes


@pytest.mark.parametrize("seed", range(10, 30))
def test_any_damage_of_an_index_or_a_shard_is_an_error_or_harmless(
    seed: int, tokenizer_folder: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    shards = prepare_few(tmp_path, tokenizer_folder)
    folder = undamaged(shards, tmp_path / "hashed")
    text = (folder / "index.json").read_text()
    check_all(folder, "index.json", damaged_indexes(text, seed, 30), tiny_tokenizer)
    folder = undamaged(shards, tmp_path / "unhashed", is_hashed=False)
    damages = damaged_bytes((folder / SHARD).read_bytes(), seed, 30)
    check_all(folder, SHARD, damages, tiny_tokenizer)
