"""Records are tokenized once: found again by content, the same by several processes, resumed after a kill."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mptfoundry.config.data import FinetuningDatasetConfig
from mptfoundry.data import jobs
from mptfoundry.data.examples import cache as example_cache
from mptfoundry.data.examples.cache import cache_folder, prepare_examples
from mptfoundry.data.examples.store import ExampleStore
from mptfoundry.data.examples.turns import ExampleMaker
from mptfoundry.data.records import records
from mptfoundry.errors import DataError
from tests.loaders import context_of

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("prepared examples are damaged", "zeros, flips, lost files, 8", "built again, with a note"),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """200 records, every tenth of them bad."""
    path = tmp_path / "records.jsonl"
    rows = [
        {"prompt": f"say {n}", "response": 7 if n % 10 == 9 else f"{n} " * (n % 7 + 1)} for n in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "UNIT_BYTES", 400)
    monkeypatch.setattr(jobs, "SHORTEST_PERIOD_SECONDS", 1e-9)
    monkeypatch.setattr(jobs, "MOST_TIME_SAVING", 1e9)


def prepare(file: Path, tokenizer: Any, cache: Path, **changes: Any) -> Path:
    where = "train_loader.dataset"
    running = {key: changes.pop(key) for key in ("workers", "say") if key in changes}
    columns = {"preprocessing_fn": changes.pop("columns", None)}
    context = context_of(tokenizer, max_seq_len=changes.pop("max_seq_len", 24), allow_code=True)
    dataset = FinetuningDatasetConfig(local=str(file), cache_folder=str(cache), **columns, **changes)
    (source,) = dataset.sources.values()
    return prepare_examples(where, source, dataset, context, **{"workers": 1, "progress": False, **running})


def content(folder: Path) -> tuple[Any, ...]:
    store = ExampleStore(folder)
    return store.ids.tobytes(), store.marks.tobytes(), store.lengths.tolist(), store.meta["counts"]


def test_what_was_made_is_found_again_by_its_content(
    file: Path, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = prepare(file, tiny_tokenizer, cache)
    store = ExampleStore(first)
    assert len(store) == 180 and store.meta["counts"]["bad"] == 20
    assert {path.name for path in cache.iterdir()} - {"inputs"} == {first.name}
    copy = tmp_path / "elsewhere.jsonl"
    shutil.copy(file, copy)
    monkeypatch.setattr(example_cache, "ExampleMaker", pytest.fail)
    assert prepare(copy, tiny_tokenizer, cache) == first


def test_records_are_read_again_only_where_their_size_or_time_of_change_differs(
    file: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    cache, content = tmp_path / "cache", file.read_bytes()
    other = content.replace(b"say 1", b"say 2")
    os.utime(file, (1e9, 1e9))
    first = prepare(file, tiny_tokenizer, cache)
    file.write_bytes(other)
    os.utime(file, (1e9, 1e9))
    assert prepare(file, tiny_tokenizer, cache) == first
    os.utime(file, (2e9, 2e9))
    assert prepare(file, tiny_tokenizer, cache) != first
    file.write_bytes(content)
    assert prepare(file, tiny_tokenizer, cache) == first


def test_other_content_and_other_settings_make_other_examples(
    file: Path, tmp_path: Path, tiny_tokenizer: Any, shards: Path
) -> None:
    from mptfoundry.tokenizer import load_tokenizer

    cache, folders = tmp_path / "cache", set()
    own = load_tokenizer(str(shards / "tokenizer"))
    templated = load_tokenizer(str(shards / "tokenizer"))
    templated.chat_template = "{{ messages }}"
    for tokenizer in (own, templated):
        folders.add(prepare(file, tokenizer, cache))
    for changes in (
        {"max_seq_len": 25},
        {"target_prompts": "all"},
        {"target_responses": "all"},
        {"columns": {"prompt": "prompt", "response": "prompt"}},
    ):
        folders.add(prepare(file, tiny_tokenizer, cache, **changes))
    folders.add(prepare(file, tiny_tokenizer, cache))
    file.write_text(file.read_text().replace("say 1", "say 2"))
    folders.add(prepare(file, tiny_tokenizer, cache))
    assert len(folders) == 8


def test_a_preparation_that_is_killed_goes_on_where_it_was(
    file: Path, tmp_path: Path, tiny_tokenizer: Any, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(prepare(file, tiny_tokenizer, tmp_path / "whole"))
    units: list[int] = []

    class Killed(ExampleMaker):
        def __call__(self, unit: Any) -> Any:
            units.append(unit.parts[0].start)
            if len(units) == 10:
                raise KeyboardInterrupt
            return super().__call__(unit)

    monkeypatch.setattr(example_cache, "ExampleMaker", Killed)
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        prepare(file, tiny_tokenizer, cache)
    (parts,) = cache.glob("*.parts")
    assert (parts / "state.json").is_file()
    resumed_at = units[9]
    del units[:]
    units.extend([0] * 10)
    assert content(prepare(file, tiny_tokenizer, cache)) == whole
    assert units[10] == resumed_at
    assert not parts.exists()


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def as_an_older_version(file: Path) -> None:
    file.write_text(json.dumps({"version": 1, "dtype": "uint16", "meta": {}}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("ids.bin", zero),
        ("marks.bin", flip),
        ("sizes.npy", flip),
        ("store.json", flip),
        ("store.json", zero),
        ("store.json", as_an_older_version),
        ("ids.bin", Path.unlink),
    ],
)
def test_damaged_examples_are_made_again_and_that_is_said(
    file: Path, tmp_path: Path, tiny_tokenizer: Any, name: str, damage: Callable[[Path], None]
) -> None:
    cache = tmp_path / "cache"
    folder = prepare(file, tiny_tokenizer, cache)
    whole, said = content(folder), []
    damage(folder / name)
    assert prepare(file, tiny_tokenizer, cache, say=said.append) == folder
    assert content(folder) == whole
    (line,) = said
    assert line.startswith(f"train_loader.dataset: the examples are made again: {folder} ")
    assert prepare(file, tiny_tokenizer, cache, say=said.append) == folder and len(said) == 1


@pytest.mark.parametrize("name", ["store/ids.bin", "store/rows.bin", "state.json"])
def test_a_preparation_whose_files_are_damaged_begins_again(
    file: Path,
    tmp_path: Path,
    tiny_tokenizer: Any,
    small_units: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    whole = content(prepare(file, tiny_tokenizer, tmp_path / "whole"))

    class Killed(ExampleMaker):
        def __call__(self, unit: Any) -> Any:
            if unit.parts[0].start > 2000:
                raise KeyboardInterrupt
            return super().__call__(unit)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(example_cache, "ExampleMaker", Killed)
        prepare(file, tiny_tokenizer, tmp_path / "cache")
    (parts,) = (tmp_path / "cache").glob("*.parts")
    zero(parts / name)
    assert content(prepare(file, tiny_tokenizer, tmp_path / "cache")) == whole


def test_several_processes_make_the_same_examples(
    file: Path, tmp_path: Path, tiny_tokenizer: Any, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = content(prepare(file, tiny_tokenizer, tmp_path / "alone"))
    monkeypatch.setattr(jobs, "SMALLEST_PARALLEL_BYTES", 0)
    assert content(prepare(file, tiny_tokenizer, tmp_path / "both", workers=2)) == alone
    assert np.frombuffer(alone[1], bool).any()


def test_a_users_function_is_named_with_its_hash_and_found_again_by_it(
    file: Path, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    code = "def make(row):\n    return {'prompt': row['prompt'], 'response': 'yes'}\n"
    (tmp_path / "made_here.py").write_text(code)
    said: list[str] = []
    function = {"columns": "made_here:make", "say": said.append}
    folder = prepare(file, tiny_tokenizer, tmp_path / "cache", **function)
    assert len(ExampleStore(folder)) == 200
    assert said[0].startswith(f"preprocessing_fn: made_here:make of {tmp_path}/made_here.py (sha256 ")
    (tmp_path / "made_here.py").write_text(code + "# changed\n")
    again = prepare(file, tiny_tokenizer, tmp_path / "cache", **function)
    assert again != folder
    with pytest.raises(DataError, match="nowhere:make: there is no such module"):
        prepare(file, tiny_tokenizer, tmp_path, columns="nowhere:make")


def test_the_cache_is_the_users_own_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "mptfoundry" / "examples"
    assert cache_folder("mine") == Path("mine")
