"""Damage anywhere in a folder of shards: reading it, to look or to train, ends in a sentence or two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter

from mptfoundry.data.prepare.prepare import prepare
from mptfoundry.data.views.shards_preview import preview
from mptfoundry.errors import MPTFoundryError
from tests.fuzz import damaged_bytes, odd_values
from tests.loaders import text_loader

SEQ, VOCAB, SHARD = 64, 320, "shard.00001.mds"


def prepare_few(folder: Path, tokenizer_folder: Path) -> Path:
    """Shards with a handful of samples each."""
    (folder / "text.txt").write_text("A sentence of some words, and another one.\n" * 40)
    options: dict[str, Any] = {"tokenizer": str(tokenizer_folder), "max_seq_len": SEQ, "workers": 1}
    prepare([str(folder / "text.txt")], folder / "out", shard_bytes=1000, progress=False, **options)
    return folder / "out" / "train"


@pytest.fixture(scope="module")
def few_samples(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return prepare_few(tmp_path_factory.mktemp("few"), tokenizer_folder)


def undamaged(shards: Path, folder: Path, *, is_hashed: bool = True) -> Path:
    """A copy of shards; without hashes nothing but their content tells that they are damaged."""
    shutil.copytree(shards, folder)
    if not is_hashed:
        index = json.loads((folder / "index.json").read_text())
        for shard in index["shards"]:
            shard["raw_data"]["hashes"] = {}
        (folder / "index.json").write_text(json.dumps(index))
    return folder


def read_by_training(folder: Path, tokenizer: Any) -> list[list[int]]:
    spec = text_loader(
        local=str(folder), tokenizer=tokenizer, max_seq_len=SEQ, vocab_size=VOCAB, device_batch_size=4
    )
    dataset: Any = spec.dataloader.dataset
    return [dataset.get_item(number)["input_ids"].tolist() for number in range(dataset.num_samples)]


def look_and_train(folder: Path, tokenizer: Any, what: str) -> list[list[int]] | None:
    """What training reads; None where it ends in an error, which then is short and one of ours."""
    samples: list[list[int]] | None = None
    for read in (
        lambda: preview(folder, samples=10**6),
        lambda: read_by_training(folder, tokenizer),
    ):
        try:
            samples = read()  # type: ignore[assignment]
        except MPTFoundryError as error:
            text = str(error).replace(str(folder), "")
            assert len(text) < 800 and len(text.splitlines()) <= 7, f"{what}: {text}"
            samples = None
        except BaseException as error:
            raise AssertionError(f"{what}: {error!r}") from error
    return samples


def damaged_indexes(text: str, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Half of them are JSON with another value or key, half are other bytes."""
    for what, value in odd_values(json.loads(text), seed, count):
        yield what, json.dumps(value).encode()
    yield from damaged_bytes(text.encode(), seed, count)


def check_all(folder: Path, name: str, damages: Iterable[tuple[str, bytes]], tokenizer: Any) -> int:
    """Read the folder with each damage of one file; gives how many were noticed."""
    expected, original, noticed = read_by_training(folder, tokenizer), (folder / name).read_bytes(), 0
    for what, content in damages:
        (folder / name).write_bytes(content)
        samples = look_and_train(folder, tokenizer, what)
        noticed += samples is None
        if name == "index.json" and samples is not None:
            assert samples == expected, f"{what}: other samples are read without a word"
    (folder / name).write_bytes(original)
    return noticed


def test_a_damaged_index_is_an_error_or_harmless(
    few_samples: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    folder = undamaged(few_samples, tmp_path / "x")
    text = (folder / "index.json").read_text()
    assert check_all(folder, "index.json", damaged_indexes(text, 1, 25), tiny_tokenizer) > 25


def test_an_index_of_another_maker_is_read_as_strictly(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Without what `prepare` notes there is less to compare, so other samples may be read."""
    with MDSWriter(columns={"text": "str"}, out=str(tmp_path / "x"), hashes=["sha1"]) as writer:
        for number in range(9):
            writer.write({"text": f"sample {number}"})
    text = (tmp_path / "x" / "index.json").read_text()
    for what, content in damaged_indexes(text, 2, 15):
        (tmp_path / "x" / "index.json").write_bytes(content)
        look_and_train(tmp_path / "x", tiny_tokenizer, what)


@pytest.mark.parametrize("is_hashed", [True, False])
def test_a_damaged_shard_is_an_error(
    few_samples: Path, tmp_path: Path, tiny_tokenizer: Any, is_hashed: bool
) -> None:
    folder = undamaged(few_samples, tmp_path / "x", is_hashed=is_hashed)
    damages = list(damaged_bytes((folder / SHARD).read_bytes(), 3, 15))
    changed = sum(content != (folder / SHARD).read_bytes() for _, content in damages)
    noticed = check_all(folder, SHARD, damages, tiny_tokenizer)
    assert noticed == changed if is_hashed else noticed >= changed // 2
